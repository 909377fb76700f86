"""What came of runs and sweeps, told from their files alone."""

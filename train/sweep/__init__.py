"""Many runs from one command: points, trials on disk, and who executes them."""

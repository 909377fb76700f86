"""The tasting room: generate, score, report."""

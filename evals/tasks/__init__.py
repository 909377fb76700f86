"""Tasks: which records are asked which question, and which metric scores the answer."""

"""Metrics: exact, dependency-free scoring functions."""

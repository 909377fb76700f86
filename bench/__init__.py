"""Measurements: what the framework does beside what was published, in one run on one machine; nothing imports this."""

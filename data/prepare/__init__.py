"""Fetching published data sets: a catalogue, resumed downloads, careful unpacking, and proof that the layout opens."""

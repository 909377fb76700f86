"""A sharded copy of sources: what its files hold, and how it is written."""

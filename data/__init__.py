"""The pantry: records in native formats in, micro-batches out; knows nothing of engines."""

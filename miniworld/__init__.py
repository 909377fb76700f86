"""The embedded default: a procedural world in native formats, and the tiny backbones trained on it."""

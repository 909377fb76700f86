"""Integrations: how layers of the language model see more of an image than its embeddings; one file each."""

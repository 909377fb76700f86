"""Connectors: from anchors and visual tokens to language-model embeddings; one file each."""

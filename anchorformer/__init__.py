"""Two-stage training of large multimodal models with visual anchors: the model library."""

"""The workshop: configs, engines and the two-stage training loop."""

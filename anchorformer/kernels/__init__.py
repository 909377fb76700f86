"""Fused operations, each with a plain PyTorch twin behind one seam."""

"""Selectors: which visual tokens become anchors; one file each."""

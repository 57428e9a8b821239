"""Checkpoints: finding, loading and describing them."""

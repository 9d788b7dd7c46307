"""Inference: an adapter folder and images to predictions."""

"""Backbones, one file per family."""

"""Data: layouts, checks, splits, the image cache, augmentation, phantoms."""

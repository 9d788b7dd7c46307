"""Whole-batch augmentation of images and masks in two and three dimensions, each case by its own draws."""

from medtpp.data.augment.augmenter import Augmenter, Use, resolve

__all__ = ["Augmenter", "Use", "resolve"]

"""Frozen features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from medtpp.backbones import Backbone
from medtpp.data.cache import ImageCache


@torch.no_grad()
def features(backbone: Backbone, cache: ImageCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, D) mean-pooled patch tokens."""
    parts = []
    for start in range(0, len(rows), 64):
        images = torch.from_numpy(cache.images[rows[start : start + 64]]).float() / 255
        parts.append(backbone.encode(images).pooled("mean"))
    return torch.cat(parts).numpy()

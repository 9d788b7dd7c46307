"""Backbones of images that encode volumes, for tests."""

import math

import pytest
import torch

import matrix
from medtpp import backbones
from medtpp.config import TUNERS, BackboneOptions
from medtpp.seeds import Seeds
from pictures import pictures

SIZE, PATCH, GRID = (8, 24, 32), (4, 8, 8), (2, 3, 4)
PATCHES = math.prod(GRID)
# Absolute positions with class and register tokens; rotary and absolute ones with separate queries, keys and values.
TUNED = [
    (tuner, variant) for tuner, variant in matrix.TUNED if variant in ("medtpp_test_registers", "medtpp_test_gated")
]
WITH_EMBED = [pair for pair in TUNED if pair[0] not in ("full", "linear")]


def params(pairs):
    """As parameters of a test: each tuner with one variant in turn, the others slow."""
    fast = {name: TUNED[index % 2][1] for index, name in enumerate(TUNERS.names())}
    return [pytest.param(*pair, marks=() if fast[pair[0]] == pair[1] else pytest.mark.slow) for pair in pairs]


def load(variant, size=SIZE, patch=PATCH):
    options = BackboneOptions(name=str(matrix.backbone_folder(variant)), dims=3, patch_size=patch)
    return backbones.load(options, image_size=size)


def load_flat(variant, size=SIZE[1:], patch=PATCH[1:]):
    options = BackboneOptions(name=str(matrix.backbone_folder(variant)), patch_size=patch)
    return backbones.load(options, image_size=size)


def volumes(count=4, size=SIZE, channels=1):
    return pictures(size, count, channels)


def tell_depths_apart(backbone):
    """Depth positions as training makes them."""
    with torch.no_grad():
        backbone.encoder.depth_embed.normal_(generator=Seeds(4).generator("depth"))
    return backbone


def place(*index):
    """Number of the patch at (depth, row, column)."""
    return (index[0] * GRID[1] + index[1]) * GRID[2] + index[2]

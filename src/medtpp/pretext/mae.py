"""Masked autoencoder (He et al., arXiv 2111.06377): encode a quarter of the patches, predict the pixels of the rest."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec, match_channels
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext.masked import MaskedOptions, MaskedPretext
from medtpp.seeds import Draws, Seeds

# A patch whose standard deviation is under this share of its image's is air, or the border of a scan: normalising it
# would ask for a prediction of noise.
NEAR_CONSTANT = 0.02


class MAEOptions(MaskedOptions):
    """Options of MAE."""

    name: Literal["mae"] = "mae"


@PRETEXTS.register("mae")
class MAE(MaskedPretext):
    """Masked autoencoding with normalised pixels; near-constant patches are left out of the loss."""

    Options: ClassVar[type[MethodOptions]] = MAEOptions
    summary: ClassVar[str] = "predict the pixels of hidden patches from the visible ones (arXiv 2111.06377)"
    needs = frozenset({"drops_tokens"})

    def __init__(self, options: MAEOptions, spec: Spec, seeds: Seeds) -> None:
        super().__init__(options, spec, seeds, outputs=math.prod(spec.patch) * spec.channels)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error on normalised pixels of the hidden patches, averaged per image, then over the batch."""
        ids_keep, ids_hidden = self.split(draws)
        predicted = self.decode(backbone, images, ids_keep, ids_hidden)  # (B, H, p*C)
        target, weight = self.targets(images, ids_hidden)
        error = F.mse_loss(predicted.float(), target, reduction="none").mean(dim=-1)  # (B, H)
        # Per image first: so a batch cut over processes or micro-batches has the same loss as a whole one.
        loss = ((error * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)).mean()
        return loss, {"kept_in_loss": weight.mean()}

    def targets(self, images: Tensor, ids_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels (B, H, p*C) of the hidden patches and their weights (B, H), 0 for near-constant ones."""
        images = match_channels(images, self.channels).float()
        patches = patchify(images, self.patch)  # (B, N, p*C)
        return normalised(patches.gather(1, ids_hidden[..., None].expand(-1, -1, patches.shape[-1])), images)

    @torch.no_grad()
    def preview(self, backbone: Backbone, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The images with hidden patches in grey, and with the hidden patches predicted."""
        ids_keep, ids_hidden = self.split(draws)
        predicted = self.decode(backbone, images, ids_keep, ids_hidden).float()
        patches = patchify(match_channels(images, self.channels).float(), self.patch)
        index = ids_hidden[..., None].expand(-1, -1, patches.shape[-1])
        hidden = patches.gather(1, index)
        variance, mean = torch.var_mean(hidden, dim=-1, keepdim=True)
        restored = patches.scatter(1, index, predicted * (variance + 1e-6).sqrt() + mean)
        masked = patches.scatter(1, index, torch.full_like(hidden, 0.5))
        shape = images.shape[2:]
        return {
            "masked": unpatchify(masked, self.patch, shape),
            "restored": unpatchify(restored, self.patch, shape).clamp(0, 1),
        }


def normalised(patches: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (B, H, p*C) of images, each less its mean and over its deviation, and weights (B, H): 0 for flat ones."""
    centred, deviation = centre(patches)  # (B, H, p*C), (B, H, 1)
    _, overall = centre(images.flatten(1))  # (B, 1)
    weight = (deviation[..., 0] > NEAR_CONSTANT * overall).float()
    return centred / (deviation.square() + 1e-6).sqrt(), weight


def centre(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values less their mean over the last dimension, and their standard deviation (..., 1)."""
    centred = values - values.mean(dim=-1, keepdim=True)
    # torch.var and torch.std are slow on CPUs.
    return centred, torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(values.shape[-1] - 1)


def patchify(images: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, C, *spatial) to (B, N, p*C), p pixels to a patch, in 2D or 3D."""
    dims = len(patch)
    for axis, side in enumerate(patch):
        shape = images.shape
        cut = 2 + 2 * axis
        images = images.reshape(*shape[:cut], shape[cut] // side, side, *shape[cut + 1 :])  # (B, C, g1, p1, ...)
    grid_axes, patch_axes = [2 + 2 * axis for axis in range(dims)], [3 + 2 * axis for axis in range(dims)]
    return images.permute(0, *grid_axes, *patch_axes, 1).flatten(dims + 1).flatten(1, dims)


def unpatchify(patches: Tensor, patch: tuple[int, ...], spatial: tuple[int, ...]) -> Tensor:
    """(B, N, p*C) to (B, C, *spatial): the inverse of `patchify`."""
    dims = len(patch)
    grid = [size // side for size, side in zip(spatial, patch, strict=True)]
    x = patches.reshape(len(patches), *grid, *patch, -1)  # (B, g1, g2, ..., p1, p2, ..., C)
    interleaved = [
        axis for pair in zip(range(1, dims + 1), range(dims + 1, 2 * dims + 1), strict=True) for axis in pair
    ]
    return x.permute(0, 2 * dims + 1, *interleaved).reshape(len(patches), -1, *spatial)

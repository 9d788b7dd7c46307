"""A decoder pre-trained with the target parameters: hidden parts of an image are restored through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec, match_channels
from medtpp.config import Experiment
from medtpp.errors import ConfigError
from medtpp.seeds import Draws, Seeds
from medtpp.tasks.decoders import UNETR
from medtpp.tasks.segmentation import SegmentationOptions

HIDDEN = 0.5  # share of the patches; the decoder also sees the image, so that more would leave it little to learn from


class DenseReconstruction(nn.Module):
    """In-painting (Pathak et al., arXiv 1604.07379) through the decoder of a segmentation.

    Hidden patches are filled with the image's mean, in what the backbone and the decoder's image skip see. MAE drops
    them instead, which leaves no maps to decode.

    Args:
        decoder: What is pre-trained.
        spec: Of the backbone.
        seeds: The initial weights of the last layer depend on these alone.
    """

    def __init__(self, decoder: UNETR, spec: Spec, seeds: Seeds) -> None:
        super().__init__()
        self.decoder = decoder
        self.spec = spec
        with seeds.scope("pretext", "dense"):
            self.predict = (nn.Conv2d if spec.dims == 2 else nn.Conv3d)(decoder.width, spec.channels, 1)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> Tensor:
        """Mean squared error on the hidden voxels of standardised images, averaged per image, then over the batch.

        Args:
            backbone: Tuned.
            images: (B, C, *spatial) in [0, 1].
            draws: Random numbers of the B cases.
        """
        images = match_channels(images, self.spec.channels).float()
        hidden = self.hide(draws)  # (B, 1, *spatial)
        axes = tuple(range(2, images.ndim))
        mean = images.mean(dim=axes, keepdim=True)
        deviation = (images - mean).square().mean(dim=axes, keepdim=True).sqrt().clamp(min=1e-3)
        features = backbone.encode(torch.where(hidden, mean, images), taps=self.decoder.taps)
        restored = self.predict(self.decoder(features)).float()  # (B, C, *spatial)
        error = (restored - (images - mean) / deviation).square().mean(dim=1, keepdim=True) * hidden
        loss: Tensor = (error.flatten(1).sum(dim=1) / hidden.flatten(1).sum(dim=1)).mean()
        return loss

    def hide(self, draws: Draws) -> Tensor:
        """(B, 1, *spatial) booleans: whole patches."""
        grid, patch = self.spec.grid, self.spec.patch
        ids_shuffle = draws.permutation("dense", math.prod(grid))  # (B, N)
        hidden = torch.zeros(ids_shuffle.shape, dtype=torch.bool, device=ids_shuffle.device)
        hidden.scatter_(1, ids_shuffle[:, : round(HIDDEN * ids_shuffle.shape[1])], True)
        hidden = hidden.reshape(len(hidden), 1, *grid)
        for axis, side in enumerate(patch, start=2):
            hidden = hidden.repeat_interleave(side, dim=axis)
        return hidden


def make_dense(experiment: Experiment, spec: Spec, seeds: Seeds) -> DenseReconstruction | None:
    """The decoder that TPP is to pre-train, with its initial weights of fine-tuning; None if it is to be left.

    Raises:
        ConfigError: The task has no decoder.
    """
    options = require_decoder(experiment)
    if options is None:
        return None
    return DenseReconstruction(UNETR(spec, seeds, options.feature_size, options.image_skip), spec, seeds)


def require_decoder(experiment: Experiment) -> SegmentationOptions | None:
    """The options of the decoder that TPP is to pre-train, if it is.

    Raises:
        ConfigError: The task has no decoder.
    """
    options = experiment.task
    if not experiment.tpp.decoder:
        return None
    if isinstance(options, SegmentationOptions) and options.head == "unetr":
        return options
    raise ConfigError("tpp.decoder pre-trains the decoder of task.head=unetr, in segmentation; there is none here.")

"""What tasks have in common that encode some of the patches and predict something of the others."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec, training_attention
from medtpp.config import MethodOptions
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds


class MaskedOptions(MethodOptions):
    """Options of tasks with hidden patches and a decoder."""

    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is hidden")
    decoder_depth: int = Field(2, ge=1, description="blocks of the pretext decoder")
    decoder_width: int = Field(128, ge=32, multiple_of=32, description="channels of the pretext decoder")


class MaskedPretext(Pretext):
    """Hidden patches are dropped before the encoder; a small transformer predicts from the visible ones (MAE's design).

    Args:
        options: Its options.
        spec: Of the backbone.
        seeds: The initial head depends on these alone.
        outputs: Numbers to predict for each hidden patch.
    """

    def __init__(self, options: MaskedOptions, spec: Spec, seeds: Seeds, outputs: int) -> None:
        nn.Module.__init__(self)
        width = options.decoder_width
        self.patch = spec.patch
        self.channels = spec.channels
        self.num_patches = math.prod(spec.grid)
        self.num_visible = min(self.num_patches - 1, max(1, round(self.num_patches * (1 - options.mask_ratio))))
        with seeds.scope("pretext", options.name):
            self.embed = nn.Linear(spec.width, width)
            self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
            self.blocks = nn.Sequential(
                *[Block(width, num_heads=width // 32, qkv_bias=True) for _ in range(options.decoder_depth)]
            )
            self.norm = nn.LayerNorm(width)
            self.predict = nn.Linear(width, outputs)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(spec.grid, width), persistent=False)

    def split(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Indices of the visible patches (B, K), and of the hidden ones (B, H), K + H = N."""
        ids_shuffle = draws.permutation("mask", self.num_patches)
        return ids_shuffle[:, : self.num_visible], ids_shuffle[:, self.num_visible :]

    def decode(self, backbone: Backbone, images: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """Predictions (B, H, outputs) of the hidden patches."""
        features = backbone.encode(images, keep=ids_keep)
        tokens = self.embed(features.tokens)  # (B, P + K, W): P prefix tokens, which have no place in the image
        prefix, visible = tokens[:, : features.prefix], tokens[:, features.prefix :]
        positions = self.positions.to(tokens.dtype)
        hidden = self.mask_token.to(tokens.dtype) + positions[ids_hidden]  # (B, H, W)
        x = torch.cat([prefix, visible + positions[ids_keep], hidden], dim=1)  # attention needs no order
        with training_attention(x):
            x = self.blocks(x)[:, -ids_hidden.shape[1] :]  # (B, H, W)
        predicted: Tensor = self.predict(self.norm(x))
        return predicted


def sincos_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """(N, width) fixed sine and cosine positions; each axis has an equal share of the channels, a rest stays zero."""
    share = width // (2 * len(grid))
    frequencies = 10000.0 ** (-torch.arange(share) / share)
    axes = torch.meshgrid(*[torch.arange(size, dtype=torch.float32) for size in grid], indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]  # (N, share) each
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(table, (0, width - table.shape[1]))

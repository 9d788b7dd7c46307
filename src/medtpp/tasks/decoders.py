"""Decoders: from a grid of patch tokens to feature maps at the image's resolution, in two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Features, Spec, match_channels
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds


class UNETR(nn.Module):
    """The decoder of UNETR (Hatamizadeh et al., arXiv 2103.10504), for patches of any size, and for pyramids.

    Level l of L has 2^l times `feature_size` channels at 2^-l of the resolution. The image enters at level 0, the last
    tokens at level L, and between them a tapped block at each level: blocks 4, 7 and 10 of 12 for patches of 16. An
    axis whose patches are shorter is doubled in the finest steps alone, which costs least. Patches that are no powers
    of two are decoded as the nearest one, and resized to the image in the last step. A pyramid's stages enter at the
    levels that have their resolution, as in Swin UNETR (Hatamizadeh et al., arXiv 2201.01266).

    Unlike the paper's, tapped tokens are normalised as the last ones are, because the residual stream of a frozen
    network grows from block to block.

    Attributes:
        taps: The blocks it wants maps of, for `Backbone.encode`.
        width: Channels of its output.

    Args:
        spec: Of the backbone.
        seeds: The initial weights depend on these alone.
        feature_size: Channels at the image's resolution.
        image_skip: Whether it sees the image itself. Without, it shows what the backbone contributes.

    Raises:
        ConfigError: Patches are single pixels, so there is nothing to decode.
    """

    def __init__(self, spec: Spec, seeds: Seeds, feature_size: int = 16, image_skip: bool = True) -> None:
        from monai.networks.blocks.dynunet_block import UnetResBlock  # takes seconds

        super().__init__()
        doublings = [round(math.log2(side)) for side in spec.patch]
        levels = max(doublings)
        if not levels:
            raise ConfigError("Patches of one pixel need no decoder. Use --set task.head=light.")
        # scales[l] leads from level l + 1 to level l.
        scales = [tuple(2 if level < count else 1 for count in doublings) for level in range(levels)]
        widths = [feature_size * 2**level for level in range(levels)]
        self.channels = spec.channels
        self.width = feature_size
        self.level_taps = _level_taps(spec, levels)
        self.taps = tuple(sorted(set(self.level_taps.values())))  # a shallow network has fewer blocks than levels
        with seeds.scope("decoder"):
            self.image = UnetResBlock(spec.dims, spec.channels, feature_size, 3, 1, "instance") if image_skip else None
            self.projections = nn.ModuleDict(
                {
                    str(level): _lateral(spec, tap, widths[level])
                    if spec.pyramid
                    else nn.Sequential(
                        _transposed(spec.width, widths[level], scales[-1]),
                        *(_Up(widths[level], widths[level], scale) for scale in reversed(scales[level:-1])),
                    )
                    for level, tap in self.level_taps.items()
                }
            )
            entered = {*self.level_taps, *([0] if image_skip else [])}
            self.ups = nn.ModuleList(
                _Up(below, width, scale, skip=width if level in entered else 0)
                for level, (below, width, scale) in enumerate(
                    zip([*widths[1:], spec.width], widths, scales, strict=True)
                )
            )

    def forward(self, features: Features) -> Tensor:
        """(B, width, *spatial) of the images' size; the features hold the maps of `taps`."""
        images = features.images
        maps = dict(zip(self.taps, features.maps, strict=True))
        skips = {level: self.projections[str(level)](_normalise(maps[tap])) for level, tap in self.level_taps.items()}
        if self.image is not None:
            skips[0] = self.image(match_channels(images, self.channels))
        x = token_map(features)
        for level in reversed(range(1, len(self.ups))):
            x = self.ups[level](x, skips.get(level))
        full: Tensor = self.ups[0](x, skips.get(0), images.shape[2:])
        return full


def _level_taps(spec: Spec, levels: int) -> dict[int, int]:
    """The tap that enters at each level between the image and the last tokens; a pyramid may have none for some."""
    if not spec.pyramid:
        return {level: spec.depth * level // levels for level in range(1, levels)}
    strides = {max(stage.stride): tap for tap, stage in enumerate(spec.pyramid)}
    return {level: strides[2**level] for level in range(1, levels) if 2**level in strides}


def _lateral(spec: Spec, tap: int, width: int) -> nn.Module:
    """A convolution of single pixels on a stage's map."""
    layer: nn.Module = (nn.Conv2d if spec.dims == 2 else nn.Conv3d)(spec.pyramid[tap].width, width, 1)
    return layer


class _Up(nn.Module):
    """A transposed convolution, a skip connection, a residual block."""

    def __init__(self, channels: int, width: int, scale: tuple[int, ...], skip: int = 0) -> None:
        from monai.networks.blocks.dynunet_block import UnetResBlock

        super().__init__()
        self.upsample = _transposed(channels, width, scale)
        self.block = UnetResBlock(len(scale), width + skip, width, 3, 1, "instance")

    def forward(self, x: Tensor, skip: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        x = self.upsample(x)
        if size is not None:
            x = resize(x, size)
        refined: Tensor = self.block(x if skip is None else torch.cat([x, skip], dim=1))
        return refined


def _transposed(channels: int, width: int, scale: tuple[int, ...]) -> nn.Module:
    """A transposed convolution to `scale` times the size, without a bias, since an instance norm follows."""
    from monai.networks.blocks.dynunet_block import get_conv_layer

    layer: nn.Module = get_conv_layer(len(scale), channels, width, kernel_size=scale, stride=scale, is_transposed=True)
    return layer


def _normalise(tokens: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, D, *grid); what follows is linear, so that it needs no weights."""
    return F.layer_norm(tokens.movedim(1, -1), tokens.shape[1:2]).movedim(-1, 1)


def token_map(features: Features) -> Tensor:
    """The last patch tokens as a map (B, D, *grid)."""
    batch, _, width = features.patches.shape
    return features.patches.transpose(1, 2).reshape(batch, width, *features.grid)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (B, C, *spatial) to another spatial size; nothing is done where it fits."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear" if x.ndim == 4 else "trilinear")

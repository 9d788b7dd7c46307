"""Networks of images, made to encode volumes: patches, positions and rotations get a third axis, depth.

Patch embedding: resampled to the patch's height and width by the pseudo-inverse of bicubic resizing (FlexiViT, Beyer et
al., arXiv 2212.08013), then inflated: each of the pd slices of the kernel is the image's kernel / pd (I3D, Carreira &
Zisserman, arXiv 1705.07750), so that a volume that is constant in depth embeds as the image would.

Positions: each slice of tokens gets the network's own positions, absolute ones resampled by timm, rotary ones as they
are, and a learned position of its depth, which starts at zero (as TimeSformer's positions in time do, Bertasius et al.,
arXiv 2102.05095). Fixed sines and cosines would tell depths apart from the start, but the frozen blocks have never seen
their sum with a plane's positions. With zeros, the start is what the blocks know, and since depths differ in content,
the first training step already tells them apart.

Kernel and depth positions are new: a tuner trains them as a group of their own. The bias, which BitFit may train, and
the positions in the plane stay the source's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones.base import Inflation
from medtpp.errors import ConfigError


class PatchProjection(nn.Conv3d):
    """A convolution whose stride is its kernel. On single patches, its matrix product is five times quicker."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, width, D / pd, H / ph, W / pw)."""
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


class VolumeEmbed(nn.Module):
    """A patch embedding of volumes in the place of timm's `PatchEmbed`, with the attributes that backbones read.

    Args:
        flat: The patch embedding of images; its bias and norm are taken over.
        image_size: (D, H, W) in voxels.
        patch: (pd, ph, pw); ph and pw are those of `flat`.
        channels: Of the volumes. Where it is not what `flat` takes, each channel starts with an equal share of the sum
            over the channels of `flat`, so that a volume with the same content in all embeds as a grey one would.
    """

    flatten = True

    def __init__(self, flat: Any, image_size: tuple[int, ...], patch: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.img_size = image_size
        self.patch_size = patch
        self.grid_size = tuple(size // side for size, side in zip(image_size, patch, strict=True))
        weight = flat.proj.weight.detach()  # (width, C, ph, pw)
        if weight.shape[1] != channels:
            weight = weight.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels
        kernel = (patch[0], patch[1], patch[2])
        self.proj = PatchProjection(weight.shape[1], weight.shape[0], kernel, kernel, bias=False)
        self.proj.weight = nn.Parameter(weight[:, :, None].expand(-1, -1, patch[0], -1, -1) / patch[0])
        self.proj.bias = flat.proj.bias
        self.norm = flat.norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, N, width)."""
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


def inflate(
    encoder: Any,
    image_size: int | Sequence[int] | None,
    patch_size: int | Sequence[int] | None,
    channels: int | None = None,
) -> Inflation:
    """Make a timm ViT encode volumes, in place.

    Args:
        encoder: A plain `VisionTransformer` or `Eva`.
        image_size: (D, H, W) in voxels, or the side of a cube; by default the side of the network's images.
        patch_size: (pd, ph, pw) in voxels, or the side of a cube; by default the side of the network's patches.
        channels: Of the volumes; by default the network's own.

    Raises:
        ConfigError: The sizes are not three, the volume is not made of whole patches, or the network computes rotary
            positions in a way that cannot be repeated along depth.
    """
    rope = getattr(encoder, "rope", None)
    if rope is not None and not hasattr(rope, "feat_shape"):
        raise ConfigError(
            f"The rotary positions of this network ({type(rope).__name__}) cannot be repeated along depth. "
            "Backbones with absolute positions, EVA-02 and DINOv3 can encode volumes."
        )
    flat = encoder.patch_embed
    patch = sides(patch_size, 3) or (flat.patch_size[0],) * 3
    size = sides(image_size, 3) or (flat.grid_size[0] * flat.patch_size[0],) * 3
    require_whole(size, patch)
    names = [name for name in ("patch_embed.proj.weight", "pos_embed") if name in dict(encoder.named_parameters())]
    originals = {name: encoder.get_parameter(name).detach() for name in names}
    encoder.set_input_size(img_size=size[1:], patch_size=patch[1:])
    encoder.patch_embed = VolumeEmbed(flat, size, patch, channels or flat.proj.in_channels)
    encoder.depth_embed = nn.Parameter(torch.zeros(encoder.patch_embed.grid_size[0], encoder.embed_dim))
    return Inflation(("patch_embed.proj.weight", "depth_embed"), originals)


def add_positions(encoder: Any, x: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens and positions of an inflated network.

    Args:
        encoder: The network.
        x: (B, N, D) patch embeddings, N = depth * rows * columns.
        prefix: P, the number of class and register tokens.

    Returns:
        (B, P + N, D), and the rotations (N, R) if there are.
    """
    batch, (depth, width) = x.shape[0], encoder.depth_embed.shape  # not len(): the batch may be symbolic
    slices = x.reshape(batch, depth, -1, width) + encoder.depth_embed[:, None]  # (B, depth, rows * columns, D)
    # Each slice as an image with prefix tokens, which are the same in all of them.
    embedded = encoder._pos_embed(slices.flatten(0, 1))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    tokens = tokens.reshape(batch, depth, -1, width)  # (B, depth, P + rows * columns, D)
    tokens = torch.cat([tokens[:, 0, :prefix], tokens[:, :, prefix:].flatten(1, 2)], dim=1)
    return tokens, None if rope is None else rope.repeat(depth, 1)


def sides(value: int | Sequence[int] | None, dims: int) -> tuple[int, ...] | None:
    """A size with one number for each dimension; one number alone is that of a square or cube.

    Raises:
        ConfigError: It has another number of dimensions.
    """
    if value is None:
        return None
    size = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(size) != dims:
        raise ConfigError(f"The size {_text(size)} has {len(size)} dimensions; backbone.dims is {dims}.")
    return size


def require_whole(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Raise ConfigError, with the sizes next to it, for an image that is not made of whole patches."""
    pairs = list(zip(size, patch, strict=True))
    if any(side % step for side, step in pairs):
        below = tuple(max(side // step, 1) * step for side, step in pairs)
        above = tuple(-(-side // step) * step for side, step in pairs)
        raise ConfigError(
            f"An image size of {_text(size)} is not a multiple of the patch size {_text(patch)}. "
            f"Use --set data.image_size={_option(below)} or {_option(above)}."
        )


def _text(size: tuple[int, ...]) -> str:
    return str(size[0]) if len(set(size)) == 1 else "x".join(map(str, size))


def _option(size: tuple[int, ...]) -> str:
    return str(size[0]) if len(set(size)) == 1 else f"[{','.join(map(str, size))}]"

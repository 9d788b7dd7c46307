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
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones.base import Inflation
from medtpp.backbones.beit import add_class_token
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
        proj: The convolution.
        norm: After it.
        image_size: (D, H, W) in voxels.
        patch: (pd, ph, pw), the convolution's kernel and stride.
    """

    flatten = True

    def __init__(self, proj: nn.Module, norm: nn.Module, image_size: tuple[int, ...], patch: tuple[int, ...]) -> None:
        super().__init__()
        self.img_size = image_size
        self.patch_size = patch
        self.grid_size = tuple(size // side for size, side in zip(image_size, patch, strict=True))
        self.proj = proj
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, N, width)."""
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


def _deepened(flat: nn.Conv2d, depth: int, channels: int) -> PatchProjection:
    """A projection of patches of images for those of volumes, `depth` voxels deep; the bias is taken over."""
    weight = shared_among(flat.weight.detach(), channels)  # (width, C, ph, pw)
    kernel = (depth, weight.shape[2], weight.shape[3])
    proj = PatchProjection(channels, weight.shape[0], kernel, kernel, bias=False)
    proj.weight = nn.Parameter(weight[:, :, None].expand(-1, -1, depth, -1, -1) / depth)
    proj.bias = flat.bias
    return proj


def shared_among(weight: Tensor, channels: int) -> Tensor:
    """The weight (width, C, *kernel) of a first layer for other channels: each gets an equal share of the sum.

    So an image with the same content in all channels is seen as a grey one would be.
    """
    if weight.shape[1] == channels:
        return weight
    return weight.sum(dim=1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels


def take_channels(encoder: nn.Module, path: str, channels: int) -> Inflation:
    """Make the first convolution of a network, at `path`, take other channels, in place."""
    layer: Any = encoder.get_submodule(path)
    if layer.in_channels == channels:
        return Inflation()
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(shared_among(weight, channels))
    layer.in_channels = channels
    return Inflation((f"{path}.weight",), {f"{path}.weight": weight})


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
    resampled = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")
    originals = {name: value.detach() for name, value in encoder.named_parameters() if name.endswith(resampled)}
    encoder.set_input_size(img_size=size[1:], patch_size=patch[1:])
    proj = _deepened(flat.proj, patch[0], channels or flat.proj.in_channels)
    encoder.patch_embed = VolumeEmbed(proj, flat.norm, size, patch)
    encoder.depth_embed = nn.Parameter(torch.zeros(encoder.patch_embed.grid_size[0], encoder.embed_dim))
    return Inflation(("patch_embed.proj.weight", "depth_embed"), originals)


def add_positions(encoder: Any, x: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens and positions.

    Args:
        encoder: The network; an inflated one has positions of depth, too.
        x: (B, N, D) patch embeddings, of volumes N = depth * rows * columns.
        prefix: P, the number of class and register tokens.

    Returns:
        (B, P + N, D), and the rotations (N, R) if there are.
    """
    if not hasattr(encoder, "depth_embed"):  # images, or a network that was made for volumes
        return _add_own(encoder, x)
    batch, (depth, width) = x.shape[0], encoder.depth_embed.shape  # not len(): the batch may be symbolic
    slices = x.reshape(batch, depth, -1, width) + encoder.depth_embed[:, None]  # (B, depth, rows * columns, D)
    # Each slice as an image with prefix tokens, which are the same in all of them.
    tokens, rope = _add_own(encoder, slices.flatten(0, 1))
    tokens = tokens.reshape(batch, depth, -1, width)  # (B, depth, P + rows * columns, D)
    tokens = torch.cat([tokens[:, 0, :prefix], tokens[:, :, prefix:].flatten(1, 2)], dim=1)
    return tokens, None if rope is None else rope.repeat(depth, 1)


def _add_own(encoder: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of a network as timm has it."""
    embedded = add_class_token(encoder, x) if isinstance(encoder, Beit) else encoder._pos_embed(x)
    return embedded if isinstance(embedded, tuple) else (embedded, None)


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

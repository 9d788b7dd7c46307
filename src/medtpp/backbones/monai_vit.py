"""MONAI's ViT, of volumes or images, as a network of timm: the same layers under timm's names, with the same features.

So tokens can be dropped, masked and tapped as in any plain vision transformer.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones.base import Inflation, hash_state
from medtpp.backbones.checkpoints import load_strict, strip_prefix
from medtpp.backbones.inflate import PatchProjection, VolumeEmbed, require_whole, sides, take_channels
from medtpp.backbones.timm_vit import TimmViT, resample, wrap_vit
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)

WIDTH, PATCH = 768, 16
HEAD = 64  # channels of an attention head, as in all published networks: a file does not tell them
GRID = {2: 14, 3: 6}  # patches along each side where nothing says other ones
_EMBED, _POSITIONS = "patch_embedding.patch_embeddings.", "patch_embedding.position_embeddings"
# MONAI's names to timm's.
_NAMES = (
    (r"^patch_embedding\.patch_embeddings\.(?:1\.)?", "patch_embed.proj."),
    (r"^patch_embedding\.position_embeddings$", "pos_embed"),
    (r"\.attn\.out_proj", ".attn.proj"),
    (r"\.mlp\.linear([12])", r".mlp.fc\1"),
)
_UNUSED = re.compile(r"\.(norm_)?cross_attn\.")  # MONAI makes a norm for attention that the encoder has not


def build_vit(
    options: BackboneOptions,
    image_size: int | tuple[int, ...] | None,
    width: int | None,
    state: dict[str, Tensor] | None,
) -> TimmViT:
    """Make a network, load its weights, fit it to the size and channels of the images.

    Args:
        options: With its name.
        image_size: Of the images.
        width: That the name says, if it does.
        state: Of a file; None for random weights.

    Raises:
        ConfigError: The sizes do not fit, or the file has other ones than the options say.
        WeightsError: The state is of another network.
    """
    dims = 2 if options.dims == 2 else 3
    patch = sides(options.patch_size, dims) or (PATCH,) * dims
    size = sides(image_size, dims)
    channels = options.channels or 1
    with Seeds(0).scope("backbone", options.name):
        if state is None:
            grid = (GRID[dims],) * dims if size is None else _grid(size, patch)
            encoder = _make(width or WIDTH, 4 * (width or WIDTH), 12, grid, patch, channels, qkv_bias=False, cls=False)
        else:
            encoder = _load(state, options, patch, size, width)
    sha256 = hash_state(encoder.state_dict())
    inflation = take_channels(encoder, "patch_embed.proj", options.channels or encoder.patch_embed.proj.in_channels)
    if dims == 2:
        resample(encoder, size, patch)
    elif size is not None:
        _resample_volume(encoder, size)
    return _wrap(encoder, options.name, f"vit_{encoder.embed_dim}", options.weights, sha256, inflation)


def share_vit(network: Any, image_size: tuple[int, ...]) -> TimmViT:
    """A backbone of the layers of a network that exists, which takes images as it is.

    Raises:
        ConfigError: The images have another size, or the network cuts its patches without a convolution.
    """
    embed, first = network.patch_embedding, network.blocks[0]
    if embed.proj_type != "conv":
        raise ConfigError("This ViT of MONAI embeds patches by a perceptron. Make it with proj_type='conv'.")
    proj = getattr(embed.patch_embeddings, "base_layer", embed.patch_embeddings)
    grid = _grid(image_size, tuple(proj.kernel_size))
    if math.prod(grid) != embed.n_patches:
        raise ConfigError(f"This ViT of MONAI has {embed.n_patches} patches; images of {image_size} have others.")
    hidden = getattr(first.mlp.linear1, "base_layer", first.mlp.linear1).out_features
    with torch.device("meta"):
        encoder: Any = _make(
            embed.position_embeddings.shape[2], hidden, len(network.blocks), grid, tuple(proj.kernel_size),
            proj.in_channels, heads=first.attn.num_heads, qkv_bias=False, cls=hasattr(network, "cls_token"),
        )  # fmt: skip
    encoder.patch_embed.proj, encoder.norm = embed.patch_embeddings, network.norm
    encoder.pos_embed = embed.position_embeddings
    if hasattr(network, "cls_token"):
        encoder.cls_token = network.cls_token
    for own, given in zip(encoder.blocks, network.blocks, strict=True):
        own.norm1, own.norm2 = given.norm1, given.norm2
        own.attn.qkv, own.attn.proj = given.attn.qkv, given.attn.out_proj
        own.mlp.fc1, own.mlp.fc2 = given.mlp.linear1, given.mlp.linear2
    name = type(network).__name__
    return _wrap(encoder, name, name, "in memory", "", None)


def _grid(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    require_whole(size, patch)
    return tuple(side // step for side, step in zip(size, patch, strict=True))


def _make(
    width: int,
    hidden: int,
    depth: int,
    grid: tuple[int, ...],
    patch: tuple[int, ...],
    channels: int,
    *,
    heads: int | None = None,
    qkv_bias: bool,
    cls: bool,
) -> Any:
    """A network of timm with the layers that MONAI's has."""
    size = tuple(count * side for count, side in zip(grid, patch, strict=True))
    encoder: Any = VisionTransformer(
        img_size=size if len(grid) == 2 else 1,
        patch_size=patch if len(grid) == 2 else 1,
        in_chans=channels,
        num_classes=0,
        global_pool="token" if cls else "avg",
        class_token=cls,
        no_embed_class=True,
        embed_dim=width,
        depth=depth,
        num_heads=heads or max(1, width // HEAD),
        mlp_ratio=hidden / width,
        qkv_bias=qkv_bias,
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    if len(grid) == 3:
        kernel = (patch[0], patch[1], patch[2])
        encoder.patch_embed = VolumeEmbed(PatchProjection(channels, width, kernel, kernel), nn.Identity(), size, patch)
        encoder.pos_embed = nn.Parameter(torch.randn(1, math.prod(grid), width) * 0.02)
    encoder.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
    return encoder


def _load(
    state: Mapping[str, Tensor],
    options: BackboneOptions,
    patch: tuple[int, ...],
    size: tuple[int, ...] | None,
    width: int | None,
) -> Any:
    """The network that a state in MONAI's layout is of, with its weights; its axes turned to (depth, height, width)."""
    path, dims = options.weights, len(patch)
    state = strip_prefix(state, anchor=_POSITIONS)
    positions = state.get(_POSITIONS)
    proj = state.get(f"{_EMBED}weight", state.get(f"{_EMBED}1.weight"))
    if positions is None or proj is None or "blocks.0.mlp.linear1.bias" not in state:
        raise WeightsError(f"{path} holds no ViT of MONAI: it lacks patch_embedding or blocks.")
    if proj.ndim == 2:  # a perceptron on patches whose channels come last
        if proj.shape[1] % math.prod(patch):
            raise ConfigError(
                f"{path} embeds patches of {proj.shape[1]} numbers, which are not {'x'.join(map(str, patch))}. "
                "Say its patches by backbone.patch_size."
            )
        proj = proj.reshape(len(proj), *_turned(patch), -1).movedim(-1, 1)
    own = _turned(tuple(proj.shape[2:]))
    if len(own) != dims or (dims == 3 and options.patch_size is not None and own != patch):
        raise ConfigError(
            f"{path} has patches of {'x'.join(map(str, own))}; backbone.patch_size and backbone.dims say otherwise."
        )
    if width not in (None, proj.shape[0]):
        raise ConfigError(f"{path} is not {options.name}: its width is {proj.shape[0]}.")
    grid = _native_grid(positions.shape[1], own, size, path)
    encoder = _make(
        proj.shape[0],
        len(state["blocks.0.mlp.linear1.bias"]),
        len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}),
        grid,
        own,
        proj.shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        cls="cls_token" in state,
    )
    renamed = {_timm_name(key): value for key, value in state.items() if not _UNUSED.search(key)}
    if dims == 3:
        renamed["pos_embed"] = positions.reshape(1, *grid[::-1], -1).transpose(1, 3).flatten(1, 3)
        proj = proj.transpose(2, 4)
    renamed["patch_embed.proj.weight"] = proj
    log.info("%s: %s", path, load_strict(encoder, renamed, path))
    return encoder


def _turned(sides: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a volume along MONAI's axes, (x, y, z), as (depth, height, width), or back."""
    return sides[::-1] if len(sides) == 3 else sides


def _native_grid(count: int, patch: tuple[int, ...], size: tuple[int, ...] | None, path: str) -> tuple[int, ...]:
    """The patches along each side of the images that a network was trained with, from their number."""
    if size is not None and all(side % step == 0 for side, step in zip(size, patch, strict=True)):
        grid = tuple(side // step for side, step in zip(size, patch, strict=True))
        if math.prod(grid) == count:
            return grid
    side = round(count ** (1 / len(patch)))
    if side ** len(patch) != count:
        raise ConfigError(
            f"{path} has positions for {count} patches of {'x'.join(map(str, patch))}, which are no square or cube. "
            "Load it with images of its own size (data.volume.patch)."
        )
    return (side,) * len(patch)


def _resample_volume(encoder: Any, size: tuple[int, ...]) -> None:
    """Resample positions to volumes of another size, in place."""
    embed = encoder.patch_embed
    grid = _grid(size, embed.patch_size)
    if grid == embed.grid_size:
        return
    positions = encoder.pos_embed.detach().transpose(1, 2).unflatten(2, embed.grid_size)  # (1, D, *grid)
    resampled = F.interpolate(positions, size=grid, mode="trilinear")
    encoder.pos_embed = nn.Parameter(resampled.flatten(2).transpose(1, 2))
    encoder.patch_embed = VolumeEmbed(embed.proj, embed.norm, size, embed.patch_size)


def _wrap(encoder: Any, name: str, architecture: str, source: str, sha256: str, inflation: Inflation | None) -> TimmViT:
    return wrap_vit(encoder, name, architecture, source, sha256, family="monai", inflation=inflation)


def _timm_name(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key

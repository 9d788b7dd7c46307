"""How MONAI's hierarchical encoders are built: what runs after what, where their parts are, what a file tells of them.

MONAI itself is imported where a network is made: it takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medtpp.backbones.base import Stage
from medtpp.backbones.pyramid import Anatomy, bare, inside

# The neighbours (depth, row, column) that SwinUNETR merges to one. Before version 1.5, MONAI took two of them twice and
# two not at all, and published weights were trained so.
NEIGHBOURS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
EARLY_NEIGHBOURS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class VolumeMerging(nn.Module):
    """MONAI's `PatchMerging` of volumes, with the neighbours to choose; the arguments are MONAI's.

    Args:
        dim: Channels, C.
        norm_layer: Makes the norm.
        spatial_dims: 3.
        neighbours: Which are merged, in their order.
    """

    def __init__(
        self,
        dim: int,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        spatial_dims: int = 3,  # noqa: ARG002  (MONAI says it)
        neighbours: tuple[tuple[int, ...], ...] = NEIGHBOURS,
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C), the sides even, to (B, D / 2, H / 2, W / 2, 2 C)."""
        merged = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.neighbours], dim=-1)
        reduced: Tensor = self.reduction(self.norm(merged))
        return reduced


@dataclass(frozen=True)
class Kind:
    """What is particular to a class of networks.

    Attributes:
        network: Name of MONAI's class.
        anchor: A weight by which the prefix of a state is found.
        default: Arguments of the encoder for a number of dimensions, as published weights have them.
        version: Arguments that the name tells.
        width, channels: Names of the arguments for the width of the first stage and the input channels.
        read: Arguments, read off a state; raises KeyError for a weight that is not there.
        rename: A state of any of the known codes in MONAI's names, without what belongs to pretext heads.
        make: The encoder.
        encoder: The encoder of MONAI's network, whose modules it shares.
        anatomy, blocks, roles, stages: Read off an encoder; `stages` also gives the channels of each block.
    """

    network: str
    anchor: str
    default: Callable[[int], dict[str, Any]]
    version: dict[str, Any]
    width: str
    channels: str
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    make: Callable[[dict[str, Any]], nn.Module]
    encoder: Callable[[Any], nn.Module]
    anatomy: Callable[[Any], Anatomy]
    blocks: Callable[[Any], tuple[str, ...]]
    roles: Callable[[Any, tuple[str, ...]], dict[str, tuple[str, ...]]]
    stages: Callable[[Any], tuple[tuple[Stage, ...], tuple[int, ...]]]


# SwinUNETR: patches of two voxels, then four stages, each of which ends by merging neighbours.


def _swin_default(dims: int) -> dict[str, Any]:
    return {
        "spatial_dims": dims, "in_chans": 1, "embed_dim": 48, "patch_size": (2,) * dims,
        "window_size": (7,) * dims, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24),
    }  # fmt: skip


def _swin_read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    dims = len(patch)
    tables = [
        state[f"layers{i}.0.blocks.0.attn.relative_position_bias_table"] for i in range(1, 5)
    ]  # ((2w-1)^n, heads)
    return {
        "spatial_dims": dims,
        "in_chans": channels,
        "embed_dim": width,
        "patch_size": tuple(patch),
        "window_size": ((round(len(tables[0]) ** (1 / dims)) + 1) // 2,) * dims,
        "depths": tuple(_count(state, rf"layers{i}\.0\.blocks\.(\d+)\.") for i in range(1, 5)),
        "num_heads": tuple(table.shape[1] for table in tables),
        "mlp_ratio": len(state["layers1.0.blocks.0.mlp.linear1.bias"]) / width,
        "qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in state,
        "patch_norm": "patch_embed.norm.weight" in state,
        "use_v2": any(key.startswith("layers1c.") for key in state),
    }


def _swin_rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the pretext codes: their MLPs have other names, their stages one more number, and their heads a norm."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)
        name = re.sub(r"^(layers\d)\.0\.0\.", r"\1.0.", name)
        if not name.startswith("norm."):
            renamed[name] = value
    return renamed


def _swin_make(arguments: dict[str, Any], neighbours: tuple[tuple[int, ...], ...]) -> nn.Module:
    from monai.networks.nets.swin_unetr import SwinTransformer

    merging = partial(VolumeMerging, neighbours=neighbours) if arguments["spatial_dims"] == 3 else "merging"
    encoder: nn.Module = SwinTransformer(**arguments, downsample=merging)
    return encoder


def _swin_anatomy(encoder: Any) -> Anatomy:
    version2 = [(f"layers{i}c.0",) if encoder.use_v2 else () for i in range(1, 5)]
    stages = tuple((*before, f"layers{i}.0") for i, before in enumerate(version2, start=1))
    # The first map that SwinUNETR's decoder takes is the patches', before any block.
    return Anatomy(("patch_embed", "pos_drop"), ((), *stages), cuts_patches=True, normalised=True)


def _swin_blocks(encoder: Any) -> tuple[str, ...]:
    return tuple(
        f"layers{i}.0.blocks.{j}" for i in range(1, 5) for j in range(len(getattr(encoder, f"layers{i}")[0].blocks))
    )


def _swin_roles(encoder: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:  # noqa: ARG001  (as the others)
    # The convolutions that version 2 has before each stage have no role: no method of peft changes layers of all kinds.
    between = tuple(f"layers{i}.0.downsample" for i in range(1, 5))
    return {
        "embed.patch": ("patch_embed.proj",),
        "norm.embed": ("patch_embed.norm",),
        "attention.qkv": inside(blocks, "attn.qkv"),
        "attention.projection": inside(blocks, "attn.proj"),
        "mlp.in": inside(blocks, "mlp.linear1"),
        "mlp.out": inside(blocks, "mlp.linear2"),
        "norm.attention": inside(blocks, "norm1"),
        "norm.mlp": inside(blocks, "norm2"),
        "downsample": inside(between, "reduction"),
        "norm.downsample": inside(between, "norm"),
    }


def _swin_stages(encoder: Any) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    patch = tuple(encoder.patch_embed.patch_size)
    stages = tuple(Stage(encoder.embed_dim * 2**i, tuple(side * 2**i for side in patch)) for i in range(5))
    depths = [len(getattr(encoder, f"layers{i}")[0].blocks) for i in range(1, 5)]
    return stages, tuple(encoder.embed_dim * 2**i for i, depth in enumerate(depths) for _ in range(depth))


# SegResNet: residual blocks of two convolutions, each stage but the first begun by one of stride two.


def _segresnet_default(dims: int) -> dict[str, Any]:
    return {"spatial_dims": dims, "in_channels": 1, "init_filters": 16, "blocks_down": (1, 2, 2, 4)}


def _segresnet_read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, *kernel = state["convInit.conv.weight"].shape
    depth = _count(state, r"down_layers\.(\d+)\.")
    return {
        "spatial_dims": len(kernel),
        "in_channels": channels,
        "init_filters": width,
        "blocks_down": tuple(_count(state, rf"down_layers\.{i}\.(\d+)\.conv1\.") for i in range(depth)),
        # A file does not tell the number of groups: it is MONAI's default.
        "norm": "batch" if "down_layers.0.1.norm1.running_mean" in state else ("group", {"num_groups": 8}),
    }


def _segresnet_make(arguments: dict[str, Any]) -> nn.Module:
    from monai.networks.nets.segresnet import SegResNet

    return _segresnet_encoder(SegResNet(**arguments, blocks_up=()))


def _segresnet_encoder(network: Any) -> nn.Module:
    return nn.ModuleDict({"convInit": network.convInit, "down_layers": network.down_layers})


def _segresnet_anatomy(encoder: Any) -> Anatomy:
    return Anatomy(("convInit",), tuple((f"down_layers.{i}",) for i in range(len(encoder["down_layers"]))))


def _segresnet_blocks(encoder: Any) -> tuple[str, ...]:
    layers = encoder["down_layers"]
    return tuple(f"down_layers.{i}.{j}" for i in range(len(layers)) for j in range(1, len(layers[i])))


def _segresnet_roles(encoder: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    norms = inside(blocks, "norm1", "norm2")
    return {
        "embed.patch": ("convInit.conv",),
        "conv": inside(blocks, "conv1.conv", "conv2.conv"),
        "norm.conv": tuple(path for path in norms if bare(encoder, path).weight is not None),
        "downsample": tuple(f"down_layers.{i}.0.conv" for i in range(1, len(encoder["down_layers"]))),
    }


def _segresnet_stages(encoder: Any) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    first, layers = bare(encoder, "convInit.conv"), encoder["down_layers"]
    widths = [first.out_channels * 2**i for i in range(len(layers))]
    stages = tuple(Stage(width, (2**i,) * len(first.kernel_size)) for i, width in enumerate(widths))
    return stages, tuple(width for layer, width in zip(layers, widths, strict=True) for _ in layer[1:])


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers names that begin by a pattern have in its group."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _swin(neighbours: tuple[tuple[int, ...], ...], version: dict[str, Any]) -> Kind:
    return Kind(
        network="SwinTransformer", anchor="patch_embed.proj.weight", default=_swin_default, version=version,
        width="embed_dim", channels="in_chans", read=_swin_read, rename=_swin_rename,
        make=partial(_swin_make, neighbours=neighbours), encoder=lambda network: network, anatomy=_swin_anatomy,
        blocks=_swin_blocks, roles=_swin_roles, stages=_swin_stages,
    )  # fmt: skip


KINDS = {
    "swin_unetr": _swin(EARLY_NEIGHBOURS, {}),
    "swin_unetr_v2": _swin(EARLY_NEIGHBOURS, {"use_v2": True}),
    "swin_unetr_since1.5": _swin(NEIGHBOURS, {}),
    "swin_unetr_v2_since1.5": _swin(NEIGHBOURS, {"use_v2": True}),
    "segresnet": Kind(
        network="SegResNet", anchor="convInit.conv.weight", default=_segresnet_default, version={},
        width="init_filters", channels="in_channels", read=_segresnet_read, rename=dict, make=_segresnet_make,
        encoder=_segresnet_encoder, anatomy=_segresnet_anatomy, blocks=_segresnet_blocks, roles=_segresnet_roles,
        stages=_segresnet_stages,
    ),
}  # fmt: skip

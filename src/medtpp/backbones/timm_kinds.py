"""How timm's hierarchical networks are built: what runs after what, and where their parts are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.convnext import checkpoint_filter_fn as convert_convnext
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as convert_swin
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import checkpoint_filter_fn as convert_swin_v2
from torch import nn

from medtpp.backbones.pyramid import Anatomy, inside


@dataclass(frozen=True)
class Kind:
    """What is particular to a class of networks.

    Attributes:
        network: The class.
        modules: The timm modules that define its models.
        anatomy, roles, blocks: Read off a network.
        convert: A foreign state into timm's names.
        anchor: A weight by which the prefix of a foreign state is found.
        head: What pools and classifies.
    """

    network: type[nn.Module]
    modules: tuple[str, ...]
    anatomy: Callable[[Any], Anatomy]
    blocks: Callable[[Any], tuple[str, ...]]
    roles: Callable[[Any, tuple[str, ...]], dict[str, tuple[str, ...]]]
    convert: Callable[[Any, Any], Any]
    anchor: str
    head: tuple[str, ...]


def _stage_blocks(stages: str) -> Callable[[Any], tuple[str, ...]]:
    """Blocks under `stages`.i.blocks."""

    def blocks(network: Any) -> tuple[str, ...]:
        return tuple(
            f"{stages}.{i}.blocks.{j}"
            for i, stage in enumerate(network.get_submodule(stages))
            for j in range(len(stage.blocks))
        )

    return blocks


def _swin_anatomy(network: Any) -> Anatomy:
    stages = tuple((f"layers.{i}",) for i in range(len(network.layers)))
    return Anatomy(("patch_embed",), stages, ("norm",), channels_last=True, cuts_patches=True)


def _swin_roles(network: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    between = tuple(f"layers.{i}.downsample" for i in range(len(network.layers)))
    return {
        "embed.patch": ("patch_embed.proj",),
        "norm.embed": ("patch_embed.norm",),
        "attention.qkv": inside(blocks, "attn.qkv"),
        "attention.projection": inside(blocks, "attn.proj"),
        "mlp.in": inside(blocks, "mlp.fc1"),
        "mlp.out": inside(blocks, "mlp.fc2"),
        "norm.attention": inside(blocks, "norm1"),
        "norm.mlp": inside(blocks, "norm2"),
        "downsample": inside(between, "reduction"),
        "norm.downsample": inside(between, "norm"),
        "norm.final": ("norm",),
    }


def _convnext_anatomy(network: Any) -> Anatomy:
    stages = tuple((f"stages.{i}",) for i in range(len(network.stages)))
    stem: Any = network.stem[0]
    return Anatomy(("stem",), stages, ("norm_pre",), cuts_patches=stem.kernel_size == stem.stride)


def _convnext_roles(network: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    between = tuple(f"stages.{i}.downsample" for i in range(len(network.stages)))
    return {
        "embed.patch": ("stem.0",),
        "norm.embed": ("stem.1",),
        "conv.depthwise": inside(blocks, "conv_dw"),
        "norm.mlp": inside(blocks, "norm"),
        "mlp.in": inside(blocks, "mlp.fc1"),
        "mlp.out": inside(blocks, "mlp.fc2"),
        "downsample": inside(between, "1"),
        "norm.downsample": inside(between, "0"),
        "norm.final": ("norm_pre",),
    }


def _resnet_anatomy(network: Any) -> Anatomy:  # noqa: ARG001  (as the others)
    return Anatomy(("conv1", "bn1", "act1", "maxpool"), tuple((f"layer{i}",) for i in range(1, 5)))


def _resnet_blocks(network: Any) -> tuple[str, ...]:
    return tuple(f"layer{i}.{j}" for i in range(1, 5) for j in range(len(getattr(network, f"layer{i}"))))


def _resnet_roles(network: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    # The shortcut of a stage's first block: a convolution and a norm, in some variants after a pooling.
    shortcuts = inside(blocks, "downsample.0", "downsample.1", "downsample.2")
    modules = dict(network.named_modules())
    return {
        "embed.patch": ("conv1",) if isinstance(network.conv1, nn.Conv2d) else ("conv1.0", "conv1.3", "conv1.6"),
        "norm.embed": ("conv1.1", "conv1.4", "bn1"),
        "conv": inside(blocks, "conv1", "conv2", "conv3"),
        "norm.conv": inside(blocks, "bn1", "bn2", "bn3"),
        "downsample": tuple(path for path in shortcuts if isinstance(modules.get(path), nn.Conv2d)),
        "norm.downsample": tuple(path for path in shortcuts if isinstance(modules.get(path), nn.BatchNorm2d)),
    }


def _densenet_count(network: Any) -> int:
    return sum(name.startswith("denseblock") for name, _ in network.features.named_children())


def _densenet_anatomy(network: Any) -> Anatomy:
    children = [f"features.{name}" for name, _ in network.features.named_children()]
    first = children.index("features.denseblock1")
    stages: list[tuple[str, ...]] = [("features.denseblock1",)]
    stages += [
        (f"features.transition{i - 1}", f"features.denseblock{i}") for i in range(2, _densenet_count(network) + 1)
    ]
    return Anatomy(tuple(children[:first]), tuple(stages), ("features.norm5",))


def _densenet_blocks(network: Any) -> tuple[str, ...]:
    return tuple(
        f"features.{name}.{layer}"
        for name, block in network.features.named_children()
        if name.startswith("denseblock")
        for layer, _ in block.named_children()
    )


def _densenet_roles(network: Any, blocks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {
        "embed.patch": ("features.conv0",),
        "conv": inside(blocks, "conv1", "conv2"),
        "downsample": tuple(f"features.transition{i}.conv" for i in range(1, _densenet_count(network))),
    }


KINDS = (
    Kind(
        SwinTransformer, ("swin_transformer",), _swin_anatomy, _stage_blocks("layers"), _swin_roles,
        convert_swin, "patch_embed.proj.weight", ("head",),
    ),
    Kind(
        SwinTransformerV2, ("swin_transformer_v2",), _swin_anatomy, _stage_blocks("layers"), _swin_roles,
        convert_swin_v2, "patch_embed.proj.weight", ("head",),
    ),
    Kind(
        ConvNeXt, ("convnext",), _convnext_anatomy, _stage_blocks("stages"), _convnext_roles,
        convert_convnext, "stem.0.weight", ("head",),
    ),
    Kind(
        ResNet, ("resnet",), _resnet_anatomy, _resnet_blocks, _resnet_roles,
        lambda state, network: state, "bn1.running_mean", ("global_pool", "fc"),  # noqa: ARG005
    ),
    Kind(
        DenseNet, ("densenet",), _densenet_anatomy, _densenet_blocks, _densenet_roles,
        lambda state, network: state, "features.conv0.weight", ("global_pool", "classifier"),  # noqa: ARG005
    ),
)  # fmt: skip


def kind_of(network: nn.Module) -> Kind | None:
    """What a network is, if it is a pyramid of timm."""
    return next((kind for kind in KINDS if isinstance(network, kind.network)), None)

"""Hierarchical networks of timm: Swin and Swin v2, ConvNeXt and ConvNeXt v2, ResNet, DenseNet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from medtpp.backbones.base import Backbone, Layout, Stage, hash_state, other_dims
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.backbones.inflate import require_whole, sides
from medtpp.backbones.pyramid import Anatomy, Pyramid, bare, existing, pyramid_spec
from medtpp.backbones.timm_kinds import KINDS, Kind, kind_of
from medtpp.backbones.timm_names import (
    check_weights,
    create_network,
    model_module,
    objective_of,
    pretrained,
    warn_without_tag,
)
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError

log = logging.getLogger(__name__)


@BACKBONES.register("timm_pyramid")
class TimmPyramidFamily:
    """Builds `Pyramid` backbones by timm name, or around a network that exists."""

    summary: ClassVar[str] = "hierarchical networks of timm: Swin, Swin v2, ConvNeXt, ResNet, DenseNet, any by name"
    kinds: ClassVar[dict[str, frozenset[str]]] = {
        "Swin": frozenset({"dense", "masks", "attention", "linear", "flat_layers"}),
        "ConvNeXt": frozenset({"dense", "masks", "convolutions", "linear", "flat_layers"}),
        "ResNet": frozenset({"dense", "masks", "convolutions", "flat_layers"}),
    }
    examples: ClassVar[tuple[str, ...]] = (
        "swin_tiny_patch4_window7_224.ms_in22k",
        "swinv2_tiny_window8_256.ms_in1k",
        "convnext_tiny.fb_in22k",
        "convnextv2_tiny.fcmae",
        "resnet50.a1_in1k",
        "densenet121.ra_in1k",
    )

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name is a timm model of one of these kinds, with or without `timm/`."""
        module = model_module(name.removeprefix("timm/")).rpartition(".")[2]
        return any(module in kind.modules for kind in KINDS)

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Make the network, load its weights, fit it to the size of the images.

        Raises:
            ConfigError: The architecture is none of these, or cannot take this size.
            WeightsError: Weights cannot be downloaded, read or matched.
        """
        if options.dims == 3:
            raise other_dims(options.name, 2, 3)
        if options.patch_size is not None or options.channels is not None:
            raise ConfigError(
                f"backbone.patch_size and backbone.channels are for vision transformers; {options.name} keeps its own."
            )
        name = options.name.removeprefix("timm/")
        check_weights(name)
        arguments: dict[str, Any] = {}
        source, objective, state = options.weights, objective_of(name), None
        if options.weights == "random":
            objective = "unknown"
        elif options.weights == "pretrained":
            arguments, source = pretrained(name, options.revision)
        else:
            state = read_checkpoint(Path(source).expanduser())
        encoder: Any = create_network(name, {"num_classes": 0, **arguments})
        kind = kind_of(encoder)
        if kind is None:
            raise ConfigError(f"{name} is a {type(encoder).__name__}, which medtpp does not know.")
        for part in kind.head:  # `encode` does not call it, so that `full` could not train it
            setattr(encoder, part, nn.Identity())
        if state is not None:
            _fill(kind, encoder, state, source)
            warn_without_tag(name, encoder.pretrained_cfg)
        elif options.weights == "pretrained":
            objective = objective_of(f"{name}.{encoder.pretrained_cfg.get('tag')}")
        sha256 = hash_state(encoder.state_dict())
        size = _fit(encoder, image_size)
        return wrap_pyramid(kind, encoder, options.name, name, source, sha256, objective=objective, image_size=size)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone around an existing network that takes normalised images; None for another one."""
        kind = kind_of(network)
        if kind is None:
            return None
        name = type(network).__name__
        backbone = wrap_pyramid(kind, network, name, name, "in memory", "", image_size=image_size)
        backbone.take_normalised()
        return backbone


def _fill(kind: Kind, encoder: Any, state: dict[str, Tensor], source: str) -> None:
    """Put a state, of timm or of a code that timm can convert, into a network; each weight must find its place."""
    try:
        converted = kind.convert(strip_prefix(state, anchor=kind.anchor), encoder)
    except (AttributeError, KeyError) as error:  # it looks for the parts of the file in the network
        raise WeightsError(
            f"The weights in {source} do not fit this architecture: {error}. Name the one they were trained with."
        ) from error
    log.info("%s: %s", source, load_strict(encoder, converted, source))


def _fit(encoder: Any, image_size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Fit a network to the size of its images, in place; gives that size."""
    cfg: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
    embed = getattr(encoder, "patch_embed", None)
    own = tuple(embed.img_size) if embed is not None else tuple(cfg.get("input_size", (3, 224, 224))[1:])
    size = sides(image_size, 2) or own
    if embed is not None and size != own:
        require_whole(size, (_stride(encoder),) * 2)
        encoder.set_input_size(img_size=size)
    return size


def _stride(encoder: Any) -> int:
    """Pixels per step of the last map."""
    return int(encoder.feature_info[-1]["reduction"])


def wrap_pyramid(
    kind: Kind,
    encoder: Any,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    *,
    objective: str = "unknown",
    image_size: tuple[int, ...],
) -> Pyramid:
    """A timm network as a backbone, with its specification read off it.

    Args:
        kind: What it is.
        encoder: The network.
        name: It was asked for by.
        architecture: timm's name of it.
        source: Of its weights.
        sha256: Of its weights.
        objective: What it was pre-trained for.
        image_size: Of the images it will see.

    Raises:
        ConfigError: The images are not made of whole patches.
    """
    for module in encoder.modules():
        # Swin v2 adds the query and value biases inside F.linear on the bare weight, which would pass LoRA by.
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True
    anatomy, blocks = kind.anatomy(encoder), kind.blocks(encoder)
    roles = {role: existing(encoder, paths) for role, paths in kind.roles(encoder, blocks).items()}
    channels = bare(encoder, roles["embed.patch"][0]).in_channels
    cfg: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
    require_whole(image_size, (_stride(encoder),) * 2)  # before an image is run through it
    stages, widths = _measure(encoder, anatomy, blocks, (channels, *image_size))
    layout = Layout(blocks, _changeable(encoder, roles), widths)
    spec = pyramid_spec(
        encoder,
        layout,
        anatomy,
        stages,
        name=name,
        family="timm_pyramid",
        architecture=architecture,
        image_size=image_size,
        mean=cfg.get("mean", (0.5,)),
        std=cfg.get("std", (0.5,)),
        objective=objective,
        source=source,
        sha256=sha256,
    )
    return Pyramid(encoder, spec, layout, anatomy)


def _changeable(encoder: nn.Module, roles: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Roles without what methods cannot change: grouped and dilated convolutions (peft), norms with an activation."""

    def fits(role: str, path: str) -> bool:
        module = bare(encoder, path)
        if role == "conv":
            return bool(module.groups == 1 and set(module.dilation) == {1})
        return not (role.startswith("norm.") and isinstance(module, BatchNormAct2d))

    return {role: tuple(path for path in paths if fits(role, path)) for role, paths in roles.items()}


@torch.no_grad()
def _measure(
    encoder: Any, anatomy: Anatomy, blocks: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """What each stage gives, and the channels of each block, from one image of zeros (C, *sides)."""
    axis = -1 if anatomy.channels_last else 1
    widths: list[int] = []
    hooks = [
        encoder.get_submodule(path).register_forward_hook(lambda module, args, out: widths.append(out.shape[axis]))  # noqa: ARG005
        for path in blocks
    ]
    training = encoder.training
    weight = next(encoder.parameters())
    try:
        encoder.eval()
        x = weight.new_zeros(1, *shape)
        stages = []
        for paths in (anatomy.stem, *anatomy.stages):
            for path in paths:
                x = encoder.get_submodule(path)(x)
            grid = x.shape[1:-1] if anatomy.channels_last else x.shape[2:]
            stages.append(Stage(x.shape[axis], tuple(side // n for side, n in zip(shape[1:], grid, strict=True))))
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    return tuple(stages[1:]), tuple(widths)

"""Hierarchical networks of timm: Swin and Swin v2, ConvNeXt and ConvNeXt v2, ResNet, DenseNet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from medtpp.backbones.base import Backbone, Layout, Spec, Stage, hash_state, per_channel
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.backbones.inflate import require_whole, sides
from medtpp.backbones.pyramid import Anatomy, Pyramid, bare, capabilities_of, existing
from medtpp.backbones.timm_kinds import KINDS, Kind, kind_of
from medtpp.backbones.timm_names import (
    check_weights,
    create_network,
    model_module,
    objective_of,
    repository,
)
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError

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
        refuse_volumes(options)
        name = options.name.removeprefix("timm/")
        check_weights(name)
        arguments: dict[str, Any] = {"num_classes": 0}
        source, objective = f"timm:{name}", objective_of(name)
        if options.weights == "random":
            source, objective = "random", "unknown"
        elif options.weights != "pretrained":
            source = options.weights
        else:
            arguments["pretrained"] = True
            if options.revision:
                source = f"{source}@{options.revision}"
                arguments["pretrained_cfg_overlay"] = {"hf_hub_id": repository(name, options.revision)}
        encoder = create_network(name, arguments)
        kind = strip_head(encoder, name)
        if source == options.weights and source != "random":
            state = strip_prefix(read_checkpoint(Path(source).expanduser()), anchor=kind.anchor)
            log.info("%s: %s", source, load_strict(encoder, kind.convert(state, encoder), source))
        sha256 = hash_state(encoder.state_dict())
        size = fit_pyramid(encoder, image_size)
        return wrap_pyramid(encoder, options.name, name, source, sha256, objective=objective, image_size=size)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone around an existing network that takes normalised images; None for another one."""
        if kind_of(network) is None:
            return None
        name = type(network).__name__
        backbone = wrap_pyramid(network, name, name, "in memory", "", image_size=image_size)
        backbone.take_normalised()
        return backbone


def refuse_volumes(options: BackboneOptions) -> None:
    """Raise ConfigError where a network of images is asked to encode volumes, or to take other patches."""
    if options.dims == 3:
        raise ConfigError(
            f"{options.name} encodes 2D images alone, and backbone.dims is 3. medtpp_vit_tiny, folders of "
            "`medtpp pretrain`, timm's vision transformers and MONAI's networks encode volumes."
        )
    if options.patch_size is not None or options.channels is not None:
        raise ConfigError(
            f"backbone.patch_size and backbone.channels are for vision transformers; {options.name} keeps its own."
        )


def strip_head(encoder: Any, name: str) -> Kind:
    """Take away what pools and classifies, in place: `encode` does not call it, so that `full` could not train it.

    Raises:
        ConfigError: The network is of none of these kinds.
    """
    kind = kind_of(encoder)
    if kind is None:
        raise ConfigError(
            f"{name} is a {type(encoder).__name__}, which medtpp does not know. See `medtpp list backbones`."
        )
    for part in kind.head:
        setattr(encoder, part, nn.Identity())
    return kind


def fit_pyramid(encoder: Any, image_size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Fit a network to the size of its images, in place; gives that size."""
    cfg: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
    embed = getattr(encoder, "patch_embed", None)
    own = tuple(embed.img_size) if embed is not None else tuple(cfg.get("input_size", (3, 224, 224))[1:])
    size = sides(image_size, 2) or own
    if embed is not None and size != own:
        require_whole(size, (stride_of(encoder),) * 2)
        encoder.set_input_size(img_size=size)
    return size


def stride_of(encoder: Any) -> int:
    """Pixels per step of the last map."""
    return int(encoder.feature_info[-1]["reduction"])


def wrap_pyramid(
    encoder: Any,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    *,
    family: str = "timm_pyramid",
    objective: str = "unknown",
    image_size: tuple[int, ...],
) -> Pyramid:
    """A timm network as a backbone, with its specification read off it.

    Args:
        encoder: The network.
        name: It was asked for by.
        architecture: timm's name of it.
        source: Of its weights.
        sha256: Of its weights.
        family: The registered family.
        objective: What it was pre-trained for.
        image_size: Of the images it will see.

    Raises:
        ConfigError: The network is of none of these kinds, or the images are not made of whole patches.
    """
    kind = kind_of(encoder)
    if kind is None:
        raise ConfigError(f"{architecture} is a {type(encoder).__name__}, which medtpp does not know.")
    for module in encoder.modules():
        # Swin v2 adds the query and value biases inside F.linear on the bare weight, which would pass LoRA by.
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True
    anatomy, blocks = kind.anatomy(encoder), kind.blocks(encoder)
    roles = {role: existing(encoder, paths) for role, paths in kind.roles(encoder, blocks).items()}
    first = bare(encoder, roles["embed.patch"][0])
    channels = first.in_channels
    cfg: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
    stride = stride_of(encoder)
    require_whole(image_size, (stride, stride))
    pyramid, widths = _measure(encoder, anatomy, blocks, (channels, *image_size))
    layout = Layout(blocks, _changeable(encoder, roles), widths)
    spec = Spec(
        name=name,
        family=family,
        architecture=architecture,
        dims=2,
        channels=channels,
        mean=per_channel(cfg.get("mean", (0.5,)), channels),
        std=per_channel(cfg.get("std", (0.5,)), channels),
        image_size=image_size,
        patch=(stride, stride),
        width=pyramid[-1].width,
        depth=len(pyramid),
        prefix=0,
        pooling="mean",
        objective=objective,
        capabilities=capabilities_of(encoder, layout),
        source=source,
        sha256=sha256,
        pyramid=pyramid,
        mask_width=first.out_channels if anatomy.cuts_patches else channels,
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

"""Encoders of MONAI's SwinUNETR, SegResNet and ViT, of volumes or images, with weights from a file.

Papers: Hatamizadeh et al., arXiv 2201.01266; Myronenko, arXiv 1810.11654. The file may hold the whole network, and
tells the encoder's shape. It does not tell by which version of MONAI it was trained, and SwinUNETR became another
network with version 1.5 (see `monai_kinds`): its name says so.

MONAI's loaders give the axes of volumes as (x, y, z), which are (width, height, depth) here. Networks of files get them
so; those in memory take volumes as they come.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from medtpp.backbones.base import Backbone, Inflation, Layout, Stage, hash_state
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.backbones.inflate import sides, take_channels
from medtpp.backbones.monai_kinds import KINDS, Kind
from medtpp.backbones.monai_vit import build_vit, share_vit
from medtpp.backbones.pyramid import Pyramid, existing, pyramid_spec
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)

PREFIX = "monai:"
_NAME = re.compile(rf"({'|'.join(sorted(map(re.escape, KINDS), key=len, reverse=True))}|vit)(?:_(\d+))?")
SIDES = {2: 224, 3: 96}  # of images and volumes where nothing says other ones


@BACKBONES.register("monai")
class MonaiFamily:
    """Builds `Pyramid` backbones of SwinUNETR and SegResNet, and `TimmViT` ones of ViT."""

    summary: ClassVar[str] = "encoders of MONAI's SwinUNETR, SegResNet and ViT, from a file (weights: FILE)"
    kinds: ClassVar[dict[str, frozenset[str]]] = {"SegResNet": frozenset({"dense", "masks", "convolutions"})}
    own_dims: ClassVar[int] = 3
    examples: ClassVar[tuple[str, ...]] = (
        "monai:swin_unetr",
        "monai:swin_unetr_since1.5",
        "monai:segresnet",
        "monai:vit",
    )

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name begins as this family's do (`build` tells whether it fits)."""
        return name.startswith(PREFIX)

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Make the encoder, load its weights, fit it to the size and channels of the images.

        Raises:
            ConfigError: There is no such network, or it does not take this size.
            WeightsError: No file is given, or it is of another network.
        """
        match = _NAME.fullmatch(options.name.removeprefix(PREFIX))
        if match is None:
            raise ConfigError(
                f"There is no network {options.name}. Known: {', '.join(PREFIX + name for name in (*KINDS, 'vit'))}. "
                "A width may follow, as in monai:swin_unetr_24."
            )
        if options.weights == "pretrained":
            raise WeightsError(
                f"The weights of {options.name} are not on a hub that medtpp knows: download a file and give --set "
                "backbone.weights=FILE (docs/backbones.md names some)."
            )
        state = None if options.weights == "random" else read_checkpoint(Path(options.weights).expanduser())
        width = int(match[2]) if match[2] else None
        if match[1] == "vit":
            return build_vit(options, image_size, width, state)
        return _build_pyramid(options, image_size, match[1], width, state)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone of the modules of a network that exists, which takes images as it is; None for another one.

        Raises:
            ConfigError: The images are not made of whole patches.
        """
        names = {kind.__name__ for kind in type(network).__mro__ if kind.__module__.startswith("monai.networks.nets.")}
        if "ViT" in names:
            return share_vit(network, image_size)
        kind = next((kind for kind in KINDS.values() if kind.network in names), None)
        if kind is None:
            return None
        name = type(network).__name__
        return wrap_monai(kind, kind.encoder(network), name, name, "in memory", "", image_size=image_size)


def _build_pyramid(
    options: BackboneOptions,
    image_size: int | tuple[int, ...] | None,
    name: str,
    width: int | None,
    state: dict[str, Tensor] | None,
) -> Pyramid:
    if options.patch_size is not None:
        raise ConfigError(f"backbone.patch_size is for vision transformers; {options.name} keeps its own.")
    kind, dims = KINDS[name], 2 if options.dims == 2 else 3
    wanted = kind.version | ({kind.width: width} if width else {})
    if state is None:
        arguments = kind.default(dims) | wanted | {kind.channels: options.channels or 1}
    else:
        state = kind.rename(strip_prefix(state, anchor=kind.anchor))
        arguments = _read(kind, state, options, wanted)
    try:
        with Seeds(0).scope("backbone", options.name):
            encoder = kind.make(arguments)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"MONAI cannot make {options.name}: {error}") from error
    if state is not None:
        log.info("%s: %s", options.weights, load_strict(encoder, state, options.weights))
    sha256 = hash_state(encoder.state_dict())
    inflation = take_channels(
        encoder, kind.anchor.removesuffix(".weight"), options.channels or arguments[kind.channels]
    )
    size = sides(image_size, arguments["spatial_dims"]) or (SIDES[dims],) * dims
    architecture = f"{name}_{arguments[kind.width]}"
    return wrap_monai(
        kind,
        encoder,
        options.name,
        architecture,
        options.weights,
        sha256,
        image_size=size,
        inflation=inflation,
        reversed_axes=dims == 3,
    )


def _read(kind: Kind, state: Mapping[str, Tensor], options: BackboneOptions, wanted: Mapping[str, Any]) -> Any:
    """Arguments of the network in a state.

    Raises:
        WeightsError: It is of another kind of network.
        ConfigError: It is not the one that the options name.
    """
    try:
        arguments = kind.read(state)
    except KeyError as error:
        raise WeightsError(f"{options.weights} holds no encoder for {options.name}: it lacks {error}.") from error
    differing = [f"{key}: {arguments[key]} in the file, {value} by the name" for key, value in wanted.items()
                 if arguments[key] != value]  # fmt: skip
    if options.dims not in ("auto", arguments["spatial_dims"]):
        differing.append(f"dimensions: {arguments['spatial_dims']} in the file, {options.dims} by backbone.dims")
    if differing:
        raise ConfigError(f"{options.weights} is not {options.name}.", differing)
    return arguments


def wrap_monai(
    kind: Kind,
    encoder: nn.Module,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    *,
    image_size: tuple[int, ...],
    inflation: Inflation | None = None,
    reversed_axes: bool = False,
) -> Pyramid:
    """An encoder as a backbone, with its specification read off it.

    Args:
        kind: What it is.
        encoder: As `kind.make` gives it.
        name: It was asked for by.
        architecture: Kind and width.
        source: Of its weights.
        sha256: Of its weights.
        image_size: Of the images it will see.
        inflation: What is new in it.
        reversed_axes: Whether it has the axes of volumes as (x, y, z).

    Raises:
        ConfigError: The images have other dimensions, or are not made of whole patches.
    """
    anatomy, blocks = replace(kind.anatomy(encoder), reversed=reversed_axes), kind.blocks(encoder)
    stages, widths = kind.stages(encoder)
    if reversed_axes:
        stages = tuple(Stage(stage.width, stage.stride[::-1]) for stage in stages)
    roles = {role: existing(encoder, paths) for role, paths in kind.roles(encoder, blocks).items()}
    layout = Layout(blocks, roles, widths)
    spec = pyramid_spec(
        encoder,
        layout,
        anatomy,
        stages,
        name=name,
        family="monai",
        architecture=architecture,
        image_size=image_size,
        mean=(0.0,),
        std=(1.0,),
        objective="unknown",
        source=source,
        sha256=sha256,
    )
    return Pyramid(encoder, spec, layout, anatomy, inflation)

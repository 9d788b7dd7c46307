"""Backbones, one file per family. `load` finds the family that knows a name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from medtpp.backbones.attention import training_attention
from medtpp.backbones.base import (
    Backbone,
    Branch,
    Features,
    Inflation,
    Layout,
    Spec,
    Stage,
    describe_lacking,
    gather_tokens,
    hash_state,
    match_channels,
    other_dims,
)
from medtpp.backbones.plain import check_float32, tensors_in, wrap_plain
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Backbone",
    "Branch",
    "Features",
    "Inflation",
    "Layout",
    "Spec",
    "Stage",
    "check_float32",
    "describe_lacking",
    "find",
    "gather_tokens",
    "hash_state",
    "load",
    "match_channels",
    "own_dims",
    "tensors_in",
    "training_attention",
]


_HUB = ("hf-hub:", "hf_hub:")


def load(
    name: str | BackboneOptions, *, weights: str = "pretrained", image_size: int | tuple[int, ...] | None = None
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: A name that a family recognises (`medtpp list backbones`), a folder made by `medtpp pretrain`, or options.
        weights: "pretrained", "random" or a local file; taken from the options where those are given.
        image_size: Side of the images in pixels, or all sides, (H, W) or (D, H, W); positions are resampled where it
            is not the backbone's own.

    Raises:
        ConfigError: No family knows the name, the size does not fit, or the family encodes no volumes.
        WeightsError: Weights cannot be found, read or matched.
    """
    options = name if isinstance(name, BackboneOptions) else BackboneOptions(name=name, weights=weights)
    if options.dims == "auto":
        lengths = {len(sides) for sides in (options.patch_size, image_size) if isinstance(sides, tuple)}
        dims = (3 if 3 in lengths else 2) if lengths else own_dims(options.name)
        options = options.model_copy(update={"dims": dims})
    if options.revision and options.weights != "pretrained" and not options.name.startswith(_HUB):
        raise ConfigError(f"backbone.revision chooses weights of the hub, but backbone.weights is {options.weights}.")
    for family in BACKBONES.values():
        if family.recognises(options.name):
            backbone: Backbone = family.build(options, image_size)
            if backbone.spec.dims != options.dims:
                raise other_dims(options.name, backbone.spec.dims, int(options.dims))
            backbone.options = options
            return backbone
    examples = [example for family in BACKBONES.values() for example in family.examples]
    near = difflib.get_close_matches(options.name, examples, n=3)
    raise ConfigError(
        f"No backbone is called {options.name!r}, and it is no folder with a backbone.json. "
        f"Known are, for example: {', '.join(near or examples)}. See `medtpp list backbones`."
    )


def untrained(options: BackboneOptions) -> BackboneOptions:
    """The same network with random weights, the same on every load.

    Where a file of weights decides how large the network is, random ones may make another: compare the shapes.
    """
    known = options.name.startswith(_HUB)  # a revision there is of the network's description, too
    return options.model_copy(update={"weights": "random", **({} if known else {"revision": None})})


def own_dims(name: str) -> int:
    """3 for networks of volumes; 2 for those of images, which may be made to encode volumes, in patches of any size."""
    return next((getattr(family, "own_dims", 2) for family in BACKBONES.values() if family.recognises(name)), 2)


def kinds() -> dict[str, frozenset[str]]:
    """What kinds of backbones there are, by a short name, and what each kind has, of `CAPABILITIES`.

    ResNet stands for ConvNets without linear layers, DenseNet too, and SegResNet for those of volumes.
    """
    found: dict[str, frozenset[str]] = {}
    for family in BACKBONES.values():
        found |= getattr(family, "kinds", {})
    return {name: found[name] for name in sorted(found, key=lambda name: (-len(found[name]), name))}


def find(model: nn.Module, image_size: tuple[int, ...], *, channels: int = 3, features: str | None = None) -> Backbone:
    """The backbone inside a model of one's own: the module that a family knows, or the model as it is.

    It is wrapped, not copied, and takes normalised images.

    Args:
        model: Any network, such as a `peft.PeftModel` of a timm ViT.
        image_size: Spatial size of the images it will see.
        channels: Of these images, for a model in which nothing is known.
        features: Name of the module of the model whose output is taken, whatever is known in it: its path, or the end
            of its path; "" for the output of the model itself.

    Raises:
        ConfigError: The model holds several backbones, or images cannot be run through it.
    """
    if features is not None:
        return wrap_plain(model, image_size, channels, features)
    for family in BACKBONES.values():
        found = [backbone for module in model.modules() if (backbone := family.around(module, image_size)) is not None]
        if len(found) > 1:
            raise ConfigError(
                f"The model holds {len(found)} backbones. Pass the one to pre-train, or name it by features=NAME."
            )
        if found:
            wrapped: Backbone = found[0]
            return wrapped
    return wrap_plain(model, image_size, channels)

"""Networks of timm by name: which there are, what their tags say, how they are made and downloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
from torch import nn

from medtpp.backbones.checkpoints import hub_errors
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)
# What words in names tell, the first that is found: weights that were tuned to labels in the end are of these.
_OBJECTIVES = (
    ("supervised", ("_ft_in",)),
    ("pixels", ("mae",)),
    ("features", ("features", "dino", "ibot", "moco", "jepa", "byol", "simclr", "swav", "eupe", "mim_")),
    ("features", ("mahmoodlab/uni", "virchow", "phikon", "gigapath", "h-optimus", "hibou", "kaiko", "lunit")),
    ("language", ("clip", "siglip", "mahmoodlab/conch")),
    ("supervised", ("in1k", "in12k", "in21k", "in22k")),
)


def create_network(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model`, with errors that a user can read."""
    with readable(name), Seeds(0).scope("backbone", name):  # random weights are the same on every load
        network: nn.Module = timm.create_model(name, **arguments)
    return network


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn the errors of timm and of the hub into ones that say what to do."""
    try:
        with hub_errors(name, "give a local file: --set backbone.weights=FILE."):
            yield
    except KeyError as error:
        raise ConfigError(f"{name} is no timm model: its config.json has no {error}.") from error
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot make {name}: {error}") from error


def model_module(name: str) -> str:
    """The timm module that defines a model; empty for names that timm does not know, or knows as old ones."""
    plain = name.split(".")[0]
    module = timm.models.model_entrypoint(plain).__module__ if timm.is_model(plain) else ""
    return "" if module == "timm.models._registry" else module


def check_weights(name: str) -> None:
    """Raise ConfigError for a timm name with an unknown tag, before anything is downloaded."""
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ConfigError(f"timm has no weights {name}. It has: {', '.join(known)}.") from error


def pretrained(name: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """Timm's arguments for a name's own weights, of the hub's main branch or of a revision, and where they come from.

    Raises:
        ConfigError: The weights are not on the hub, so that there is no revision of them.
    """
    if not revision:
        return {"pretrained": True}, f"timm:{name}"
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ConfigError(f"The weights of {name} are not on the hub, so there is no revision of them.")
    overlay = {"hf_hub_id": f"{cfg.hf_hub_id}@{revision}"}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}, f"timm:{name}@{revision}"


def warn_without_tag(name: str, cfg: Any) -> None:
    """Say how images are normalised where a file brings the weights, and the name has no tag that would tell."""
    if "." not in name:
        log.warning(
            "%s has no tag, so images are normalised as by timm's default for it, mean %s and std %s. Name a tag "
            "whose normalisation the file shares, such as vit_large_patch16_224.mae.",
            *(name, cfg.get("mean"), cfg.get("std")),
        )


def objective_of(name: str) -> str:
    """What a network was pre-trained for, as in `Spec`, by its name and tag, its class, or its pretext task."""
    name = name.lower()
    for objective, words in _OBJECTIVES:
        if any(word in name for word in words):
            return objective
    return "unknown"

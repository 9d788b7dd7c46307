"""Networks of timm by name: which there are, what their tags say, how they are made and downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn

from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds


def create_network(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model`, with errors that a user can read."""
    with readable(name), Seeds(0).scope("backbone", name):  # random weights are the same on every load
        network: nn.Module = timm.create_model(name, **arguments)
    return network


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn the errors of timm and of the hub into ones that say what to do."""
    local = "Without a network, give a local file: --set backbone.weights=FILE."
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"{name} asks for a licence to be accepted: do so on its page at huggingface.co, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(f"There is no hub repository {name}, or it is private (`hf auth login`).") from error
    except OSError as error:
        raise WeightsError(
            f"The weights of {name} could not be downloaded ({type(error).__name__}). {local}"
        ) from error
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


def repository(name: str, revision: str) -> str:
    """The hub repository of a timm name at a revision."""
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ConfigError(f"The weights of {name} are not on the hub, so there is no revision of them.")
    return f"{cfg.hf_hub_id}@{revision}"


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or deviation for each channel; their mean where there is another number of them."""
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * channels


def objective_of(tag: str) -> str:
    """What a network was pre-trained for, by its name and tag."""
    tag = tag.lower()
    if "mae" in tag:
        return "pixels"
    if any(word in tag for word in ("dino", "moco", "jepa")):
        return "features"
    return "supervised" if any(word in tag for word in ("in1k", "in21k", "in22k")) else "unknown"

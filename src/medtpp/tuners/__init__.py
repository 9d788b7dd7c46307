"""Tuners (PEFT methods), one file per family."""

from __future__ import annotations

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners.base import TunedBackbone, Tuner

__all__ = ["TunedBackbone", "Tuner", "attach"]


def attach(backbone: Backbone, tuner: str | MethodOptions = "lora", *, seed: int | Seeds = 0) -> TunedBackbone:
    """Attach a tuner by name or options. The backbone is taken over and changed in place.

    Raises:
        ConfigError: There is no such tuner, it does not fit the backbone, or the backbone has one already.
    """
    if backbone.taken:
        raise ConfigError("This backbone has a tuner already. Load it again to attach another one.")
    options = TUNERS.get(tuner).Options() if isinstance(tuner, str) else tuner
    method: Tuner[MethodOptions] = TUNERS.get(options.name)(options)
    tuned = method.attach(backbone, seed if isinstance(seed, Seeds) else Seeds(seed))
    tuned.tuner = options
    backbone.taken = True
    return tuned

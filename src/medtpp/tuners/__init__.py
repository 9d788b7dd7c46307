"""Tuners (PEFT methods), one file per family."""

from __future__ import annotations

from torch import Tensor

from medtpp.backbones import Backbone, describe_lacking
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners.base import TunedBackbone, Tuner

__all__ = ["TunedBackbone", "Tuner", "attach"]


def attach(
    backbone: Backbone,
    tuner: str | MethodOptions = "lora",
    *,
    seed: int | Seeds = 0,
    images: Tensor | None = None,
    loading: bool = False,
) -> TunedBackbone:
    """Attach a tuner by name or options. The backbone is taken over and changed in place.

    Args:
        backbone: A plain backbone.
        tuner: Name or options.
        seed: Decides the initialisation.
        images: (n, C, *spatial) in [0, 1], for starts that are made from images.
        loading: The parameters are going to be loaded, so that no images are needed.

    Raises:
        ConfigError: There is no such tuner, it does not fit the backbone, the backbone has one already, or images are
            missing.
    """
    if backbone.taken:
        raise ConfigError("This backbone has a tuner already. Load it again to attach another one.")
    options = TUNERS.get(tuner).Options() if isinstance(tuner, str) else tuner
    method: Tuner[MethodOptions] = TUNERS.get(options.name)(options)
    lacking = describe_lacking(method.needs, backbone.spec.capabilities)
    if lacking:
        raise ConfigError(f"The tuner {options.name} does not fit {backbone.spec.name}: it needs {lacking}.")
    if method.needs_images and images is None and not loading:
        raise ConfigError("This tuner's start is made from images: give some, attach(backbone, tuner, images=images).")
    seeds = seed if isinstance(seed, Seeds) else Seeds(seed)
    tuned = method.attach(backbone, seeds, images)
    if method.has_targets and not tuned.targets:
        raise ConfigError(f"The tuner {options.name} finds nothing to train in {backbone.spec.name}.")
    tuned.tuner = options
    tuned.start_seed = seeds.root
    backbone.taken = True
    return tuned

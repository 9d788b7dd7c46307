"""Target Parameter Pre-training for parameter-efficient fine-tuning on medical images.

    import medtpp

    model = medtpp.attach(medtpp.load("medtpp_vit_tiny"), "lora")
    record = medtpp.tpp(model, images)                  # (N, C, S, S) in [0, 1], no labels
    task = medtpp.finetune(model, some_images, labels)  # a few labels
    medtpp.save("adapter", model, task, tpp=record)
    table = medtpp.predict(medtpp.load_adapter("adapter"), "new_images/")

Names are imported when they are first used, so that `import medtpp` costs nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medtpp.adapter import load_adapter as load_adapter
    from medtpp.api import finetune as finetune
    from medtpp.api import predict as predict
    from medtpp.api import save as save
    from medtpp.api import tpp as tpp
    from medtpp.backbones import load as load
    from medtpp.tuners import attach as attach
    from medtpp.workflow.experiment import load_experiment as load_experiment
    from medtpp.workflow.run import run as run

_HOMES = {
    "attach": "medtpp.tuners",
    "finetune": "medtpp.api",
    "load": "medtpp.backbones",
    "load_adapter": "medtpp.adapter",
    "load_experiment": "medtpp.workflow.experiment",
    "predict": "medtpp.api",
    "run": "medtpp.workflow.run",
    "save": "medtpp.api",
    "tpp": "medtpp.api",
}
__all__ = [
    "__version__",
    "attach",
    "finetune",
    "load",
    "load_adapter",
    "load_experiment",
    "predict",
    "run",
    "save",
    "tpp",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("medtpp")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'medtpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

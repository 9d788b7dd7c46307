"""What stages have in common: their data, their start on one device or several, values that are `auto`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec
from medtpp.config import Experiment, StageOptions
from medtpp.data.augment import Augmenter, Use
from medtpp.data.batches import BatchStream, to_unit
from medtpp.data.cache import ImageCache
from medtpp.data.case import Case
from medtpp.data.patches import PatchStream
from medtpp.data.preprocess import Preprocessing
from medtpp.data.store import VolumeStore
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError, MedtppError
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds, name_key
from medtpp.tasks.base import Task
from medtpp.training.dense import DenseReconstruction
from medtpp.training.device import close_loggers
from medtpp.training.loop import Group, Hooks, Schedule, Stream, fit
from medtpp.training.resume import Record
from medtpp.tuners import TunedBackbone

VOXELS = 1 << 20  # in a batch of masks: 16 images of 256 x 256
MASKED = 16  # images in it, at most
T = TypeVar("T")
O = TypeVar("O", bound=StageOptions)  # noqa: E741  (options)


@dataclass(frozen=True)
class StageData:
    """Images that a stage trains on. It pickles as paths.

    Attributes:
        store: Where the images are; of a `VolumeStore`, the network sees patches.
        cases: In this order.
        targets: (n, ...) for supervised stages.
        masks: Whether the targets are the patches of the masks.
    """

    store: ImageCache | VolumeStore
    cases: tuple[Case, ...]
    targets: Tensor | None = None
    masks: bool = False

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(n,) rows of the store."""
        return np.array([self.store.row[case.id] for case in self.cases], dtype=np.int64)

    def stream(self, batch_size: int, seeds: Seeds, fabric: Fabric) -> BatchStream | PatchStream:
        """Batches for this process."""
        keys = np.array([name_key(case.id) for case in self.cases], dtype=np.int64)
        world = {"rank": fabric.global_rank, "world": fabric.world_size, "pin": fabric.device.type == "cuda"}
        store, targets = self.store, self.targets
        if isinstance(store, ImageCache):
            return BatchStream(store.images, self.rows, keys, targets, batch_size, seeds, **world)
        return PatchStream(store, self.rows, keys, targets, batch_size, seeds, **world, masks=self.masks)

    def images(self, limit: int) -> Tensor:
        """(min(n, limit), C, *patch) float in [0, 1]: cases evenly from the whole, of each the middle."""
        chosen = np.linspace(0, len(self) - 1, min(len(self), limit)).round().astype(int)
        rows = self.rows[chosen]
        if isinstance(self.store, ImageCache):
            return to_unit(torch.from_numpy(self.store.images[rows]))
        return to_unit(torch.from_numpy(np.stack([self.store.centre(int(row)) for row in rows])))


@dataclass
class StageResult:
    """What a stage tells: written to `complete.json` as plain values.

    Attributes:
        steps, batch_size, learning_rate: As resolved.
        record: Of the loop.
        figures: What is worth comparing between runs.
        parameters: Numbers of parameters: "backbone" (its own), "target", and "head" or "pretext".
    """

    steps: int
    batch_size: int
    learning_rate: float
    record: Record
    figures: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        record = self.record
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "seconds": round(record.seconds, 2),
            "images_per_second": round(record.images_per_second, 1),
            "waiting": round(record.waiting, 4),
            "peak_memory_mib": round(record.peak_memory, 1),
            "last_loss": record.rows[-1]["loss"] if record.rows else None,
            "best": None if record.best is None else {"score": record.best[0], "step": record.best[1]},
            **self.figures,
            **{f"{name}_parameters": number for name, number in self.parameters.items()},
        }


def count_parameters(backbone: TunedBackbone, **others: nn.Module) -> dict[str, int]:
    """How many numbers are in the backbone's own weights, in what the tuner trains, and in other modules by name."""
    return {
        "backbone": sum(weights.numel() for weights in backbone.source_state().values()),
        "target": sum(parameter.numel() for parameter in [*backbone.targets.values(), *backbone.embed.values()]),
        **{name: sum(parameter.numel() for parameter in module.parameters()) for name, module in others.items()},
    }


class PretextModule(nn.Module):
    """What the loop trains in pretext stages: images (B, C, *spatial) to the pretext loss.

    With `dense`, its loss is added.
    """

    def __init__(
        self,
        backbone: Backbone,
        pretext: Pretext,
        augmenter: Augmenter | None = None,
        dense: DenseReconstruction | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pretext = pretext
        self.augmenter = augmenter
        self.dense = dense

    def hooks(self) -> Hooks:
        """What the pretext task needs of the loop."""

        def after_step(step: int, total: int) -> None:
            self.pretext.after_step(self.backbone, step, total)

        def buffers() -> dict[str, Tensor]:
            state = self.pretext.state_dict(keep_vars=True)
            return {f"pretext.{name}": value for name, value in state.items() if not isinstance(value, nn.Parameter)}

        return Hooks(after_step, buffers, divisible=not self.pretext.couples_images)

    def forward(self, images: Tensor, targets: Tensor | None, visits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        """The loss, and values to log."""
        draws = Draws(visits)
        with torch.autocast(images.device.type, enabled=False):
            images = to_unit(images)
            if self.augmenter is not None:
                images = self.augmenter(images, draws, geometric_only=True)
        loss, logs = self.pretext.loss(self.backbone, images, draws)
        if self.dense is not None:
            restored = self.dense.loss(self.backbone, images, draws)
            loss, logs = loss + restored, {**logs, "dense_loss": restored.detach()}
        return with_penalty(loss, self.backbone), logs


def warm_up_heads(
    fabric: Fabric,
    module: nn.Module,
    heads: Sequence[Group],
    targets: Sequence[Group],
    stream: Stream,
    steps: int,
    hooks: Hooks | None = None,
) -> float:
    """Train new heads alone, so that their first gradients do not move the target parameters at random.

    Returns:
        Seconds that it took.
    """
    waiting = [parameter for group in targets for parameter in group.parameters.values()]
    for parameter in waiting:
        parameter.requires_grad_(False)
    try:
        return fit(fabric, module, heads, stream, Schedule(steps), title="head", hooks=hooks or Hooks()).seconds
    finally:
        for parameter in waiting:
            parameter.requires_grad_(True)


def with_penalty(loss: Tensor, backbone: Backbone, task: Task | None = None) -> Tensor:
    """The loss with what the tuner and the task add to it."""
    for part in (backbone, task):
        penalty = part.penalty() if isinstance(part, TunedBackbone | Task) else None
        loss = loss if penalty is None else loss + penalty
    return loss


def launch(fabric: Fabric, train: Callable[..., T], inputs: Any, folder: Path) -> T:
    """Run `train(fabric, inputs, folder)` here, or on one process per device; gives the first one's result."""
    if fabric.strategy.__class__.__name__ != "SingleDeviceStrategy":
        # Bound, not passed on: the launcher searches its arguments for modules, and refuses frozen dataclasses.
        result: T | MedtppError = fabric.launch(functools.partial(_told, train=train, inputs=inputs, folder=folder))
        if isinstance(result, MedtppError):
            raise result
        return result
    fabric.launch()
    try:
        done = train(fabric, inputs, folder)
    except BaseException:
        close_loggers(fabric, "failed")
        raise
    close_loggers(fabric, "success")
    return done


def _told(fabric: Fabric, train: Callable[..., T], inputs: Any, folder: Path) -> T | MedtppError:
    # An error that leaves a spawned process comes back as text; the user's message is to come back as it is.
    try:
        done: T | MedtppError = train(fabric, inputs, folder)
    except MedtppError as error:
        done = error
    close_loggers(fabric, "failed" if isinstance(done, MedtppError) else "success")
    return done


def dense_batch(spec: Spec) -> int:
    """Images in a batch that goes through a decoder at full resolution, whose maps are what takes memory and time."""
    return min(MASKED, max(2, VOXELS // math.prod(spec.image_size)))


def resolve_stage(
    options: O,
    *,
    passes: float,
    batch_size: int,
    cases: int,
    limits: tuple[int, int],
    learning_rate: float,
    devices: int = 1,
) -> O:
    """Answer the `auto` values that stages have in common; a second call changes nothing.

    Args:
        options: As given.
        passes: Passes over the data that `steps: auto` stands for.
        batch_size: What `batch_size: auto` stands for; at most the number of cases.
        cases: How many there are.
        limits: Least and most steps of `auto`.
        learning_rate: What `learning_rate: auto` stands for.
        devices: The batch size is a multiple of them.

    Raises:
        ConfigError: A given batch size is none.
    """
    batch = (
        -(-min(batch_size, max(cases, 2)) // devices) * devices if options.batch_size == "auto" else options.batch_size
    )
    if batch % devices:
        raise ConfigError(f"batch_size={batch} does not divide among hardware.devices={devices}. Use a multiple.")
    low, high = limits
    steps = min(high, max(low, round(passes * cases / batch))) if options.steps == "auto" else options.steps
    answers = {
        "batch_size": batch,
        "steps": steps,
        "learning_rate": learning_rate if options.learning_rate == "auto" else options.learning_rate,
        "checkpoint_every": max(1, steps // 10) if options.checkpoint_every == "auto" else options.checkpoint_every,
    }
    return options.model_copy(update=answers)


def augmenter_of(experiment: Experiment, preprocessing: Preprocessing | VolumePreprocessing) -> Augmenter:
    """The augmentation of an experiment, which both of its stages use."""
    data, masks = experiment.data, experiment.task.name == "segmentation"
    spacing = preprocessing.spacing if isinstance(preprocessing, VolumePreprocessing) else None
    use: Use = "segmentation" if masks else "classification" if spacing is None else "classification in mm"
    return Augmenter(data.augment, data.modality, use, spacing)


def tuner_groups(backbone: TunedBackbone, rate: float, weight_decay: float) -> list[Group]:
    """What a tuner trains, "tuner", and an embedding that was made for volumes, "embed"; no empty group."""
    groups = target_groups(backbone.targets, backbone.relative_rates, rate, weight_decay)
    return [*groups, Group("embed", backbone.embed, rate, weight_decay)] if backbone.embed else groups


def target_groups(
    targets: Mapping[str, nn.Parameter], relative_rates: Mapping[str, float], rate: float, weight_decay: float
) -> list[Group]:
    """A group of target parameters for each learning rate: "tuner", "tuner_2" and so on."""
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, parameter in targets.items():
        groups.setdefault(relative_rates.get(name, 1.0), {})[name] = parameter
    return [
        Group("tuner" if number == 1 else f"tuner_{number}", parameters, rate * share, weight_decay)
        for number, (share, parameters) in enumerate(groups.items(), start=1)
    ]


def schedule_of(options: StageOptions, validate_every: int = 0) -> Schedule:
    """The loop's schedule for resolved options."""
    return Schedule(
        number(options.steps),
        options.warmup,
        options.accumulate,
        options.clip,
        number(options.checkpoint_every),
        validate_every,
    )


def number(value: int | str) -> int:
    """A resolved whole number."""
    if isinstance(value, str):
        raise TypeError(f"{value!r} was not resolved")
    return value

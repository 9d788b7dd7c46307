"""What tuners cost on one network: parameters, and the speed and memory of a step of either stage.

Each measurement is made in a process of its own, so that none finds memory or caches that another one left, and one
that fails stops no other. All repetitions go through all tuners, there and back, so that other load meets all alike.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medtpp import backbones, tuners
from medtpp.backbones import Backbone
from medtpp.config import (
    TASKS,
    TUNERS,
    AugmentOptions,
    AutoPretext,
    HardwareOptions,
    LoggingOptions,
    MethodOptions,
)
from medtpp.data.augment import Augmenter
from medtpp.data.batches import BatchStream
from medtpp.errors import MedtppError
from medtpp.seeds import Seeds
from medtpp.tasks.base import Task
from medtpp.training.device import choose_accelerator, choose_precision, describe_machine, make_fabric
from medtpp.training.finetune import SupervisedModule
from medtpp.training.loop import Group, Hooks, Schedule, Stream, fit
from medtpp.training.memory import PeakMemory, give_back_at_once
from medtpp.training.resume import Record
from medtpp.training.stage import PretextModule, count_parameters, tuner_groups
from medtpp.training.tpp import make_pretext, resolve_pretext
from medtpp.workflow.pool import end_with_parent, process_context

SKIPPED = 2  # steps before the clock starts: first allocations, and the checks that `fit` makes in them
TIMED = 3
PACKAGES = ("medtpp", "torch", "timm", "peft", "lightning")
RATE = 1e-3
SEEDS = Seeds(0)

Stage = Literal["tpp", "finetune"]
STAGES: tuple[Stage, ...] = ("tpp", "finetune")


@dataclass(frozen=True)
class Setup:
    """What all measurements share.

    Attributes:
        backbone: A name that a family of backbones knows; its weights are random, on which no figure depends.
        image_size: Side in pixels.
        batch_size: Images in a step.
        accelerator: "cpu", "cuda" or "mps".
        precision: "32", "bf16" or "16".
    """

    backbone: str
    image_size: int
    batch_size: int
    accelerator: str
    precision: str


@dataclass
class Cost:
    """Of a tuner in one stage.

    Attributes:
        parameters: That the tuner trains; None until one measurement has ended well.
        pretext: In TPP, the pretext task.
        memory_mib: What training adds at its peak, see `PeakMemory.added_mib`.
        rates: Images per second of each repetition.
        error: Why a measurement failed; no more are made then.
    """

    parameters: int | None = None
    pretext: str | None = None
    memory_mib: float | None = None
    rates: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def rate(self) -> float | None:
        """The median; None where a repetition failed."""
        return median(self.rates) if self.rates and self.error is None else None


@dataclass(frozen=True)
class Measurements:
    """All that was measured.

    Attributes:
        setup: What the tuners share.
        repeats: Measurements of each speed.
        machine: See `describe_machine`; its load is that before the start.
        costs: By tuner and stage; a tuner that has nothing for TPP to train has no cost of it.
    """

    setup: Setup
    repeats: int
    machine: dict[str, Any]
    costs: dict[str, dict[Stage, Cost]]

    @property
    def errors(self) -> list[tuple[str, Stage, str]]:
        """Tuner, stage and reason of all that failed."""
        each = ((name, stage, cost.error) for name, stages in self.costs.items() for stage, cost in stages.items())
        return [(name, stage, error) for name, stage, error in each if error is not None]

    def plain(self) -> dict[str, Any]:
        """Plain values, to be written as JSON."""
        settings = {**asdict(self.setup), "repeats": self.repeats, "steps": TIMED, "steps_skipped": SKIPPED}
        found = {
            name: {stage: {"images_per_second": cost.rate, **asdict(cost)} for stage, cost in stages.items()}
            for name, stages in self.costs.items()
        }
        return {"machine": self.machine, "settings": settings, "tuners": found}


class Trainee:
    """A tuner on a backbone, to be trained by the module of either stage.

    Args:
        backbone: A plain one.
        tuner: Its name, or its options.
        pretext: Options of a pretext task for TPP; None for fine-tuning to two classes.
        augment: Whether TPP augments; fine-tuning always does.
    """

    def __init__(
        self,
        backbone: Backbone,
        tuner: str | MethodOptions,
        pretext: MethodOptions | None = None,
        *,
        augment: bool = True,
    ) -> None:
        self.tuned = tuners.attach(backbone, tuner, seed=SEEDS)
        augmenter = Augmenter(AugmentOptions(), "xray")
        if pretext is None:
            method = TASKS.get("classification")
            task: Task = method(method.Options(), backbone.spec, ("no", "yes"), False, SEEDS)
            self.head: nn.Module = task
            self.module: nn.Module = SupervisedModule(self.tuned, task, augmenter)
            self.hooks = Hooks(self.tuned.after_step, self.tuned.after_step_buffers)
        else:
            head, _ = make_pretext(pretext, backbone, SEEDS)
            head.begin(self.tuned)
            self.head = head
            self.module = module = PretextModule(self.tuned, head, augmenter if augment else None)
            self.hooks = module.hooks()

    def train(
        self, hardware: HardwareOptions, stream: Stream, steps: int, after_step: Callable[[int], None] | None = None
    ) -> Record:
        """Train from where it is; `after_step` is called with the number of steps done."""

        def both(step: int, total: int) -> None:
            if self.hooks.after_step:
                self.hooks.after_step(step, total)
            if after_step:
                after_step(step)

        groups = [
            *tuner_groups(self.tuned, RATE, 0.0),
            Group("head", dict(self.head.named_parameters()), RATE),
        ]
        with contextlib.redirect_stderr(io.StringIO()):  # progress
            return fit(
                make_fabric(hardware, LoggingOptions()),
                self.module,
                groups,
                stream,
                Schedule(steps),
                hooks=replace(self.hooks, after_step=both),
            )


def pixels(batch_size: int, image_size: int) -> Tensor:
    """(B, 3, S, S) uint8, always the same."""
    shape = (batch_size, 3, image_size, image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=SEEDS.generator("x"))


def fixed_batch(batch_size: int, image_size: int) -> BatchStream:
    """These images in every step, of two classes."""
    count = np.arange(batch_size)
    targets = torch.arange(batch_size) % 2
    return BatchStream(pixels(batch_size, image_size).numpy(), count, count, targets, batch_size, SEEDS)


def set_up(
    backbone: str, *, image_size: int | None, batch_size: int, device: str = "auto", precision: str = "auto"
) -> Setup:
    """Answer what is `auto`.

    Args:
        backbone: See `Setup`.
        image_size: The backbone's own by default.
        batch_size: Images in a step.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto", "32", "bf16" or "16".

    Raises:
        ConfigError: There is no such backbone or device, or one does not fit the size or the precision.
    """
    accelerator = choose_accelerator(device)
    chosen, _ = choose_precision(precision, accelerator)
    spec = backbones.load(backbone, weights="random", image_size=image_size).spec
    return Setup(backbone, spec.image_size[0], batch_size, accelerator, chosen)


def fitting(setup: Setup) -> list[str]:
    """Names of the tuners that fit the backbone."""
    spec = backbones.load(setup.backbone, weights="random", image_size=setup.image_size).spec
    return [name for name, method in TUNERS.items() if method.needs <= spec.capabilities]


def measure(setup: Setup, names: Sequence[str], repeats: int, progress: Callable[[int, int], None]) -> Measurements:
    """Measure tuners.

    Args:
        setup: What they share.
        names: Of tuners.
        repeats: Measurements of the speed; memory is measured once, before.
        progress: Called with the number of measurements done and to do.

    Raises:
        ConfigError: There is no such tuner.
    """
    machine = describe_machine(setup.accelerator, PACKAGES)
    costs = {name: {stage: Cost() for stage in STAGES if _has(name, stage)} for name in names}
    arms = [(name, stage) for name, stages in costs.items() for stage in stages]
    rounds = [_memory, *[_rate] * repeats]
    for number, figure in enumerate(rounds):
        for place, (name, stage) in enumerate(arms[:: -1 if number % 2 else 1]):
            progress(number * len(arms) + place, len(rounds) * len(arms))
            cost = costs[name][stage]
            if cost.error is None:
                _note(cost, figure, setup, name, stage)
    progress(len(rounds) * len(arms), len(rounds) * len(arms))
    return Measurements(setup, repeats, machine, costs)


def _has(name: str, stage: Stage) -> bool:
    return stage == "finetune" or TUNERS.get(name).has_targets


def _note(cost: Cost, figure: Callable[..., float], setup: Setup, name: str, stage: Stage) -> None:
    """Make one measurement and enter what it gave, or why it did not."""
    try:
        context = process_context(copies=setup.accelerator == "cpu")
        with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
            found: tuple[int, str | None, float] | str = pool.submit(_alone, figure, setup, name, stage).result()
    except BrokenProcessPool:
        found = "the process was killed, as systems do that run out of memory"
    if isinstance(found, str):
        cost.error = found
        return
    cost.parameters, cost.pretext, value = found
    if figure is _memory:
        cost.memory_mib = round(value, 1)
    else:
        cost.rates.append(round(value, 2))


def _alone(figure: Callable[..., float], setup: Setup, name: str, stage: Stage) -> tuple[int, str | None, float] | str:
    """One measurement: target parameters, pretext task, figure; or what went wrong."""
    try:
        return _measured(figure, setup, name, stage)
    except MedtppError as mistake:
        return str(mistake)
    except Exception as mistake:  # noqa: BLE001  (whatever it is, the other tuners are measured)
        return f"{type(mistake).__name__}: {mistake}"


def _measured(figure: Callable[..., float], setup: Setup, name: str, stage: Stage) -> tuple[int, str | None, float]:
    if figure is _memory:
        give_back_at_once()
    backbone = backbones.load(setup.backbone, weights="random", image_size=setup.image_size)
    pretext = _pretext(name, backbone) if stage == "tpp" else None
    trainee = Trainee(backbone, name, pretext)
    value = figure(setup, trainee)
    return count_parameters(trainee.tuned)["target"], pretext.name if pretext else None, value


def _pretext(tuner: str, backbone: Backbone) -> MethodOptions:
    return resolve_pretext(AutoPretext(), backbone.spec, tuner)


def _hardware(setup: Setup) -> HardwareOptions:
    return HardwareOptions.model_validate({"accelerator": setup.accelerator, "precision": setup.precision})


def _memory(setup: Setup, trainee: Trainee) -> float:
    """MiB, without what libraries load once; the second step has the optimiser's state from the beginning."""
    trainee.train(_hardware(setup), fixed_batch(2, setup.image_size), 1)
    stream, memory = fixed_batch(setup.batch_size, setup.image_size), PeakMemory(torch.device(setup.accelerator))
    trainee.train(_hardware(setup), stream, 2)
    return memory.added_mib()


def _rate(setup: Setup, trainee: Trainee) -> float:
    """Images per second, the device's work done."""
    times = {}

    def note(done: int) -> None:
        if done in (SKIPPED, SKIPPED + TIMED):
            if setup.accelerator != "cpu":
                torch.accelerator.synchronize()
            times[done] = time.perf_counter()

    trainee.train(_hardware(setup), fixed_batch(setup.batch_size, setup.image_size), SKIPPED + TIMED, note)
    return TIMED * setup.batch_size / (times[SKIPPED + TIMED] - times[SKIPPED])

"""What a comparison consists of: arms, cells and what they start from, and the experiment of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medtpp.backbones import untrained
from medtpp.config import PRETEXTS, TUNERS, AutoPretext, Experiment, LoggingOptions
from medtpp.errors import ConfigError

if TYPE_CHECKING:
    from medtpp.workflow.compare.axes import Axes

Init = Literal[
    "standard",
    "tpp",
    "tpp_labelled",
    "tpp_foreign",
    "random_direction",
    "pissa",
    "olora",
    "eva",
    "lora_ga",
    "longer",
    "scratch",
]
Extra = Literal["longer", "linear", "full", "scratch"]
Labels = int | Literal["all"]
STARTS = ("pissa", "olora", "eva", "lora_ga")  # LoRA's other starts, as `tuner.start` names them
CONTROLS = ("tpp_labelled", "tpp_foreign", "random_direction")  # what may be behind a difference that TPP makes
PRIMED = ("tpp", *CONTROLS)  # fine-tuning starts from an adapter folder
REFERENCES = ("linear", "full")  # tuners that are arms of their own
_SETTLED = ("volume", "structures", "image_size", "channels", "augment")  # of `data`: the same for all cells


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        tuner: Name of the tuner.
        init: "standard" is the tuner's own start, "tpp" starts from Target Parameter Pre-training, "longer" starts like
            "standard" and fine-tunes for as long as "tpp" takes with its pretext stage. Controls for "tpp" are
            "tpp_labelled", TPP on the labelled training images alone, "tpp_foreign", TPP on images of another source,
            and "random_direction", as far from the tuner's own start as TPP ends. "scratch" trains the backbone from
            random weights, with the tuner "full". The others are LoRA's own.
        pretext: Name of the pretext task of TPP and its controls; "" is the experiment's own.
    """

    tuner: str
    init: Init
    pretext: str = ""

    @property
    def name(self) -> str:
        """For tables: "lora tpp", "lora tpp simmim"; the references are "linear" and "full", and "scratch"."""
        if self.init == "scratch":
            return self.init
        return self.tuner if self.is_reference else " ".join(self._parts)

    @property
    def is_reference(self) -> bool:
        """Whether it shows an end of the scale: nothing of the backbone trained, or all of it."""
        return self.tuner in REFERENCES and self.init == "standard"

    def is_method_beside(self, baseline: Arm) -> bool:
        """Whether it differs from a baseline in more than how it starts and how long it trains: the tuner, the weights.

        So is TPP by a tuner beside "linear", "full" and "scratch".
        """
        return baseline.tuner != self.tuner or baseline.init == "scratch"

    @property
    def folder(self) -> str:
        """For paths."""
        return "-".join(self._parts)

    @property
    def _parts(self) -> tuple[str, ...]:
        return (self.tuner, self.init, *([self.pretext] if self.pretext else []))


@dataclass(frozen=True)
class Start:
    """An adapter that cells start from, made once: by a pretext stage, or from what another start became.

    Attributes:
        arm: Of the cells.
        labels: Of the cells, where it sees their labelled images alone; None where it serves all label counts.
        seed: Of the cells.
    """

    arm: Arm
    labels: Labels | None
    seed: int

    @property
    def title(self) -> str:
        """In a reader's words, without labels and seed."""
        what = self.arm.tuner + (f" by {self.arm.pretext}" if self.arm.pretext else "")
        if self.arm.init == "random_direction":
            return f"random direction of {what}"
        images = {"tpp_labelled": ", labelled images", "tpp_foreign": ", foreign images"}
        return f"TPP of {what}{images.get(self.arm.init, '')}"

    @property
    def name(self) -> str:
        """In a reader's words."""
        labels = "" if self.labels is None else f", {_in_words(self.labels)}"
        return f"{self.title}{labels}, seed {self.seed}"

    @property
    def origin(self) -> Start | None:
        """The start that it is made from; None of a pretext stage, which is made from images."""
        return replace(self, arm=replace(self.arm, init="tpp")) if self.arm.init == "random_direction" else None

    @property
    def cell(self) -> Cell:
        """A cell that starts from it."""
        return Cell(self.arm, self.labels or "all", self.seed)

    def folder(self, out: Path) -> Path:
        """Where its files lie."""
        plain = self.arm == Arm(self.arm.tuner, "tpp")
        above = out / "tpp" / (self.arm.tuner if plain else self.arm.folder)
        return (above if self.labels is None else above / str(self.labels)) / f"seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One training and its test: an arm, a label count, a seed."""

    arm: Arm
    labels: Labels
    seed: int

    @property
    def name(self) -> str:
        """In a reader's words."""
        return f"{self.arm.name}, {_in_words(self.labels)}, seed {self.seed}"

    @property
    def starts(self) -> tuple[Start, ...]:
        """What has to be made before it, in this order: it starts from the last. () for the tuner's own start."""
        if self.arm.init not in PRIMED:
            return ()
        start = Start(self.arm, self.labels if self.arm.init == "tpp_labelled" else None, self.seed)
        return (start,) if start.origin is None else (start.origin, start)

    def folder(self, out: Path) -> Path:
        """Where its files lie."""
        return out / "cells" / self.arm.folder / str(self.labels) / f"seed{self.seed}"


def _in_words(labels: Labels) -> str:
    return "all labels" if labels == "all" else f"{labels} labels"


def base_experiment(experiment: Experiment, axes: Axes) -> Experiment:
    """An experiment as it is compared: TPP never sees test images, the last weights count, CSV logs alone.

    Raises:
        ConfigError: It asks for transductive TPP, for its monitor, for several devices per run, or for TPP of a tuner
            without targets; all reasons are listed.
    """
    problems = []
    if experiment.tpp.transductive:
        problems.append(
            "tpp.transductive is for single runs: a comparison in which TPP sees the test images shows nothing. "
            "Use --set tpp.transductive=false."
        )
    if experiment.tpp.monitor:
        problems.append(
            "tpp.monitor is for single runs: in a comparison TPP uses no labels, and its budget is fixed beforehand. "
            "Use --set tpp.monitor=false."
        )
    if experiment.hardware.devices > 1:
        problems.append(
            "hardware.devices is for single runs: a comparison gives each cell one device, and does several cells at "
            "once (--jobs). Use --set hardware.devices=1."
        )
    if "scratch" in axes.extras and experiment.backbone.weights == "random":
        problems.append(
            "backbone.weights is random, so that the arm full is trained from scratch already. Use --arm full, or name "
            "the weights that scratch is to be compared with."
        )
    for arm in axes.arms(experiment):
        if arm.init in PRIMED and not TUNERS.get(arm.tuner).has_targets:
            problems.append(
                f"The tuner {arm.tuner} has no target parameters, so there is no TPP to compare. Name another one with "
                f"--tuner, or leave TPP out with --init standard."
            )
        if arm.init in STARTS and arm.tuner != "lora":
            problems.append(
                f"The start {arm.init} is one of LoRA's; {arm.tuner} has none such. Use --tuner lora, or leave "
                f"{arm.init} out of --init."
            )
    refuse_together("This experiment cannot be compared so:", problems)
    return experiment.model_copy(
        update={
            "finetune": experiment.finetune.model_copy(update={"keep": "last"}),
            "logging": LoggingOptions(tensorboard=False),
        }
    )


def refuse_together(title: str, problems: list[str]) -> None:
    """Raise ConfigError with all problems, each once, if there are any; one alone needs no title."""
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ConfigError(title, problems) if len(problems) > 1 else ConfigError(problems[0])


def settled(base: Experiment, prepared: Experiment) -> Experiment:
    """A base experiment with all that the data decide for every cell alike: the task, the backbone, how scans are made.

    A pretext task that is left to the backbone is among it, and the budget of TPP: on fewer or other images, too, it
    has the same number of steps and images per step. How long a pretext head is warmed up follows from the steps, and
    from whether it came trained with the backbone. What labels or tuners decide stays "auto". To settle again what is
    settled changes nothing.

    Args:
        base: From `base_experiment`.
        prepared: The experiment that the data were prepared for.
    """
    found = {name: getattr(prepared.data, name) for name in _SETTLED}
    data = base.data.model_copy(update=found)
    budget = {name: getattr(prepared.tpp, name) for name in ("steps", "batch_size")}
    tpp = base.tpp.model_copy(update=budget)
    same = {name: getattr(prepared, name) for name in ("task", "backbone")}
    if isinstance(base.pretext, AutoPretext):
        same["pretext"] = prepared.pretext
    return base.model_copy(update={**same, "data": data, "tpp": tpp})


def cell_experiment(
    base: Experiment, cell: Cell, *, steps: int | None = None, threads: int | None = None
) -> Experiment:
    """The experiment of one cell.

    Options and learning rates that the user gave belong to the user's tuner; other tuners have their own. So do options
    of the pretext task. How the head starts beside a tuner is not said of a frozen backbone, nor the other way round.
    "scratch" is trained as "full" is, so that the two differ by the backbone's weights alone.

    Args:
        base: From `base_experiment`; options of training are as written by the user.
        cell: Which.
        steps: Of fine-tuning, where they are not the experiment's.
        threads: CPU threads of the process.
    """
    pretext = base.tpp.model_copy(update={"enabled": cell.arm.init in PRIMED})
    finetune, tuner = base.finetune, base.tuner
    update: dict[str, object] = {"seed": cell.seed, "data": base.data.model_copy(update={"labels": cell.labels})}
    if threads is not None:
        update["hardware"] = base.hardware.model_copy(update={"threads": threads})
    if cell.arm.tuner != base.tuner.name:
        own = {"learning_rate": "auto", "weight_decay": 0.0}
        update["tuner"] = tuner = TUNERS.get(cell.arm.tuner).Options()
        pretext, finetune = pretext.model_copy(update=own), finetune.model_copy(update=own)
        if TUNERS.get(cell.arm.tuner).has_targets != TUNERS.get(base.tuner.name).has_targets:
            finetune = finetune.model_copy(update={"head_start": "auto"})
    if cell.arm.pretext:
        update["pretext"] = PRETEXTS.get(cell.arm.pretext).Options()
    if cell.arm.init == "scratch":
        update["backbone"] = untrained(base.backbone)
    if cell.arm.init in STARTS:
        update["tuner"] = tuner.model_copy(update={"start": cell.arm.init})
    if steps is not None:
        finetune = finetune.model_copy(update={"steps": steps})
    return base.model_copy(update={**update, "tpp": pretext, "finetune": finetune})

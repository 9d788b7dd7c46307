"""What a comparison consists of: arms, label counts and seeds, crossed into cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from medtpp.config import TUNERS, Experiment, LoggingOptions
from medtpp.errors import ConfigError
from medtpp.evaluation.metrics import OVERALL
from medtpp.evaluation.segmentation_table import METRICS as OF_MASKS

Init = Literal[
    "standard", "tpp", "tpp_labelled", "tpp_foreign", "random_direction", "pissa", "olora", "eva", "lora_ga", "longer"
]
Extra = Literal["longer", "linear", "full"]
Labels = int | Literal["all"]
STARTS = ("pissa", "olora", "eva", "lora_ga")  # LoRA's other starts, as `tuner.start` names them
CONTROLS = ("tpp_labelled", "tpp_foreign", "random_direction")  # what may be behind a difference that TPP makes
PRIMED = ("tpp", *CONTROLS)  # fine-tuning starts from an adapter folder
REFERENCES = ("linear", "full")  # tuners that are arms of their own
AUTO = "auto"  # the metric that suits the task
MARGINS = {"dice": 0.01, "nsd": 0.01, "hd95": 0.5}  # HD95 in mm, or in pixels where the spacing is unknown
MARGIN = 0.005  # of the others: half a point


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        tuner: Name of the tuner.
        init: "standard" is the tuner's own start, "tpp" starts from Target Parameter Pre-training, "longer" starts like
            "standard" and fine-tunes for as long as "tpp" takes with its pretext stage. Controls for "tpp" are
            "tpp_labelled", TPP on the labelled training images alone, "tpp_foreign", TPP on images of another source,
            and "random_direction", as far from the tuner's own start as TPP ends. The others are LoRA's own.
    """

    tuner: str
    init: Init

    @property
    def name(self) -> str:
        """For tables: "lora tpp"; the references are "linear" and "full"."""
        return self.tuner if self.is_reference else f"{self.tuner} {self.init}"

    @property
    def is_reference(self) -> bool:
        """Whether it shows an end of the scale: nothing of the backbone trained, or all of it."""
        return self.tuner in REFERENCES and self.init == "standard"

    @property
    def folder(self) -> str:
        """For paths."""
        return f"{self.tuner}-{self.init}"


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
        if self.arm.init == "random_direction":
            return f"random direction of {self.arm.tuner}"
        images = {"tpp_labelled": ", labelled images", "tpp_foreign": ", foreign images"}
        return f"TPP of {self.arm.tuner}{images.get(self.arm.init, '')}"

    @property
    def name(self) -> str:
        """In a reader's words."""
        labels = "" if self.labels is None else f", {_in_words(self.labels)}"
        return f"{self.title}{labels}, seed {self.seed}"

    @property
    def origin(self) -> Start | None:
        """The start that it is made from; None of a pretext stage, which is made from images."""
        return replace(self, arm=Arm(self.arm.tuner, "tpp")) if self.arm.init == "random_direction" else None

    @property
    def cell(self) -> Cell:
        """A cell that starts from it."""
        return Cell(self.arm, self.labels or "all", self.seed)

    def folder(self, out: Path) -> Path:
        """Where its files lie."""
        above = out / "tpp" / (self.arm.tuner if self.arm.init == "tpp" else self.arm.folder)
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


@dataclass(frozen=True)
class Axes:
    """What is compared.

    Attributes:
        tuners: Names of tuners; () for the experiment's own.
        inits: Of "standard", "tpp", its controls "tpp_labelled", "tpp_foreign" and "random_direction", and LoRA's other
            starts "pissa", "olora", "eva" and "lora_ga".
        extras: Further arms: "longer" for each tuner, "linear" and "full" once.
        labels: How many labelled cases in all, validation included; () for what the experiment says.
        seeds: How many seeds, from the experiment's on.
        metric: On the test cases; "auto" is "dice" for segmentation and "auc" for classification.
        margin: Differences of the metric below this do not matter, in its own unit; set before looking. None is half a
            point, for Dice and NSD one point, for HD95 0.5 mm.
        foreign: Folders of the images of "tpp_foreign".

    Raises:
        ConfigError: The values make no comparison; all reasons are listed.
    """

    tuners: tuple[str, ...] = ()
    inits: tuple[Init, ...] = ("standard", "tpp")
    extras: tuple[Extra, ...] = ()
    labels: tuple[Labels, ...] = ()
    seeds: int = 10
    metric: str = AUTO
    margin: float | None = None
    foreign: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"there is no {what} {name!r}; there are {', '.join(known)}"
            for what, names, known in (
                ("tuner", self.tuners, tuple(name for name, _ in TUNERS.items())),
                ("init", self.inits, ("standard", *PRIMED, *STARTS)),
                ("arm", self.extras, get_args(Extra)),
                ("metric", (self.metric,), (AUTO, *OVERALL, *OF_MASKS)),
            )
            for name in names
            if name not in known
        ]
        for what, values in (
            ("tuner", self.tuners),
            ("init", self.inits),
            ("arm", self.extras),
            ("label count", self.labels),
        ):
            problems += [f"{what} {value} is named twice" for value in dict.fromkeys(values) if values.count(value) > 1]
        if not self.inits and not self.extras:
            problems.append("there is no arm")
        if self.seeds < 1:
            problems.append(f"there are {self.seeds} seeds; 10 are advised")
        if self.margin is not None and self.margin < 0:
            problems.append(f"the margin is {self.margin}; it is 0 or more")
        if "longer" in self.extras and "tpp" not in self.inits:
            problems.append("the arm longer takes as long as TPP, so the init tpp has to be there")
        if "tpp" not in self.inits:
            problems += [
                f"{init} is a control for TPP, so the init tpp has to be there"
                for init in self.inits
                if init in CONTROLS
            ]
        if "tpp_foreign" in self.inits and not self.foreign:
            problems.append("the init tpp_foreign needs other images: name their folder with --foreign")
        if self.foreign and "tpp_foreign" not in self.inits:
            problems.append("--foreign is for the init tpp_foreign, which is not there")
        if problems:
            raise ConfigError("This is no comparison:", problems)

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Axes:
        """What `dataclasses.asdict` and JSON made of some axes."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    def resolved(self, experiment: Experiment) -> Axes:
        """The same with the experiment's own tuner and label count where none is named, and whole paths."""
        tuners, labels = self.tuners or (experiment.tuner.name,), self.labels or (experiment.data.labels,)
        foreign = tuple(str(Path(path).expanduser().absolute()) for path in self.foreign)
        return replace(self, tuners=tuners, labels=labels, foreign=foreign)

    def measured(self, *, masks: bool) -> Axes:
        """The same with metric and margin chosen.

        Args:
            masks: Whether the task is a segmentation.

        Raises:
            ConfigError: The metric is of the other task.
        """
        known = OF_MASKS if masks else OVERALL
        metric = ("dice" if masks else "auc") if self.metric == AUTO else self.metric
        if metric not in known:
            task = "segmentation" if masks else "classification"
            raise ConfigError(f"There is no metric {metric} of a {task}. Use --metric with one of {', '.join(known)}.")
        return replace(self, metric=metric, margin=MARGINS.get(metric, MARGIN) if self.margin is None else self.margin)

    def joined(self, before: Axes) -> Axes:
        """These axes and those of the comparison that is gone on with: nothing that was tested is left out later.

        Raises:
            ConfigError: Metric or margin are given and differ: they are set before anyone has looked.
        """
        metric = before.metric if self.metric == AUTO else self.metric
        margin = before.margin if self.margin is None else self.margin
        if (metric, margin) != (before.metric, before.margin):
            raise ConfigError(
                f"The comparison was begun with --metric {before.metric} and --margin {before.margin}, which are set "
                "before looking. Keep them, or begin anew with --overwrite or another --out."
            )
        both: dict[str, Any] = {
            name: tuple(dict.fromkeys([*getattr(before, name), *getattr(self, name)]))
            for name in ("tuners", "inits", "extras", "labels")
        }
        seeds, foreign = max(self.seeds, before.seeds), self.foreign or before.foreign
        return replace(self, **both, seeds=seeds, metric=metric, margin=margin, foreign=foreign)

    def arms(self, experiment: Experiment) -> tuple[Arm, ...]:
        """All arms, tuner by tuner, then the references."""
        inits: tuple[Init, ...] = (*self.inits, *(("longer",) if "longer" in self.extras else ()))
        own = [Arm(tuner, init) for tuner in self.resolved(experiment).tuners for init in inits]
        references = [Arm(name, "standard") for name in REFERENCES if name in self.extras]
        return tuple(dict.fromkeys([*own, *references]))

    def cells(self, experiment: Experiment) -> Iterator[Cell]:
        """All cells, seed by seed, so that a comparison that is stopped has whole pairs."""
        seeds = range(experiment.seed, experiment.seed + self.seeds)
        for seed, labels, arm in itertools.product(seeds, self.resolved(experiment).labels, self.arms(experiment)):
            yield Cell(arm, labels, seed)


def _in_words(labels: Labels) -> str:
    return "all labels" if labels == "all" else f"{labels} labels"


def base_experiment(experiment: Experiment, axes: Axes) -> Experiment:
    """An experiment as it is compared: TPP never sees test images, the last weights count, CSV logs alone.

    Raises:
        ConfigError: It asks for transductive TPP, for its monitor, for several devices per run, or for TPP of a tuner
            without targets.
    """
    if experiment.tpp.transductive:
        raise ConfigError(
            "tpp.transductive is for single runs: a comparison in which TPP sees the test images shows nothing. "
            "Use --set tpp.transductive=false."
        )
    if experiment.tpp.monitor:
        raise ConfigError(
            "tpp.monitor is for single runs: in a comparison TPP uses no labels, and its budget is fixed beforehand. "
            "Use --set tpp.monitor=false."
        )
    if experiment.hardware.devices > 1:
        raise ConfigError(
            "hardware.devices is for single runs: a comparison gives each cell one device, and does several cells at "
            "once (--jobs). Use --set hardware.devices=1."
        )
    for arm in axes.arms(experiment):
        if arm.init in PRIMED and not TUNERS.get(arm.tuner).has_targets:
            raise ConfigError(
                f"The tuner {arm.tuner} has no target parameters, so there is no TPP to compare. Name another one with "
                f"--tuner, or leave TPP out with --init standard."
            )
        if arm.init in STARTS and arm.tuner != "lora":
            raise ConfigError(
                f"The start {arm.init} is one of LoRA's; {arm.tuner} has none such. Use --tuner lora, or leave "
                f"{arm.init} out of --init."
            )
    return experiment.model_copy(
        update={
            "finetune": experiment.finetune.model_copy(update={"keep": "last"}),
            "logging": LoggingOptions(tensorboard=False),
        }
    )


def settled(base: Experiment, prepared: Experiment) -> Experiment:
    """A base experiment with all that the data decide for every cell alike: the task, the backbone, how scans are made.

    The pretext task is among it, and the budget of TPP: on fewer or other images, too, it has the same number of steps
    and images per step.

    Args:
        base: From `base_experiment`.
        prepared: The experiment that the data were prepared for.
    """
    found = {name: getattr(prepared.data, name) for name in ("volume", "structures")}
    data = base.data.model_copy(update=found)
    budget = {name: getattr(prepared.tpp, name) for name in ("steps", "batch_size", "head_warmup")}
    tpp = base.tpp.model_copy(update=budget)
    same = {name: getattr(prepared, name) for name in ("task", "backbone", "pretext")}
    return base.model_copy(update={**same, "data": data, "tpp": tpp})


def cell_experiment(
    base: Experiment, cell: Cell, *, steps: int | None = None, threads: int | None = None, tpp: bool | None = None
) -> Experiment:
    """The experiment of one cell.

    Options and learning rates that the user gave belong to the user's tuner; other tuners have their own.

    Args:
        base: From `base_experiment`; options of training are as written by the user.
        cell: Which.
        steps: Of fine-tuning, where they are not the experiment's.
        threads: CPU threads of the process.
        tpp: Whether there is a pretext stage; by default as the arm says.
    """
    pretext = base.tpp.model_copy(update={"enabled": cell.arm.init in PRIMED if tpp is None else tpp})
    finetune, tuner = base.finetune, base.tuner
    update: dict[str, object] = {"seed": cell.seed, "data": base.data.model_copy(update={"labels": cell.labels})}
    if threads is not None:
        update["hardware"] = base.hardware.model_copy(update={"threads": threads})
    if cell.arm.tuner != base.tuner.name:
        own = {"learning_rate": "auto", "weight_decay": 0.0}
        update["tuner"] = tuner = TUNERS.get(cell.arm.tuner).Options()
        pretext, finetune = pretext.model_copy(update=own), finetune.model_copy(update=own)
    if cell.arm.init in STARTS:
        update["tuner"] = tuner.model_copy(update={"start": cell.arm.init})
    if steps is not None:
        finetune = finetune.model_copy(update={"steps": steps})
    return base.model_copy(update={**update, "tpp": pretext, "finetune": finetune})

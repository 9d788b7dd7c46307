"""What is compared: tuners, starts, pretext tasks, label counts and seeds, crossed into cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from medtpp.config import PRETEXTS, TUNERS, Experiment
from medtpp.errors import ConfigError
from medtpp.evaluation.metrics import OVERALL
from medtpp.evaluation.segmentation_table import METRICS as OF_MASKS
from medtpp.workflow.compare.plan import CONTROLS, PRIMED, REFERENCES, STARTS, Arm, Cell, Extra, Init, Labels

AUTO = "auto"  # the metric that suits the task, the pretext task that suits the backbone
METRICS = (*OVERALL, *OF_MASKS)
INITS = ("standard", *PRIMED, *STARTS)
MARGINS = {"dice": 0.01, "nsd": 0.01, "hd95": 0.5}  # HD95 in mm, or in pixels where the spacing is unknown
MARGIN = 0.005  # of the others: half a point


@dataclass(frozen=True)
class Axes:
    """What is compared.

    Attributes:
        tuners: Names of tuners; () for the experiment's own.
        pretexts: Names of the pretext tasks of TPP and its controls; () for the experiment's own.
        inits: Of "standard", "tpp", its controls "tpp_labelled", "tpp_foreign" and "random_direction", and LoRA's other
            starts "pissa", "olora", "eva" and "lora_ga".
        extras: Further arms: "longer" for each tuner, "linear", "full" and "scratch" once.
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
    pretexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"there is no {what} {name!r}; there are {', '.join(known)}"
            for what, names, known in (
                ("tuner", self.tuners, tuple(TUNERS.names())),
                ("pretext", self.pretexts, (AUTO, *PRETEXTS.names())),
                ("init", self.inits, INITS),
                ("arm", self.extras, get_args(Extra)),
                ("metric", (self.metric,), (AUTO, *METRICS)),
            )
            for name in names
            if name not in known
        ]
        for what, values in (
            ("tuner", self.tuners),
            ("pretext", self.pretexts),
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
        if self.pretexts and "tpp" not in self.inits:
            problems.append("--pretext is for the init tpp, which is not there")
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
        """The same with the experiment's own tuner, pretext and label count where none is named, and whole paths."""
        tuners, labels = self.tuners or (experiment.tuner.name,), self.labels or (experiment.data.labels,)
        pretexts = self.pretexts or ((experiment.pretext.name,) if "tpp" in self.inits else ())
        foreign = tuple(str(Path(path).expanduser().absolute()) for path in self.foreign)
        return replace(self, tuners=tuners, pretexts=pretexts, labels=labels, foreign=foreign)

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
            for name in ("tuners", "pretexts", "inits", "extras", "labels")
        }
        seeds, foreign = max(self.seeds, before.seeds), self.foreign or before.foreign
        return replace(self, **both, seeds=seeds, metric=metric, margin=margin, foreign=foreign)

    def arms(self, experiment: Experiment) -> tuple[Arm, ...]:
        """All arms, tuner by tuner, then the references."""
        inits: tuple[Init, ...] = (*self.inits, *(("longer",) if "longer" in self.extras else ()))
        axes, named = self.resolved(experiment), experiment.pretext.name
        pretexts = ["" if name in (AUTO, named) else name for name in axes.pretexts]
        own = [
            Arm(tuner, init, pretext)
            for tuner in axes.tuners
            for init in inits
            for pretext in (pretexts if init in PRIMED else [""])
        ]
        references = [Arm(name, "standard") for name in REFERENCES if name in self.extras]
        scratch = [Arm("full", "scratch")] if "scratch" in self.extras else []
        return tuple(dict.fromkeys([*own, *references, *scratch]))

    def cells(self, experiment: Experiment) -> Iterator[Cell]:
        """All cells, seed by seed, so that a comparison that is stopped has whole pairs."""
        seeds = range(experiment.seed, experiment.seed + self.seeds)
        for seed, labels, arm in itertools.product(seeds, self.resolved(experiment).labels, self.arms(experiment)):
            yield Cell(arm, labels, seed)

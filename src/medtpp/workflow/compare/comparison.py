"""A comparison that can begin: its data, cells and steps, and what they will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medtpp.config import Experiment
from medtpp.data.holdout import Holdout
from medtpp.files import MARKER
from medtpp.workflow.cluster import ClusterOptions
from medtpp.workflow.compare.axes import Axes
from medtpp.workflow.compare.plan import PRIMED, Arm, Cell, Labels, Start
from medtpp.workflow.compare.work import Timing
from medtpp.workflow.prepare import Prepared, PreparedData


@dataclass(frozen=True)
class Machine:
    """How the cells are spread.

    Attributes:
        processes: At once.
        threads: CPU threads of each.
        gpus: GPUs that they share; 0 on the CPU.
        cluster: Where they are done, if not here.
    """

    processes: int
    threads: int
    gpus: int = 0
    cluster: ClusterOptions | None = None


@dataclass(frozen=True)
class Budget:
    """Optimiser steps.

    Attributes:
        tpp: Of the pretext stage, with the head's warm-up, by pretext task; "" is the experiment's own.
        finetune: Of fine-tuning, by label count.
        batch: Cases per step of fine-tuning, by label count.
    """

    tpp: Mapping[str, int]
    finetune: Mapping[Labels, int]
    batch: Mapping[Labels, int]


@dataclass(frozen=True)
class Comparison:
    """The data are read, the axes are known to fit.

    Attributes:
        axes: What is compared.
        base: The experiment that all cells derive from: as written, but for what the data decide.
        prepared: The first arm's, with all labels.
        budget: Steps.
        machine: How the cells are spread.
        timings: What a tuner costs here at a batch size, once it is measured; see `timing`.
        foreign: The same data with foreign images in the place of those that TPP may see, where they are asked for.
        held_out: The fold or the site that the test cases are, where the split is no single one.
    """

    axes: Axes
    base: Experiment
    prepared: Prepared
    budget: Budget
    machine: Machine
    timings: Mapping[str, Timing] = field(default_factory=dict)
    foreign: PreparedData | None = None
    held_out: Holdout | None = None

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms."""
        return self.axes.arms(self.base)

    @property
    def labels(self) -> tuple[Labels, ...]:
        """All label counts."""
        return self.axes.labels

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells but those of `tpp_labelled` in which it would see the very images that TPP sees."""
        same = self.labels_of_tpp if "tpp_labelled" in self.axes.inits else ()
        cells = self.axes.cells(self.base)
        return tuple(cell for cell in cells if cell.arm.init != "tpp_labelled" or cell.labels not in same)

    @property
    def labels_of_tpp(self) -> tuple[Labels, ...]:
        """The label counts at which all the images that TPP sees are labelled; () where it sees unlabelled ones."""
        if len(self.prepared.tpp) > len(self.prepared.cases("train")):
            return ()
        return "all", len(self.prepared.cases("train", "val"))

    @property
    def starts(self) -> tuple[Start, ...]:
        """What cells start from, each once, after what it is made from."""
        return tuple(dict.fromkeys(start for cell in self.cells for start in cell.starts))

    @property
    def pretexts(self) -> tuple[str, ...]:
        """The pretext tasks of the arms with TPP; "" is the experiment's own."""
        return tuple(dict.fromkeys(arm.pretext for arm in self.arms if arm.init == "tpp"))

    def pretext_of(self, arm: Arm) -> str:
        """The name of an arm's pretext task; "" of an arm without one."""
        return arm.pretext or (self.base.pretext.name if arm.init in PRIMED else "")

    def timing_key(self, tuner: str, labels: Labels, pretext: str = "") -> str:
        """The key of `timings`: a step costs the same wherever tuner, pretext task and batch size are the same."""
        return " ".join([tuner, *([pretext] if pretext else []), str(self.budget.batch[labels])])

    def timing(self, tuner: str, labels: Labels, pretext: str = "") -> Timing | None:
        """What a tuner costs at a label count; None where it could not be measured."""
        return self.timings.get(self.timing_key(tuner, labels, pretext))

    def steps(self, cell: Cell) -> int | None:
        """Fine-tuning steps of a cell; "longer" has those of TPP on top, counted by time: None without a timing.

        Of several pretext tasks it is the first, which stays the first when more are added.
        """
        steps = self.budget.finetune[cell.labels]
        if cell.arm.init != "longer":
            return steps
        timing = self.timing(cell.arm.tuner, cell.labels)
        spent = self.tpp_seconds(cell.arm.tuner, self.pretexts[0])
        return None if timing is None or spent is None else steps + max(1, round(spent / timing.finetune_step))

    def start_seconds(self, start: Start) -> float | None:
        """What a start takes to make; None where it could not be measured."""
        return self.tpp_seconds(start.arm.tuner, start.arm.pretext) if start.origin is None else 0.0

    def tpp_seconds(self, tuner: str, pretext: str = "") -> float | None:
        """What one pretext stage of a tuner takes, on whichever images; None where it could not be measured."""
        timing = next((found for labels in self.labels if (found := self.timing(tuner, labels, pretext))), None)
        return None if timing is None else timing.tpp_rest + self.budget.tpp[pretext] * timing.tpp_step

    def seconds(self, cell: Cell) -> float | None:
        """What a cell takes, without TPP; None where it could not be measured."""
        timing, steps = self.timing(cell.arm.tuner, cell.labels), self.steps(cell)
        return None if timing is None or steps is None else timing.cell_rest + steps * timing.finetune_step

    def missing_starts(self, out: Path | None) -> list[Start]:
        """What some cell that is not done starts from, and what that is made from, as far as it is not done."""
        needed = dict.fromkeys(start for cell in self.missing_cells(out) for start in cell.starts)
        return [start for start in needed if out is None or not (start.folder(out) / MARKER).is_file()]

    def missing_cells(self, out: Path | None) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in self.cells if out is None or not (cell.folder(out) / MARKER).is_file()]

    def seconds_left(self, out: Path | None) -> float:
        """What is not done yet will take, all processes at work."""
        stages = [self.start_seconds(start) for start in self.missing_starts(out)]
        cells = [self.seconds(cell) for cell in self.missing_cells(out)]
        return sum(seconds for seconds in [*stages, *cells] if seconds is not None) / self.machine.processes


def log_file(out: Path, folder: Path) -> Path:
    """What a process said while it filled a folder of the comparison. A JSON file beside it says why it failed."""
    return out / "logs" / f"{'-'.join(folder.relative_to(out).parts)}.log"

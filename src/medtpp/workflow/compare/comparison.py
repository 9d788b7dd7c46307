"""A comparison that can begin: data, cells, steps, and what they will cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from medtpp.config import Experiment
from medtpp.files import MARKER
from medtpp.training.device import choose_accelerator
from medtpp.training.stage import number
from medtpp.workflow.compare.plan import Arm, Axes, Cell, Labels, base_experiment, cell_experiment
from medtpp.workflow.compare.work import Timing
from medtpp.workflow.prepare import Prepared, arrange, prepare
from medtpp.workflow.run import open_run

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Machine:
    """How the cells are spread.

    Attributes:
        processes: At once.
        threads: CPU threads of each.
        gpus: GPUs that they share; 0 on the CPU.
    """

    processes: int
    threads: int
    gpus: int = 0


@dataclass(frozen=True)
class Budget:
    """Optimiser steps that do not depend on the arm.

    Attributes:
        tpp: Of the pretext stage, with the head's warm-up.
        finetune: Of fine-tuning, by label count.
    """

    tpp: int
    finetune: dict[Labels, int]


@dataclass(frozen=True)
class Comparison:
    """The data are read, the axes are known to fit.

    Attributes:
        axes: What is compared.
        base: The experiment that all cells derive from, as written.
        prepared: The same with all labels, prepared.
        budget: Steps.
        machine: How the cells are spread.
        timings: What each tuner costs here, once it is measured.
    """

    axes: Axes
    base: Experiment
    prepared: Prepared
    budget: Budget
    machine: Machine
    timings: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms."""
        return self.axes.arms(self.base)

    @property
    def labels(self) -> tuple[Labels, ...]:
        """All label counts."""
        return tuple(dict.fromkeys(cell.labels for cell in self.axes.cells(self.base)))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells."""
        return tuple(self.axes.cells(self.base))

    @property
    def tpp_runs(self) -> tuple[tuple[str, int], ...]:
        """Tuner and seed of each pretext stage."""
        return tuple(dict.fromkeys((cell.arm.tuner, cell.seed) for cell in self.cells if cell.arm.init == "tpp"))

    def steps(self, cell: Cell) -> int:
        """Fine-tuning steps of a cell; "longer" has those of TPP on top, counted by time."""
        steps = self.budget.finetune[cell.labels]
        timing = self.timings.get(cell.arm.tuner)
        if cell.arm.init != "longer" or timing is None:
            return steps
        return steps + max(1, round((self.tpp_seconds(cell.arm.tuner) or 0) / timing.finetune_step))

    def tpp_seconds(self, tuner: str) -> float | None:
        """What one pretext stage of a tuner takes; None where it could not be measured."""
        timing = self.timings.get(tuner)
        return None if timing is None else timing.tpp_rest + self.budget.tpp * timing.tpp_step

    def seconds(self, cell: Cell) -> float | None:
        """What a cell takes, without TPP; None where it could not be measured."""
        timing = self.timings.get(cell.arm.tuner)
        return None if timing is None else timing.cell_rest + self.steps(cell) * timing.finetune_step

    def missing_tpp(self, out: Path | None) -> list[tuple[str, int]]:
        """The pretext stages, by tuner and seed, that some cell needs and that are not done."""
        needed = {(cell.arm.tuner, cell.seed) for cell in self.missing_cells(out) if cell.arm.init == "tpp"}
        runs = [run for run in self.tpp_runs if run in needed]
        return [run for run in runs if out is None or not (tpp_folder(out, *run) / MARKER).is_file()]

    def missing_cells(self, out: Path | None) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in self.cells if out is None or not (cell.folder(out) / MARKER).is_file()]

    def seconds_left(self, out: Path | None) -> float:
        """What is not done yet will take, all processes at work."""
        stages = [self.tpp_seconds(tuner) for tuner, _ in self.missing_tpp(out)]
        cells = [self.seconds(cell) for cell in self.missing_cells(out)]
        return sum(seconds for seconds in [*stages, *cells] if seconds is not None) / self.machine.processes


def tpp_folder(out: Path, tuner: str, seed: int) -> Path:
    """Where the pretext stage of a tuner and seed lies."""
    return out / "tpp" / tuner / f"seed{seed}"


def log_file(out: Path, folder: Path) -> Path:
    """What a process said while it filled a folder of the comparison. A JSON file beside it says why it failed."""
    return out / "logs" / f"{'-'.join(folder.relative_to(out).parts)}.log"


def open_comparison(
    experiment: Experiment,
    axes: Axes,
    out: Path | None,
    *,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Read the data once, and find out whether all cells can be made.

    Args:
        experiment: As written by the user.
        axes: What to compare.
        out: The output folder; None writes nothing (a dry run).
        jobs: Processes at once; as many as fit by default.
        resume: Go on with what the folder holds. The axes may have grown.
        overwrite: Replace what the folder holds.
        progress: Called with images decoded so far and in all.

    Raises:
        MedtppError: As `open_run`; or there are too few labelled cases for a label count.
    """
    base = base_experiment(experiment)
    if not axes.labels:
        axes = Axes(**{**asdict(axes), "labels": (base.data.labels,)})
    whole = base.model_copy(update={"data": base.data.model_copy(update={"labels": "all"})})
    if out is None:
        prepared = prepare(whole, progress=progress)
    else:
        prepared = open_run(whole, out, resume=resume, overwrite=overwrite, progress=progress)
    finetune: dict[Labels, int] = {}
    for cell in axes.cells(base):
        if cell.labels not in finetune:
            resolved = arrange(prepared, cell_experiment(base, cell)).experiment
            finetune[cell.labels] = number(resolved.finetune.steps)
    tpp = prepared.experiment.tpp
    budget = Budget(number(tpp.steps) + number(tpp.head_warmup), finetune)
    return Comparison(axes, base, prepared, budget, share_machine(base, len(tuple(axes.cells(base))), jobs))


def share_machine(experiment: Experiment, cells: int, jobs: int | None = None) -> Machine:
    """How many processes with how many threads: one per GPU, or one per core, since many small ones are quickest."""
    accelerator = choose_accelerator(experiment.hardware.accelerator)
    wanted = experiment.hardware.threads
    cores = torch.get_num_threads() if wanted == "auto" else wanted
    gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
    most = {"cuda": gpus, "mps": 1}.get(accelerator, cores)
    processes = max(1, min(jobs or most, cells))
    return Machine(processes, max(1, cores // processes), gpus)

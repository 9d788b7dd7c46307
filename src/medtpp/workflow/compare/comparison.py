"""A comparison that can begin: data, cells, steps, and what they will cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from medtpp.config import Experiment
from medtpp.errors import ConfigError, OutputError
from medtpp.files import MARKER, prepare_folder, read_json, write_json
from medtpp.training.device import choose_accelerator, choose_precision
from medtpp.training.stage import number
from medtpp.workflow.cluster import ClusterOptions
from medtpp.workflow.compare.plan import Arm, Axes, Cell, Labels, Start, base_experiment, cell_experiment, settled
from medtpp.workflow.compare.work import Timing
from medtpp.workflow.prepare import Prepared, PreparedData, arrange, foreign_pool, prepare
from medtpp.workflow.run import content, open_run
from medtpp.workflow.steps import refuse_folder

Progress = Callable[[int, int], None]
_AXES, _INPUTS = "axes.json", "inputs.json"
_FOREIGN = "foreign images"


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
        batch: Cases per step of fine-tuning, by label count.
    """

    tpp: int
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
    """

    axes: Axes
    base: Experiment
    prepared: Prepared
    budget: Budget
    machine: Machine
    timings: Mapping[str, Timing] = field(default_factory=dict)
    foreign: PreparedData | None = None

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

    def timing_key(self, tuner: str, labels: Labels) -> str:
        """The key of `timings`: a step costs the same wherever tuner and batch size are the same."""
        return f"{tuner} {self.budget.batch[labels]}"

    def timing(self, tuner: str, labels: Labels) -> Timing | None:
        """What a tuner costs at a label count; None where it could not be measured."""
        return self.timings.get(self.timing_key(tuner, labels))

    def steps(self, cell: Cell) -> int | None:
        """Fine-tuning steps of a cell; "longer" has those of TPP on top, counted by time: None without a timing."""
        steps = self.budget.finetune[cell.labels]
        if cell.arm.init != "longer":
            return steps
        timing, spent = self.timing(cell.arm.tuner, cell.labels), self.tpp_seconds(cell.arm.tuner)
        return None if timing is None or spent is None else steps + max(1, round(spent / timing.finetune_step))

    def start_seconds(self, start: Start) -> float | None:
        """What a start takes to make; None where it could not be measured."""
        return self.tpp_seconds(start.arm.tuner) if start.origin is None else 0.0

    def tpp_seconds(self, tuner: str) -> float | None:
        """What one pretext stage of a tuner takes, on whichever images; None where it could not be measured."""
        timing = next((found for labels in self.labels if (found := self.timing(tuner, labels))), None)
        return None if timing is None else timing.tpp_rest + self.budget.tpp * timing.tpp_step

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


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep other processes out of a comparison's folder, from before it is made or replaced until its report is there.

    Raises:
        OutputError: Another process is at work in it.
    """
    prepare_folder(out.parent, resume=True)
    path = out.parent / f".{out.name}.lock"  # beside the folder, which --overwrite deletes
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"Another process is at work in {out}. Wait for it, or name another folder.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files; deleted after the release, it could be another's by then
            path.unlink(missing_ok=True)
        lock.release()


def open_comparison(
    experiment: Experiment,
    axes: Axes,
    out: Path | None,
    *,
    jobs: int | None = None,
    cluster: ClusterOptions | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Read the data once, and find out whether all cells can be made, before anything is deleted or written.

    Args:
        experiment: As written by the user.
        axes: What to compare. A resumed comparison keeps the axes it had, too.
        out: The output folder; a dry run may go without.
        jobs: Processes at once; as many as fit by default.
        cluster: Where the cells will be done, if not here.
        dry_run: Write nothing. With `out`, what is done there counts.
        resume: Go on with what the folder holds.
        overwrite: Replace what the folder holds.
        progress: Called with images decoded so far and in all.

    Raises:
        MedtppError: As `open_run`; there are too few labelled cases for a label count; or the folder holds a
            comparison of other data, with another metric, margin, precision or accelerator.
    """
    experiment = experiment if cluster is None else cluster.placed(experiment)
    axes = axes.resolved(experiment)
    if out is not None and not dry_run:
        refuse_folder(out, map(Path, axes.foreign), resume=resume, overwrite=overwrite)
    kept = out is not None and not overwrite and (out / _AXES).is_file()
    if out is not None and kept and (resume or dry_run):
        axes = axes.joined(Axes.load(read_json(out / _AXES)))
    base = base_experiment(experiment, axes)
    first = next(axes.cells(base))
    whole = cell_experiment(base, Cell(first.arm, "all", base.seed), tpp="tpp" in axes.inits)
    planned: list[Comparison] = []

    def verify(prepared: Prepared) -> None:
        foreign = foreign_pool(prepared, [Path(path) for path in axes.foreign], progress) if axes.foreign else None
        if out is not None and kept:
            _refuse_other_data(out, _inputs(prepared, foreign))
        planned.append(_plan(axes, base, prepared, foreign, jobs, cluster))

    if dry_run or out is None:
        verify(prepare(whole, split_file=out / "split.csv" if out and kept else None, progress=progress))
    else:
        prepared = open_run(whole, out, resume=resume, overwrite=overwrite, progress=progress, verify=verify)
        write_json(out / _AXES, asdict(planned[0].axes))
        write_json(out / _INPUTS, _inputs(prepared, planned[0].foreign))
    return planned[0]


def _plan(
    axes: Axes,
    base: Experiment,
    prepared: Prepared,
    foreign: PreparedData | None,
    jobs: int | None,
    cluster: ClusterOptions | None,
) -> Comparison:
    """The comparison on data that were prepared.

    Raises:
        MedtppError: A cell is not possible, a control sees what TPP sees in all its cells, or the metric is of another
            task.
    """
    axes = axes.measured(masks=bool(prepared.dataset.structures))
    base = settled(base, prepared.experiment)
    finetune: dict[Labels, int] = {}
    batch: dict[Labels, int] = {}
    for cell in axes.cells(base):
        if cell.labels not in finetune:
            resolved = arrange(prepared, cell_experiment(base, cell)).experiment.finetune
            finetune[cell.labels], batch[cell.labels] = number(resolved.steps), number(resolved.batch_size)
    tpp = prepared.experiment.tpp
    budget = Budget(number(tpp.steps) + number(tpp.head_warmup) if tpp.enabled else 0, finetune, batch)
    machine = share_machine(base, len(tuple(axes.cells(base))), jobs, cluster)
    comparison = Comparison(axes, base, prepared, budget, machine, foreign=foreign)
    if "tpp_labelled" in axes.inits and all(cell.arm.init != "tpp_labelled" for cell in comparison.cells):
        raise ConfigError(
            "TPP sees labelled images alone, all of them, so tpp_labelled would be the same. Name smaller numbers with "
            "--labels, give more images with --unlabelled, or leave tpp_labelled out of --init."
        )
    return comparison


def share_machine(
    experiment: Experiment, cells: int, jobs: int | None = None, cluster: ClusterOptions | None = None
) -> Machine:
    """How many processes with how many threads: one per GPU, or one per core, since many small ones are quickest.

    A cluster says itself what it gives.

    Raises:
        ConfigError: The accelerator is not there, or the number of processes is said twice.
    """
    if cluster is not None:
        if jobs is not None:
            raise ConfigError("--jobs is for this machine. With --cluster, at_once in its file says how many.")
        return Machine(min(cluster.at_once * cluster.processes, cells), cluster.threads, cluster.gpus)
    accelerator = choose_accelerator(experiment.hardware.accelerator)
    wanted = experiment.hardware.threads
    cores = torch.get_num_threads() if wanted == "auto" else wanted
    gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
    most = {"cuda": gpus, "mps": 1}.get(accelerator, cores)
    processes = max(1, min(jobs or most, cells))
    return Machine(processes, max(1, cores // processes), gpus)


def _inputs(prepared: Prepared, foreign: PreparedData | None) -> dict[str, Any]:
    """What the results of cells depend on, beside the experiment: a resumed comparison must have the same."""
    hardware = prepared.experiment.hardware
    wanted = hardware.accelerator
    accelerator = choose_accelerator(wanted) if wanted == "auto" else wanted  # which a cluster has, and this may not
    cases = {name: [case for case in prepared.dataset.cases if prepared.whole_split.get(case.id) == name]
             for name in ("train", "val", "test")}  # fmt: skip
    return {
        "accelerator": accelerator,
        "precision": choose_precision(hardware.precision, accelerator)[0],
        **{f"{name} cases": content(prepared, found) for name, found in cases.items()},
        "images of TPP": content(prepared, prepared.tpp),
        **({_FOREIGN: content(foreign, foreign.tpp)} if foreign else {}),
    }


def _refuse_other_data(out: Path, now: dict[str, Any]) -> None:
    before = read_json(out / _INPUTS) if (out / _INPUTS).is_file() else {}
    now = {name: value for name, value in now.items() if name in before or name != _FOREIGN}  # they may be added
    changed = [name for name in now if json.dumps(before.get(name)) != json.dumps(now[name])]
    if changed:
        raise ConfigError(
            f"{out} was made otherwise, so its cells and new ones could not be compared. Use --overwrite, or another "
            f"--out. What differs: {', '.join(changed)}."
        )

"""The cells of a comparison, measured and done on several processes of this machine, or on a cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from medtpp.data.cache import ImageCache
from medtpp.files import read_json, write_json
from medtpp.workflow.cluster import run_on_cluster
from medtpp.workflow.compare.comparison import Comparison, Machine, log_file
from medtpp.workflow.compare.plan import Arm, Cell, Start, cell_experiment
from medtpp.workflow.compare.work import Timing, do_cell, do_random_direction, do_tpp, refuse, time_steps
from medtpp.workflow.pool import Job, Outcome, run_jobs
from medtpp.workflow.prepare import PreparedData

_MEMORY_SHARE = 0.8  # of what is free, for all processes together
_TIMINGS = "timing.json"
_MEASURING = 60.0  # seconds for one timing, on a cluster


def measure(
    comparison: Comparison, out: Path | None, *, dry_run: bool = False, known: Mapping[str, Timing] | None = None
) -> Comparison:
    """The same comparison with its steps timed, on as many processes as memory allows.

    What was measured before in the folder is taken from there, so that a resumed "longer" has the same steps.

    Args:
        comparison: Opened.
        out: Of the comparison, if there is one.
        dry_run: Write nothing there.
        known: Timings of a comparison of the same data and backbone, not to be measured again.

    Raises:
        MedtppError: As `run_on_cluster`.
    """
    known = dict(known or {})
    if out is not None and (out / _TIMINGS).is_file():
        known |= {name: Timing(**values) for name, values in read_json(out / _TIMINGS).items()}
    cluster = comparison.machine.cluster
    whole = comparison.machine if cluster is None else replace(comparison.machine, processes=cluster.processes)
    alone = replace(whole, processes=1)  # once more, for what failed: all at once may need too much memory
    shared = None if cluster is None else Path.cwd() if out is None or dry_run else out.parent
    with TemporaryDirectory(prefix=".medtpp-", dir=shared, ignore_cleanup_errors=True) as scratch:
        for machine in [whole] if whole == alone else [whole, alone]:
            folder = Path(scratch).absolute() / str(machine.processes)
            jobs = list(_timing_jobs(comparison, machine, known, folder))
            for outcome in _run(machine, jobs, [comparison], folder):
                if outcome.error is None:
                    known[outcome.job.name.rpartition(" ")[0]] = outcome.value
    if out is not None and not dry_run:
        write_json(out / _TIMINGS, {name: asdict(timing) for name, timing in known.items()})
    machine = comparison.machine if cluster else _within_memory(comparison.machine, known)
    return replace(comparison, timings=known, machine=machine)


def run_cells(comparison: Comparison, out: Path) -> Iterator[Outcome]:
    """Do what is not done yet; gives each start and cell as it ends. A failure is kept beside the log.

    Raises:
        MedtppError: As `run_on_cluster`.
    """
    return run_together({"": (comparison, out)}, comparison.machine, out)


def run_together(comparisons: Mapping[str, tuple[Comparison, Path]], machine: Machine, out: Path) -> Iterator[Outcome]:
    """Do what is not done yet of several comparisons on one set of processes; else as `run_cells`.

    Args:
        comparisons: With their folders, by what is put before the names of their jobs.
        machine: For all.
        out: The folder of all, where a cluster is told what to do.
    """
    jobs: list[Job] = []
    names: dict[str, str] = {}
    for prefix, (comparison, folder) in comparisons.items():
        for job in _jobs(comparison, folder):
            after = None if job.after is None else prefix + job.after
            jobs.append(replace(job, name=prefix + job.name, after=after))
            names[jobs[-1].name] = job.name
    for outcome in _run(machine, jobs, [comparison for comparison, _ in comparisons.values()], out / "cluster"):
        failure = outcome.job.log.with_suffix(".json")
        if outcome.error is None:
            failure.unlink(missing_ok=True)
        else:
            write_json(failure, {"name": names[outcome.job.name], "reason": outcome.error})
        yield outcome


def _run(machine: Machine, jobs: list[Job], comparisons: Sequence[Comparison], folder: Path) -> Iterator[Outcome]:
    if machine.cluster is None or not jobs:
        return run_jobs(jobs, processes=machine.processes, threads=machine.threads, gpus=machine.gpus)
    data = [one for comparison in comparisons for one in (comparison.prepared, comparison.foreign)]
    reads = dict.fromkeys(_stored(one) for one in data if one is not None)
    return run_on_cluster(jobs, machine.cluster, folder, reads=list(reads))


def _stored(data: PreparedData) -> Path:
    """Where its images lie, for the processes to read."""
    return data.store.path if isinstance(data.store, ImageCache) else data.store.folder


def _timing_jobs(comparison: Comparison, machine: Machine, known: dict[str, Timing], scratch: Path) -> Iterator[Job]:
    """Each tuner at each batch size on every process at once, for they share caches and memory bandwidth.

    Further pretext tasks are measured at one label count alone, since fine-tuning costs the same after each of them.
    """
    begun = set(known)
    tuners = dict.fromkeys(arm.tuner for arm in comparison.arms)
    wanted = [(Arm(tuner, "tpp"), labels) for tuner in tuners for labels in comparison.labels]
    wanted += [(arm, comparison.labels[0]) for arm in comparison.arms if arm.init == "tpp" and arm.pretext]
    for pretext, labels in wanted:
        tuner = pretext.tuner
        key = comparison.timing_key(tuner, labels, pretext.pretext)
        if key in begun:
            continue
        begun.add(key)
        arm = pretext if pretext in comparison.arms else Arm(tuner, "standard")
        cell = Cell(arm, labels, comparison.base.seed)
        experiment = cell_experiment(comparison.base, cell, threads=machine.threads)
        for copy in range(machine.processes):
            folder = scratch / key / str(copy)
            call = functools.partial(time_steps, comparison.prepared, experiment, folder)
            yield Job(f"{key} {copy}", call, scratch / "output.log", seconds=_MEASURING)


def _jobs(comparison: Comparison, out: Path) -> Iterator[Job]:
    """The starts, each just before the first cell that needs it, and the cells."""
    missing, begun = set(comparison.missing_starts(out)), set[Start]()
    for cell in comparison.missing_cells(out):
        after = None
        for start in cell.starts:
            if start in missing and start not in begun:
                begun.add(start)
                folder = start.folder(out)
                work, seconds = _work_of_start(comparison, start, out), comparison.start_seconds(start)
                yield Job(start.name, work, log_file(out, folder), after, seconds)
            after = start.name if start in missing else None
        folder = cell.folder(out)
        adapter = cell.starts[-1].folder(out) / "adapter" if cell.starts else None
        work = _work(comparison, cell, folder, adapter)
        yield Job(cell.name, work, log_file(out, folder), after, comparison.seconds(cell))


def _work_of_start(comparison: Comparison, start: Start, out: Path) -> Callable[[], object]:
    experiment = cell_experiment(comparison.base, start.cell, threads=comparison.machine.threads)
    folder, init = start.folder(out), start.arm.init
    if start.origin is not None:
        return functools.partial(do_random_direction, experiment, start.origin.folder(out) / "adapter", folder)
    data = comparison.foreign if init == "tpp_foreign" and comparison.foreign else comparison.prepared
    return functools.partial(do_tpp, data, experiment, folder, labelled=init == "tpp_labelled")


def _work(comparison: Comparison, cell: Cell, folder: Path, start: Path | None) -> Callable[[], object]:
    steps = comparison.steps(cell)
    if steps is None:
        return functools.partial(refuse, "Its steps are counted by the time that TPP takes, which was not measured.")
    experiment = cell_experiment(comparison.base, cell, steps=steps, threads=comparison.machine.threads)
    return functools.partial(do_cell, comparison.prepared, experiment, folder, start)


def _within_memory(machine: Machine, timings: dict[str, Timing]) -> Machine:
    """Fewer processes where the memory that is free would not hold them all. GPUs look after themselves."""
    peak = max((timing.memory_mib for timing in timings.values()), default=0.0)
    if machine.gpus or not peak:
        return machine
    fit = int(_MEMORY_SHARE * psutil.virtual_memory().available / 2**20 / peak)
    processes = max(1, min(machine.processes, fit))
    return Machine(processes, machine.threads * machine.processes // processes)

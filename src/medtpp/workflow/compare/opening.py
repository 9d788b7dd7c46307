"""Opening a comparison: its data are read, its cells found possible, its folder made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from medtpp import backbones
from medtpp.config import BackboneOptions, Experiment, experiment_schema
from medtpp.data.holdout import Holdout
from medtpp.errors import ConfigError, OutputError
from medtpp.files import MARKER, prepare_folder, read_json, write_json
from medtpp.seeds import Seeds
from medtpp.training.device import choose_accelerator, choose_precision
from medtpp.training.stage import number
from medtpp.training.tpp import make_pretext, require_pair, resolve_pretext
from medtpp.workflow.cluster import ClusterOptions
from medtpp.workflow.compare.axes import AUTO, Axes
from medtpp.workflow.compare.comparison import Budget, Comparison, Machine
from medtpp.workflow.compare.plan import (
    PRIMED,
    Arm,
    Cell,
    Labels,
    base_experiment,
    cell_experiment,
    refuse_together,
    settled,
)
from medtpp.workflow.experiment import validate
from medtpp.workflow.guards import refuse_changes, refuse_other
from medtpp.workflow.prepare import Prepared, PreparedData, arrange, foreign_pool, prepare
from medtpp.workflow.run import content, keep_run, read_run
from medtpp.workflow.steps import refuse_folder

Progress = Callable[[int, int], None]
STUDY = "study.json"
_AXES, _INPUTS = "axes.json", "inputs.json"
_FOREIGN, _HELD_OUT, _EXPERIMENT = "foreign images", "test cases are", "experiment"
_IMAGES = "images of TPP"
_FREE = ("data.labels",)  # of the experiment: the axes say it, and may grow
_OF_TPP = ("tpp.", "pretext.")  # of the experiment: nothing has come of it as long as no arm is pre-trained


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
            comparison by another experiment, of other data, with another metric, margin, precision or accelerator.
    """
    comparison = read_comparison(
        experiment,
        axes,
        out,
        jobs=jobs,
        cluster=cluster,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    if out is not None and not dry_run:
        keep_comparison(comparison, out, overwrite=overwrite)
    return comparison


def read_comparison(
    experiment: Experiment,
    axes: Axes,
    out: Path | None,
    *,
    jobs: int | None = None,
    cluster: ClusterOptions | None = None,
    held_out: Holdout | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """The first half of `open_comparison`: all that may be refused. Nothing in the folder is changed.

    Args:
        experiment: As written by the user.
        axes: What to compare.
        out: The output folder.
        jobs: Processes at once.
        cluster: Where the cells will be done, if not here.
        held_out: Take a fold or a site as test cases.
        dry_run: Write nothing.
        resume: Go on with what the folder holds.
        overwrite: What the folder holds will be replaced.
        progress: Called with images decoded so far and in all.

    Raises:
        MedtppError: As `open_comparison`.
    """
    experiment = experiment if cluster is None else cluster.placed(experiment)
    axes = axes.resolved(experiment)
    if out is not None and (out / STUDY).is_file():
        raise OutputError(f"{out} holds a study, whose comparisons lie in folders of it. Name another output folder.")
    if out is not None and not dry_run:
        refuse_folder(out, map(Path, axes.foreign), resume=resume, overwrite=overwrite)
    kept = out is not None and not overwrite and (out / _AXES).is_file()
    begun_with_tpp = True
    if out is not None and kept and (resume or dry_run):
        before = Axes.load(read_json(out / _AXES)).resolved(experiment)
        begun_with_tpp = any(arm.init in PRIMED for arm in before.arms(experiment))
        axes = axes.joined(before)
    base = _with_pretexts(base_experiment(experiment, axes), axes)
    arms = axes.arms(base)
    with_tpp = sorted((arm for arm in arms if arm.init == "tpp"), key=lambda arm: arm.pretext)  # its own task first
    # Not "scratch": what is prepared is of the backbone that all others share.
    first = next(iter(with_tpp), arms[0] if arms[0].init != "scratch" else Arm(arms[0].tuner, "standard"))
    whole = cell_experiment(base, Cell(first, "all", base.seed))
    if dry_run or out is None:
        split_file = out / "split.csv" if out and kept else None
        prepared = prepare(whole, split_file=split_file, held_out=held_out, progress=progress)
    else:
        prepared = read_run(whole, out, held_out=held_out, resume=resume, overwrite=overwrite, progress=progress)
    foreign = foreign_pool(prepared, [Path(path) for path in axes.foreign], progress) if axes.foreign else None
    comparison = _plan(axes, base, prepared, foreign, jobs, cluster, held_out)
    if out is not None and not overwrite and (kept or resume):
        _refuse_other_experiment(out, comparison, free=_FREE if begun_with_tpp else (*_FREE, *_OF_TPP))
        _refuse_other_data(out, _inputs(comparison), free=() if begun_with_tpp else (_IMAGES,))
    return comparison


def is_comparison(out: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return (out / _AXES).is_file()


def keep_comparison(comparison: Comparison, out: Path, *, overwrite: bool = False) -> None:
    """The second half of `open_comparison`: replace what is in the folder, if asked for, and write what is compared."""
    if overwrite:
        prepare_folder(out, overwrite=True)
    write_json(out / _INPUTS, _inputs(comparison))  # first: it says what all else belongs to, if this is killed
    keep_run(comparison.prepared, comparison.base, out)
    write_json(out / _AXES, asdict(comparison.axes))


def _with_pretexts(base: Experiment, axes: Axes) -> Experiment:
    """The same with its own pretext task known, where further ones are compared with it.

    Raises:
        ConfigError: Pretext tasks fit a tuner or the backbone badly; all are told.
    """
    if not any(arm.pretext for arm in axes.arms(base)):
        return base
    backbone = backbones.load(base.backbone)
    base = base.model_copy(update={"pretext": resolve_pretext(base.pretext, backbone.spec, axes.tuners[0])})
    problems = []
    for arm in axes.arms(base):
        if arm.init != "tpp":
            continue
        options = cell_experiment(base, Cell(arm, "all", base.seed)).pretext
        try:
            pretext, _ = make_pretext(options, backbone, Seeds(base.seed))
            require_pair(arm.tuner, pretext)
        except ConfigError as error:
            problems.append(error.message)
    refuse_together("Pretext tasks do not fit:", problems)
    return base


def _plan(
    axes: Axes,
    base: Experiment,
    prepared: Prepared,
    foreign: PreparedData | None,
    jobs: int | None,
    cluster: ClusterOptions | None,
    held_out: Holdout | None,
) -> Comparison:
    """The comparison on data that were prepared.

    Raises:
        MedtppError: A cell is not possible, a control sees what TPP sees in all its cells, the metric is of another
            task, or random weights make another network.
    """
    axes = axes.measured(masks=bool(prepared.dataset.structures))
    base = settled(base, prepared.experiment)
    known = (base.pretext.name if name == AUTO else name for name in axes.pretexts)
    axes = replace(axes, pretexts=tuple(dict.fromkeys(known)))
    if "scratch" in axes.extras:
        _require_same_network(base.backbone, prepared.preprocessing.patch)
    tpp: dict[str, int] = {}
    finetune: dict[Labels, int] = {}
    batch: dict[Labels, int] = {}
    for cell in axes.cells(base):
        new = cell.arm.init == "tpp" and cell.arm.pretext not in tpp
        if cell.labels in finetune and not new:
            continue
        resolved = arrange(prepared, cell_experiment(base, cell)).experiment
        finetune[cell.labels] = number(resolved.finetune.steps)
        batch[cell.labels] = number(resolved.finetune.batch_size)
        if new:
            tpp[cell.arm.pretext] = number(resolved.tpp.steps) + number(resolved.tpp.head_warmup)
    machine = share_machine(base, len(tuple(axes.cells(base))), jobs, cluster)
    comparison = Comparison(
        axes, base, prepared, Budget(tpp, finetune, batch), machine, foreign=foreign, held_out=held_out
    )
    if "tpp_labelled" in axes.inits and all(cell.arm.init != "tpp_labelled" for cell in comparison.cells):
        raise ConfigError(
            "TPP sees labelled images alone, all of them, so tpp_labelled would be the same. Name smaller numbers with "
            "--labels, give more images with --unlabelled, or leave tpp_labelled out of --init."
        )
    return comparison


def _require_same_network(options: BackboneOptions, size: tuple[int, ...]) -> None:
    """Refuse the arm "scratch" where the weights decide how large the network is: random ones then tell nothing."""
    shapes = [
        {name: value.shape for name, value in backbones.load(each, image_size=size).encoder.state_dict().items()}
        for each in (options, backbones.untrained(options))
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"The weights of {options.name} decide how large the network is, and with random ones it is another. "
            "Leave scratch out of --arm, or give the backbone a name that says its size."
        )


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
        return Machine(min(cluster.at_once * cluster.processes, cells), cluster.threads, cluster.gpus, cluster)
    accelerator = choose_accelerator(experiment.hardware.accelerator)
    wanted = experiment.hardware.threads
    cores = torch.get_num_threads() if wanted == "auto" else wanted
    gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
    most = {"cuda": gpus, "mps": 1}.get(accelerator, cores)
    processes = max(1, min(jobs or most, cells))
    return Machine(processes, max(1, cores // processes), gpus)


def _inputs(comparison: Comparison) -> dict[str, Any]:
    """What the results of cells depend on: a resumed comparison must have the same."""
    prepared, foreign, held_out = comparison.prepared, comparison.foreign, comparison.held_out
    hardware = prepared.experiment.hardware
    wanted = hardware.accelerator
    accelerator = choose_accelerator(wanted) if wanted == "auto" else wanted  # which a cluster has, and this may not
    cases = {name: [case for case in prepared.dataset.cases if prepared.whole_split.get(case.id) == name]
             for name in ("train", "val", "test")}  # fmt: skip
    return {
        "accelerator": accelerator,
        "precision": choose_precision(hardware.precision, accelerator)[0],
        **{f"{name} cases": content(prepared, found) for name, found in cases.items()},
        _IMAGES: content(prepared, prepared.tpp),
        **({_FOREIGN: content(foreign, foreign.tpp)} if foreign else {}),
        **({_HELD_OUT: held_out.title} if held_out else {}),
        _EXPERIMENT: _without_paths(comparison.base).model_dump(mode="json"),
    }


def _without_paths(experiment: Experiment) -> Experiment:
    """The same wherever its images lie, which their hashes tell apart."""
    data = experiment.data.model_copy(update={"path": Path(), "unlabelled": []})
    return experiment.model_copy(update={"data": data})


def _refuse_other_experiment(out: Path, comparison: Comparison, *, free: tuple[str, ...]) -> None:
    """What cells derive from is compared, not a cell's own experiment, which lacks other tuners' and budgets' options.

    Folders of older versions hold the first arm's at all labels; there, the budgets of cells are looked at, too.
    """
    before = read_json(out / _INPUTS).get(_EXPERIMENT) if (out / _INPUTS).is_file() else None
    if before is not None:  # options that came with a later version have their defaults
        refuse_other(out, validate(experiment_schema(), before, str(out / _INPUTS)), comparison.base, free=free)
        return
    refuse_changes(out, comparison.prepared)
    problems = []
    for cell in comparison.cells:
        done = cell.folder(out) / "finetune" / MARKER
        if cell.seed != comparison.base.seed or cell.arm.init == "longer" or not done.is_file():
            continue  # draws of other seeds may make other batches; "longer" has its steps from the clock
        budget, told = comparison.budget, read_json(done)
        for name, now in (("steps", budget.finetune[cell.labels]), ("batch_size", budget.batch[cell.labels])):
            if told[name] != now:
                problems.append(f"finetune.{name} with {cell.labels} labels: {told[name]} there, {now} now")
    if problems:
        raise ConfigError(
            f"{out} was made with other budgets. Go on with the experiment that it was begun with, or use --overwrite "
            "or another --out. What differs:",
            dict.fromkeys(problems),
        )


def _refuse_other_data(out: Path, now: dict[str, Any], *, free: tuple[str, ...]) -> None:
    """Foreign images may be added, and what is `free` may be other than it was."""
    if not (out / _INPUTS).is_file() and not (out / "cells").is_dir():  # killed before it had begun
        return
    before = read_json(out / _INPUTS) if (out / _INPUTS).is_file() else {}
    now = {name: value for name, value in now.items() if name in before or name != _FOREIGN}
    compared = [name for name in now if name not in (_EXPERIMENT, *free)]
    changed = [name for name in compared if json.dumps(before.get(name)) != json.dumps(now[name])]
    if changed:
        raise ConfigError(
            f"{out} was made otherwise, so its cells and new ones could not be compared. Use --overwrite, or another "
            f"--out. What differs: {', '.join(changed)}."
        )


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

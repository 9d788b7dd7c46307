"""What a process of a comparison does: TPP, a cell, or a measurement of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from medtpp.config import Experiment
from medtpp.errors import ConfigError
from medtpp.files import MARKER, read_json, write_json
from medtpp.training.random_direction import run_random_direction
from medtpp.workflow.prepare import Prepared, PreparedData, arrange
from medtpp.workflow.run import evaluate_stage, finetune_stage, tpp_stage, weights_digest
from medtpp.workflow.steps import step

MEASURED = 8  # steps; the first ones are slower
RESAMPLES = 200  # of a cell's own intervals, which nobody compares


@dataclass(frozen=True)
class Timing:
    """What a tuner costs on this machine, with as many processes at work as there will be.

    Attributes:
        tpp_step, finetune_step: Seconds per step.
        tpp_rest, cell_rest: Seconds that a TPP stage or a cell takes beside its steps.
        memory_mib: Peak of the process.
    """

    tpp_step: float
    finetune_step: float
    tpp_rest: float
    cell_rest: float
    memory_mib: float


def do_tpp(data: PreparedData, experiment: Experiment, folder: Path, *, labelled: bool) -> None:
    """A pretext stage.

    Args:
        data: With the images that it may see.
        experiment: Of the cells that start from it.
        folder: Its own.
        labelled: It sees the cells' own training cases alone.
    """
    prepared = arrange(data, experiment)
    tpp_stage(replace(prepared, tpp=prepared.cases("train")) if labelled else prepared, folder, _tell)


def do_random_direction(experiment: Experiment, pretrained: Path, folder: Path) -> None:
    """A start as far from the tuner's own as TPP's adapter in `pretrained` is, in a random direction."""
    step(folder, {"TPP": weights_digest(pretrained)}, lambda: run_random_direction(experiment, pretrained, folder))


def do_cell(data: PreparedData, experiment: Experiment, folder: Path, start: Path | None) -> dict[str, float | None]:
    """Fine-tune and test; gives the test metrics.

    Args:
        data: Prepared once for all cells.
        experiment: Of the cell.
        folder: Its own; the marker is written last.
        start: The adapter that it starts from, or None.
    """
    prepared = arrange(data, experiment)
    adapter = finetune_stage(prepared, folder / "finetune", _tell, start=start)
    evaluation = evaluate_stage(prepared, adapter, folder / "evaluation", mistakes=False, resamples=RESAMPLES)
    metrics = {name: estimate.value for name, estimate in evaluation.metrics.items()}
    parts = {name: len(prepared.cases(name)) for name in ("train", "val", "test")}
    write_json(folder / MARKER, {"cases": parts, "metrics": metrics})
    return metrics


def time_steps(data: PreparedData, experiment: Experiment, folder: Path) -> Timing:
    """Time a few steps of both stages, in a folder that somebody else takes away."""
    prepared = arrange(data, experiment)
    tpp_step = tpp_rest = memory = 0.0
    start = None
    if prepared.experiment.tpp.enabled:
        # The first stage of a process also starts libraries up, for which "longer" would get steps.
        tpp_stage(_shortened(prepared, "tpp", head_warmup=0, steps=1), folder / "first", _tell)
        short = _shortened(prepared, "tpp", head_warmup=0)
        tpp_step, tpp_rest = _timed(lambda: tpp_stage(short, folder / "tpp", _tell), folder / "tpp")
        start = folder / "tpp" / "adapter"
        memory = read_json(folder / "tpp" / MARKER)["peak_memory_mib"]
    short = _shortened(prepared, "finetune")

    def cell() -> None:
        adapter = finetune_stage(short, folder / "finetune", _tell, start=start)
        evaluate_stage(short, adapter, folder / "evaluation", mistakes=False, resamples=RESAMPLES)

    finetune_step, cell_rest = _timed(cell, folder / "finetune")
    # Each stage counts its own peak; the test comes after both.
    memory = max(memory, read_json(folder / "finetune" / MARKER)["peak_memory_mib"])
    return Timing(tpp_step, finetune_step, tpp_rest, cell_rest, memory)


def refuse(reason: str) -> None:
    """The work of a cell that cannot be done.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(reason)


def _shortened(prepared: Prepared, section: str, **update: Any) -> Prepared:
    options = getattr(prepared.experiment, section)
    options = options.model_copy(update={"steps": MEASURED, "checkpoint_every": 0} | update)
    return replace(prepared, experiment=prepared.experiment.model_copy(update={section: options}))


def _timed(work: Callable[[], object], stage: Path) -> tuple[float, float]:
    """Seconds per step of a stage, and what the work took beside."""
    began = time.perf_counter()
    work()
    whole = time.perf_counter() - began
    told = read_json(stage / MARKER)
    rows = [line.split(",") for line in (stage / "log.csv").read_text().splitlines()]
    column = rows[0].index("images_per_second")
    steps = [told["batch_size"] / float(row[column]) for row in rows[1:]]
    return median(steps[MEASURED // 2 :]), max(0.0, whole - sum(steps))


def _tell(text: str) -> None:
    print(text)

"""What a process of a comparison does: TPP, a cell, or a measurement of both."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medtpp.config import Experiment
from medtpp.files import MARKER, read_json, write_json
from medtpp.training.memory import PeakMemory
from medtpp.workflow.prepare import Prepared, PreparedData, arrange
from medtpp.workflow.run import evaluate_stage, finetune_stage, tpp_stage

MEASURED = 8  # steps; the first ones are slower


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


def do_tpp(data: PreparedData, experiment: Experiment, folder: Path) -> None:
    """The pretext stage that all label counts of a tuner and seed share."""
    tpp_stage(arrange(data, experiment), folder, _tell)


def do_cell(data: PreparedData, experiment: Experiment, folder: Path, start: Path | None) -> dict[str, float | None]:
    """Fine-tune and test; gives the test metrics.

    Args:
        data: Prepared once for all cells.
        experiment: Of the cell.
        folder: Its own; the marker is written last.
        start: The TPP stage's adapter, or None.
    """
    prepared = arrange(data, experiment)
    adapter = finetune_stage(prepared, folder / "finetune", _tell, start=start)
    evaluation = evaluate_stage(prepared, adapter, folder / "evaluation", mistakes=False)
    metrics = {name: estimate.value for name, estimate in evaluation.metrics.items()}
    parts = {name: len(prepared.cases(name)) for name in ("train", "val", "test")}
    write_json(folder / MARKER, {"cases": parts, "metrics": metrics})
    return metrics


def time_steps(data: PreparedData, experiment: Experiment) -> Timing:
    """Time a few steps of both stages, in a folder that goes away."""
    prepared = arrange(data, experiment)
    memory = PeakMemory(torch.device("cpu"))
    tpp_step = tpp_rest = 0.0
    start = None
    with tempfile.TemporaryDirectory(prefix="medtpp-") as name:
        folder = Path(name)
        if prepared.experiment.tpp.enabled:
            short = _shortened(prepared, "tpp", head_warmup=0)
            tpp_step, tpp_rest = _timed(lambda: tpp_stage(short, folder / "tpp", _tell), folder / "tpp")
            start = folder / "tpp" / "adapter"
        short = _shortened(prepared, "finetune")

        def cell() -> None:
            adapter = finetune_stage(short, folder / "finetune", _tell, start=start)
            evaluate_stage(short, adapter, folder / "evaluation", mistakes=False)

        finetune_step, cell_rest = _timed(cell, folder / "finetune")
    return Timing(tpp_step, finetune_step, tpp_rest, cell_rest, memory.mib())


def _shortened(prepared: Prepared, section: str, **update: Any) -> Prepared:
    options = getattr(prepared.experiment, section)
    options = options.model_copy(update={"steps": MEASURED, "checkpoint_every": 0, **update})
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

"""When fine-tuning after TPP reaches what fine-tuning without it ends with, and what it costs until there."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from medtpp.evaluation.convergence import first_reach, median_of
from medtpp.report.curves import smooth
from medtpp.report.read import read_table
from medtpp.report.schema_study import ReachFile
from medtpp.workflow.study.finished import Finished, cell_folder
from medtpp.workflow.study.sets import DataSet
from medtpp.workflow.study.words import Pair

Measure = Literal["validation", "training loss"]


@dataclass(frozen=True)
class Reach:
    """Two trainings of one seed; infinite where the first never gets there.

    Attributes:
        measure: What is followed.
        total: Steps of the baseline.
        steps: Until the arm is as good as the baseline in the end.
        own: Until the baseline first is, by the same rule.
        cost: Time of TPP and of fine-tuning until there over that of the baseline; not-a-number where unknown.
    """

    measure: Measure
    total: float
    steps: float
    own: float
    cost: float


def reach_of(one: DataSet, pair: Pair, level: str) -> ReachFile | None:
    """Medians over the seeds; backbones that share test cases and seeds count as one. None without a pair of logs."""
    found: dict[tuple[int, int], list[Reach]] = {}
    for part in one.parts:
        for seed, reach in _pairs(part, pair, one.levels.get(level, "")):
            found.setdefault((part.number, seed), []).append(reach)
    every = [reach for group in found.values() for reach in group]
    if not every:
        return None
    measure = every[0].measure
    groups = [[reach for reach in group if reach.measure == measure] for group in found.values()]
    groups = [group for group in groups if group]
    share = _medians(groups, "steps", relative=True)
    cost = _medians(groups, "cost")
    middle = median_of(share, one.coverage)
    costs = None if np.isnan(cost).any() else median_of(cost, one.coverage)
    return ReachFile(
        dataset=one.name,
        level=level,
        arm=pair.arm,
        baseline=pair.baseline,
        measure=measure,
        seeds=len(groups),
        reached=sum(math.isfinite(value) for value in share),
        total=float(np.median([reach.total for group in groups for reach in group])),
        steps=_finite(float(np.median(_medians(groups, "steps")))),
        share=_finite(middle.value),
        interval=middle.low is not None,
        share_low=_finite(middle.low),
        share_high=_finite(middle.high),
        own_share=_finite(float(np.median(_medians(groups, "own", relative=True)))),
        costed=costs is not None,
        cost=None if costs is None else _finite(costs.value),
        cost_low=None if costs is None else _finite(costs.low),
        cost_high=None if costs is None else _finite(costs.high),
    )


def _medians(groups: list[list[Reach]], field: str, *, relative: bool = False) -> list[float]:
    return [
        float(np.median([getattr(reach, field) / (reach.total if relative else 1.0) for reach in group]))
        for group in groups
    ]


def _pairs(part: Finished, pair: Pair, labels: str) -> Iterator[tuple[int, Reach]]:
    """Each seed that both arms have, with their trainings."""
    cells = part.cells[(part.cells.status == "done") & (part.cells.labels == labels)]
    ours, theirs = (
        {int(row["seed"]): row for row in cells[cells.arm == arm].to_dict("records")}
        for arm in (pair.arm, pair.baseline)
    )
    for seed in sorted(ours.keys() & theirs.keys()):
        logs = [_log(part, row) for row in (ours[seed], theirs[seed])]
        yield seed, compare_logs(logs[0], logs[1], _seconds(ours[seed], theirs[seed]))


def _log(part: Finished, row: dict[Hashable, Any]) -> pd.DataFrame:
    path = cell_folder(part.part.folder, row["folder"]) / "finetune" / "log.csv"
    return read_table(path, ("step", "loss"), ("step", "loss", "validation"))


def _seconds(ours: dict[Hashable, Any], theirs: dict[Hashable, Any]) -> tuple[float, float, float]:
    """Of TPP, of fine-tuning after it, and of fine-tuning without it; not-a-number where they were not recorded."""
    return ours.get("tpp_seconds", np.nan), ours.get("seconds", np.nan), theirs.get("seconds", np.nan)


def compare_logs(arm: pd.DataFrame, baseline: pd.DataFrame, seconds: tuple[float, float, float]) -> Reach:
    """When an arm's log is first as good as its baseline's last row.

    The score on validation cases is followed where both logs have one, else the smoothed training loss, which both arms
    of a seed have of the same batches.

    Args:
        arm: Columns step, loss, and validation where it was computed.
        baseline: The same of what it is compared with.
        seconds: Of the pretext stage, of the arm's fine-tuning and of the baseline's.
    """
    if all("validation" in log and log.validation.notna().any() for log in (arm, baseline)):
        measure: Measure = "validation"
        arm, baseline = (log[log.validation.notna()] for log in (arm, baseline))
        ours, theirs = arm.validation, baseline.validation
    else:
        measure, ours, theirs = "training loss", smooth(arm.loss), smooth(baseline.loss)
    target, lower = float(theirs.iloc[-1]), measure == "training loss"
    steps = first_reach(arm.step, ours, target, lower_is_better=lower)
    own = first_reach(baseline.step, theirs, target, lower_is_better=lower)
    pretext, spent, whole = seconds
    cost = (pretext + spent * steps / float(arm.step.iloc[-1])) / whole if whole else np.nan
    return Reach(measure, float(baseline.step.iloc[-1]), steps, own, float(cost))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

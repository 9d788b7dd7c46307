"""A finished comparison, read for a study's summary: its file, its cells, and the draws behind its intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medtpp.errors import DataError
from medtpp.evaluation.bootstrap import Bootstrap
from medtpp.evaluation.paired import Difference, Scorable, Scores, difference, drawn_difference, resample
from medtpp.report.read import read_experiment, read_model, read_table
from medtpp.report.schema import ComparisonFile
from medtpp.seeds import Seeds
from medtpp.workflow.compare.summary import read_result
from medtpp.workflow.study.parts import StudyPart

_NUMBERS = ("seed", "steps", "seconds", "tpp_seconds")


@dataclass(frozen=True, eq=False)
class Finished:
    """A comparison of a study.

    Attributes:
        part: Which.
        file: comparison.json.
        cells: cells.csv.
        scores: By arm and labels; they begin with the draws of the comparison's own intervals.
        number: Of what it was tested on: the same for backbones that share test cases and seeds, which so stay paired.
    """

    part: StudyPart
    file: ComparisonFile
    cells: pd.DataFrame
    scores: dict[tuple[str, str], Scores]
    number: int

    @property
    def seeds(self) -> int:
        """How many seeds the cells that are done have."""
        return len({seed for scores in self.scores.values() for seed in scores.seeds})

    def difference(self, arm: str, baseline: str, labels: str) -> Difference | None:
        """The paired difference of two arms; None where it cannot be computed."""
        ours, theirs = self.scores.get((arm, labels)), self.scores.get((baseline, labels))
        if ours is None or theirs is None or set(ours.seeds).isdisjoint(theirs.seeds):
            return None
        found = difference(ours, theirs)
        return None if found.estimate.value is None else found

    def mean(self, arm: str, labels: str, seeds: frozenset[int] | None = None) -> Difference | None:
        """An arm's mean score, with its draws, over all or some of its seeds; None where there is none."""
        scores = self.scores.get((arm, labels))
        if scores is not None and seeds is not None:
            shared = sorted(seeds & set(scores.seeds))
            scores = scores.select(shared) if shared else None
        if scores is None or scores.mean().value is None:
            return None
        return drawn_difference(
            float(scores.values.mean()), scores.draws, scores.bootstrap.level, dict.fromkeys(scores.seeds)
        )


def read_finished(part: StudyPart, resamples: int) -> Finished:
    """Read a comparison, as far as its cells are done.

    Args:
        part: Which.
        resamples: How many draws the study takes; no fewer than the comparison took.

    Raises:
        DataError: It has not come to its end, or a file is missing or broken.
    """
    folder = part.folder
    if not (folder / "comparison.json").is_file():
        what = "not finished: it has no comparison.json" if folder.is_dir() else "not there"
        raise DataError(f"The comparison {folder.name} is {what}.")
    file = read_model(folder / "comparison.json", ComparisonFile)
    cells = read_table(folder / "cells.csv", ("arm", "labels", "seed", "status", "folder"), _NUMBERS)
    # A plain int: ruamel's own kind of 0 has another name, which draws by name would tell apart.
    root = int(read_experiment(folder / "experiment.yaml").values.get("seed", 0))
    bootstrap = Bootstrap(max(file.resamples, resamples), file.level, Seeds(root).number("bootstrap"), file.unit)
    runs: dict[tuple[str, str], dict[int, Scorable]] = {}
    for row in cells[cells.status == "done"].to_dict("records"):
        result = read_result(cell_folder(folder, row["folder"]))
        runs.setdefault((row["arm"], row["labels"]), {})[int(row["seed"])] = result
    scores = {key: resample(found, file.metric, bootstrap) for key, found in runs.items()}
    if not scores:
        raise DataError(f"No cell of the comparison {folder.name} is done.")
    tests = sorted({one.test for one in scores.values()})
    number = Seeds(root).number("across", part.dataset, part.fold, part.site, *tests)
    return Finished(part, file, cells, scores, number)


def cell_folder(folder: Path, name: object) -> Path:
    """A cell's folder. Raises DataError where it lies outside of the comparison."""
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"cells.csv of {folder.name} names a folder outside: {name!r}. Copy the folder again, whole.")
    return path

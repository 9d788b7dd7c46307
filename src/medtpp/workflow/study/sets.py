"""The data sets of a study: the comparisons of each together, and their label counts side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from medtpp.errors import DataError
from medtpp.evaluation.across import average
from medtpp.evaluation.paired import LOWER_IS_BETTER, Difference
from medtpp.report.read import read_model
from medtpp.report.schema import ArmFile, ComparisonFile
from medtpp.report.schema_study import LevelFile, SetFile, Unit
from medtpp.workflow.compare.plan import REFERENCES
from medtpp.workflow.study.finished import Finished
from medtpp.workflow.study.parts import StudyPart
from medtpp.workflow.study.words import Pair, level_title, rank_name

ALL = "all"


@dataclass(frozen=True, eq=False)
class DataSet:
    """All comparisons on a data set.

    Attributes:
        name: Of the data set.
        parts: Those that were read.
        levels: Level to the labels of comparison.json.
    """

    name: str
    parts: Sequence[Finished]
    levels: dict[str, str]

    @property
    def sign(self) -> int:
        """-1 where less of the metric is better."""
        return -1 if self.parts[0].file.metric in LOWER_IS_BETTER else 1

    @property
    def unit(self) -> Unit:
        """What differences are counted in."""
        file = self.parts[0].file
        if file.metric == "log_loss":
            return "log_loss"
        return file.metric_unit or "points"

    @property
    def margin(self) -> float:
        """Of equivalence."""
        return min(part.file.margin for part in self.parts)

    @property
    def coverage(self) -> float:
        """Of intervals."""
        return self.parts[0].file.level

    def counts(self, level: str) -> list[int]:
        """How many labels the comparisons have at a level; [] where none has it."""
        labels = self.levels.get(level, "")
        return [part.file.label_counts[labels] for part in self.parts if labels in part.file.label_counts]

    def labels(self, level: str) -> float:
        """How many labels there are at a level, on average over the comparisons."""
        counts = self.counts(level)
        return sum(counts) / len(counts)

    def gain(self, pair: Pair, level: str) -> tuple[Difference, int] | None:
        """What TPP gains, averaged over the comparisons that have the pair, and how many they are."""
        labels = self.levels.get(level, "")
        found = [(part.number, part.difference(pair.arm, pair.baseline, labels)) for part in self.parts]
        known = [(number, gap) for number, gap in found if gap is not None]
        return (average(known, self.coverage, self.sign), len(known)) if known else None

    def score(self, arm: str, level: str) -> Difference | None:
        """An arm's mean score, averaged over the comparisons that have it."""
        labels = self.levels.get(level, "")
        found = [(part.number, part.mean(arm, labels)) for part in self.parts]
        known = [(number, mean) for number, mean in found if mean is not None]
        return average(known, self.coverage) if known else None

    def side_by_side(self, arms: Sequence[str], level: str) -> list[float] | None:
        """The arms' mean scores on equal terms: over the comparisons that have all of them, and the seeds all have."""
        labels = self.levels.get(level, "")
        means = []
        for part in self.parts:
            found = [part.scores.get((arm, labels)) for arm in arms]
            known = [scores for scores in found if scores is not None]
            seeds = (
                frozenset[int].intersection(*(frozenset(scores.seeds) for scores in known)) if known else frozenset()
            )
            if len(known) == len(arms) and seeds:
                means.append([float(scores.select(sorted(seeds)).values.mean()) for scores in known])
        over_parts = np.mean(means, axis=0) if means else np.full(len(arms), np.nan)
        return None if np.isnan(over_parts).any() else over_parts.tolist()

    def describe(self) -> SetFile:
        """What is told of the data set."""
        file, tests = self.parts[0].file, {part.number: part.file for part in self.parts}
        return SetFile(
            name=self.name,
            metric=file.metric,
            metric_title=file.metric_title,
            unit=self.unit,
            higher_is_better=self.sign > 0,
            margin=self.margin,
            counts={level: sorted(set(counts)) for level in self.levels if (counts := self.counts(level))},
            cases=sum(test.n_cases for test in tests.values()),
            patients=sum(test.n_patients for test in tests.values()),
            parts=len(self.parts),
            seeds=max(part.seeds for part in self.parts),
        )


def data_sets(finished: Sequence[Finished]) -> tuple[list[DataSet], list[LevelFile]]:
    """The comparisons by data set, with label counts aligned: by number where all sets have the same, else by rank."""
    by_name: dict[str, list[Finished]] = {}
    for one in finished:
        by_name.setdefault(one.part.dataset, []).append(one)
    numbers = {name: _numbers(parts) for name, parts in by_name.items()}
    ranked = len({tuple(found) for found in numbers.values()}) > 1
    sets = []
    for name, parts in by_name.items():
        names = [rank_name(index) if ranked else str(count) for index, count in enumerate(numbers[name])]
        levels = dict(zip(names, map(str, numbers[name]), strict=True))
        if any(ALL in part.file.labels for part in parts):
            levels[ALL] = ALL
        sets.append(DataSet(name, parts, levels))
    longest = max(numbers.values(), key=len)
    order = [rank_name(index) if ranked else str(count) for index, count in enumerate(longest)]
    order += [ALL] if any(ALL in one.levels for one in sets) else []
    titles = {level: [count for one in sets for count in one.counts(level)] for level in order}
    return sets, [
        LevelFile(name=level, title=level_title(level, counts, ranked=ranked))
        for level, counts in titles.items()
        if counts
    ]


def pairs_of(finished: Iterable[Finished]) -> list[Pair]:
    """All pairs that the comparisons compared: TPP against the tuners' own starts first."""
    found: dict[Pair, None] = {}
    for one in finished:
        arms = {arm.name: arm for arm in one.file.arms}
        for gap in one.file.differences:
            arm, baseline = arms[gap.arm], arms[gap.baseline]
            found[Pair(gap.arm, gap.baseline, _kind(arm, baseline), arm.tuner)] = None
    return sorted(found, key=lambda pair: pair.kind != "standard")


def largest_family(parts: Iterable[StudyPart]) -> int:
    """The most tests of one kind of baseline over all data sets, arms and label counts, as far as files can be read."""
    found: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for part in parts:
        with suppress(DataError):  # told where the whole comparison is read
            file = read_model(part.folder / "comparison.json", ComparisonFile)
            arms = {arm.name: arm for arm in file.arms}
            for gap in file.differences:
                test = (part.dataset, gap.arm, gap.baseline, gap.labels)
                found[_kind(arms[gap.arm], arms[gap.baseline])].add(test)
    return max(map(len, found.values()), default=0)


def _kind(arm: ArmFile, baseline: ArmFile) -> str:
    if baseline.init == "scratch":
        return baseline.init
    is_reference = baseline.tuner in REFERENCES and baseline.tuner != arm.tuner
    return baseline.tuner if is_reference else baseline.init


def _numbers(parts: Iterable[Finished]) -> list[int]:
    return sorted({int(labels) for part in parts for labels in part.file.labels if labels != ALL})

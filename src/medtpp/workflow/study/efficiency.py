"""How many labels TPP saves on a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtpp.evaluation.across import average
from medtpp.evaluation.efficiency import EqualLabels, equal_labels
from medtpp.evaluation.paired import Difference
from medtpp.report.schema_study import Beyond, EqualFile
from medtpp.workflow.study.sets import DataSet
from medtpp.workflow.study.words import Pair, equal_sentence


def equal_of(one: DataSet, pair: Pair) -> list[EqualFile]:
    """For each number of labels that TPP had, how many its baseline needs; [] where there are fewer than two numbers.

    Only comparisons and seeds with both arms at all numbers count, so that all points of both curves stay paired.
    """
    levels = [level for level in one.levels if one.counts(level)]
    curves = {arm: _curve(one, pair, arm, levels) for arm in (pair.arm, pair.baseline)}
    ours, theirs = curves[pair.arm], curves[pair.baseline]
    if len(levels) < 2 or not ours or not theirs:
        return []
    counts = np.array([one.labels(level) for level in levels])
    order = np.argsort(counts)
    levels, counts = [levels[index] for index in order], counts[order]
    ours, theirs = [ours[index] for index in order], [theirs[index] for index in order]
    found = equal_labels(counts, *_arrays(theirs), *_arrays(ours), one.coverage)
    span = (float(counts[0]), float(counts[-1]))
    return [
        _told(one.name, pair, level, float(labels), span, equal)
        for level, labels, equal in zip(levels, counts, found, strict=True)
    ]


def _curve(one: DataSet, pair: Pair, arm: str, levels: Sequence[str]) -> list[Difference]:
    """An arm's mean scores at all levels, over the parts and seeds that have both arms at all of them; [] without."""
    known: dict[str, list[tuple[int, Difference]]] = {level: [] for level in levels}
    for part in one.parts:
        cells = [part.scores.get((name, one.levels[level])) for name in (pair.arm, pair.baseline) for level in levels]
        if any(cell is None for cell in cells):
            continue
        seeds = frozenset.intersection(*(frozenset(cell.seeds) for cell in cells if cell is not None))
        means = [part.mean(arm, one.levels[level], seeds) for level in levels] if seeds else []
        if means and all(mean is not None for mean in means):
            for level, mean in zip(levels, means, strict=True):
                if mean is not None:
                    known[level].append((part.number, mean))
    if not all(known.values()):
        return []
    return [average(parts, one.coverage, one.sign) for parts in known.values()]


def _arrays(curve: Sequence[Difference]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([mean.estimate.value for mean in curve], dtype=np.float64)
    return values, np.stack([mean.draws for mean in curve])


def _told(
    dataset: str, pair: Pair, level: str, labels: float, span: tuple[float, float], equal: EqualLabels
) -> EqualFile:
    """Numbers for the file: the nearest end of the span where they are infinite."""
    found = (equal.value, equal.low, equal.high)
    sides: list[Beyond] = ["below" if one == -np.inf else "above" if one == np.inf else "" for one in found]
    numbers = [None if np.isnan(one) else min(span[1], max(span[0], one)) for one in found]
    texts = [
        "" if number is None else f"{_MORE[side]}{number:,.0f}" for number, side in zip(numbers, sides, strict=True)
    ]
    value = numbers[0] if numbers[0] is not None else span[0]
    return EqualFile(
        dataset=dataset,
        arm=pair.arm,
        baseline=pair.baseline,
        level=level,
        labels=labels,
        value=value,
        value_beyond=sides[0],
        low=numbers[1],
        low_beyond=sides[1],
        high=numbers[2],
        high_beyond=sides[2],
        sentence=equal_sentence(dataset, pair.who, labels, value, sides[0], texts[1], texts[2]),
    )


_MORE = {"": "", "below": "fewer than ", "above": "more than "}

"""What TPP gains over each baseline: set by set, and on average over the sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from medtpp.evaluation.across import FEWEST_JUDGED, Pooled, Spread, detectable, half_width, pool
from medtpp.evaluation.bootstrap import Estimate
from medtpp.evaluation.paired import FEWEST_SEEDS, Difference, Verdict, as_other_method, decide, holm, judge
from medtpp.report.schema import MetricFile
from medtpp.report.schema_study import GainFile, LevelFile, PooledFile, Scope, Unit
from medtpp.workflow.study.sets import DataSet
from medtpp.workflow.study.words import Pair, measure_of, pooled_sentence

_SEED = 0  # of the draws of data sets; those inside a set have the seed of its experiment


@dataclass(frozen=True, eq=False)
class Gap:
    """What TPP gains on one data set.

    Attributes:
        one: The data set.
        gain: Above zero TPP is better.
        parts: How many of its comparisons have the pair.
    """

    one: DataSet
    gain: Difference
    parts: int


@dataclass(frozen=True, eq=False)
class Gains:
    """What TPP gains over a baseline at a level of labels, on the data sets that have the pair."""

    pair: Pair
    level: LevelFile
    gaps: list[Gap]

    def of_unit(self, unit: Unit) -> Gains:
        """On the data sets whose metric has this unit."""
        return replace(self, gaps=[gap for gap in self.gaps if gap.one.unit == unit])


def find_gains(sets: Sequence[DataSet], pairs: Iterable[Pair], levels: Sequence[LevelFile]) -> list[Gains]:
    """All pairs at all levels that some data set has."""
    found = []
    for pair in pairs:
        for level in levels:
            known = [(one, one.gain(pair, level.name)) for one in sets]
            gaps = [Gap(one, *gain) for one, gain in known if gain is not None]
            if gaps:
                found.append(Gains(pair, level, gaps))
    return found


def gain_files(every: Sequence[Gains]) -> list[GainFile]:
    """Set by set; p-values are adjusted over arms, levels and sets of a kind of baseline."""
    told = []
    for kind in dict.fromkeys(gains.pair.kind for gains in every):
        family = [(gains, gap) for gains in every if gains.pair.kind == kind for gap in gains.gaps]
        p_values = holm([gap.gain.p for _, gap in family])
        told += [_gain(gains, gap, p_holm) for (gains, gap), p_holm in zip(family, p_values, strict=True)]
    return told


def _gain(gains: Gains, gap: Gap, p_holm: float | None) -> GainFile:
    half = half_width(gap.gain.estimate)
    return GainFile(
        dataset=gap.one.name,
        level=gains.level.name,
        arm=gains.pair.arm,
        baseline=gains.pair.baseline,
        kind=gains.pair.kind,
        unit=gap.one.unit,
        parts=gap.parts,
        seeds=len(gap.gain.by_seed),
        **vars(metric_of(gap.gain.estimate)),
        p=gap.gain.p,
        p_holm=p_holm,
        verdict=_told(gains.pair, judge(gap.gain, p_holm, metric="", margin=gap.one.margin)),
        half_width=half,
        detectable=None if half is None else detectable(half, gap.one.coverage),
    )


def pooled_files(every: Sequence[Gains], sets: Sequence[DataSet], single: Sequence[GainFile]) -> list[PooledFile]:
    """Means over the sets of each unit; p-values are adjusted over arms, levels and units of a kind of baseline.

    A single set of a unit has no mean, unless it is the study's only one.

    Args:
        every: The gains.
        sets: Of the study.
        single: The same gains from `gain_files`, whose verdicts are counted.
    """
    told = []
    least = min(2, len(sets))
    units = dict.fromkeys(one.unit for one in sets)
    for kind in dict.fromkeys(gains.pair.kind for gains in every):
        of_kind = [gains for gains in every if gains.pair.kind == kind]
        family = [part for gains in of_kind for unit in units if len((part := gains.of_unit(unit)).gaps) >= least]
        pooled = [pool([gap.gain for gap in part.gaps], sets[0].coverage, _SEED) for part in family]
        p_values = holm([_judged(one)[0].p for one in pooled])
        signed_rank = holm([one.wilcoxon for one in pooled])
        for part, one, p_holm, wilcoxon_holm in zip(family, pooled, p_values, signed_rank, strict=True):
            told.append(_pooled(part, one, p_holm, wilcoxon_holm, sets, single))
    return told


def _pooled(
    gains: Gains,
    pooled: Pooled,
    p_holm: float | None,
    wilcoxon_holm: float | None,
    sets: Sequence[DataSet],
    single: Sequence[GainFile],
) -> PooledFile:
    pair, unit = gains.pair, gains.gaps[0].one.unit
    spread, scope = _judged(pooled)
    where = gains.level.title
    margin = min(gap.one.margin for gap in gains.gaps)
    verdict = _told(pair, decide(spread.estimate, spread.narrow, p_holm, margin=margin))
    if scope == "these" and any(len(gap.gain.by_seed) < FEWEST_SEEDS for gap in gains.gaps):
        verdict = "too few seeds"
    mine = (pair.arm, pair.baseline, gains.level.name, unit)
    alone = Counter[Verdict](one.verdict for one in single if (one.arm, one.baseline, one.level, one.unit) == mine)
    there = {gap.one.name for gap in gains.gaps}
    return PooledFile(
        level=gains.level.name,
        arm=pair.arm,
        baseline=pair.baseline,
        kind=pair.kind,
        unit=unit,
        sets=pooled.sets,
        these=metric_of(pooled.these.estimate),
        like_these=None if pooled.like_these is None else metric_of(pooled.like_these.estimate),
        p=spread.p,
        p_holm=p_holm,
        wilcoxon=pooled.wilcoxon,
        wilcoxon_holm=wilcoxon_holm,
        helps=alone["helps"] + alone["better"],
        hurts=alone["hurts"] + alone["worse"],
        equivalent=alone["equivalent"],
        scope=scope,
        margin=margin,
        verdict=verdict,
        sentence=pooled_sentence(pair, where, pooled, verdict, scope, p_holm, alone, measure_of(unit, margin)),
        left_out=[one.name for one in sets if one.unit == unit and one.name not in there],
    )


def _told(pair: Pair, verdict: Verdict) -> Verdict:
    return as_other_method(verdict) if pair.beside else verdict


def _judged(pooled: Pooled) -> tuple[Spread, Scope]:
    """What a verdict is made from: other data sets like these, or these alone where they are few."""
    if pooled.like_these is not None and pooled.sets >= FEWEST_JUDGED:
        return pooled.like_these, "like these"
    return pooled.these, "these"


def metric_of(estimate: Estimate) -> MetricFile:
    """An estimate for a file."""
    return MetricFile(value=estimate.value, low=estimate.low, high=estimate.high)

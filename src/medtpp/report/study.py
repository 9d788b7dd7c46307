"""The report on a study: what its comparisons say together over the data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from medtpp.report import figures
from medtpp.report.comparison import VERDICTS
from medtpp.report.page import NONE, Scale, number, percent, plural, render, scale_over, signed
from medtpp.report.read import read_model, without_folders
from medtpp.report.schema import MetricFile
from medtpp.report.schema_study import (
    AcrossFile,
    EqualFile,
    GainFile,
    PartFile,
    PooledFile,
    RankFile,
    ReachFile,
    SetFile,
    Unit,
)

STANDARD = "standard"
# What a gain is multiplied by to be shown, its digits, and the unit after a number and in a title.
UNITS: dict[Unit, tuple[float, int, str, str]] = {
    "points": (100.0, 1, " points", "points of each set’s own metric"),
    "mm": (1.0, 2, " mm", "mm"),
    "px": (1.0, 2, " pixels", "pixels"),
    "log_loss": (1.0, 3, "", "log loss"),
}


def study_page(out: Path) -> str:
    """The HTML page of a study whose summary is written. Raises DataError where across.json is missing or broken."""
    file = read_model(out / "across.json", AcrossFile)
    main = [one for one in file.pooled if one.kind == STANDARD]
    others = [one for one in file.pooled if one.kind != STANDARD]
    sets = {one.name: one for one in file.sets}
    scales = {unit: _scale(file, unit) for unit in dict.fromkeys(one.unit for one in file.gains)}
    return render(
        "study.html",
        title=f"Does TPP help, over {plural(len(file.sets), 'data set')}?",
        file=file,
        main=main,
        others=others,
        levels={one.name: one.title for one in file.levels},
        sets=sets,
        forests=_forests(file, scales),
        verdicts=VERDICTS,
        units=UNITS,
        rows_of_others=_other_forests(others, scales, file),
        gain=gain_text,
        size=size_text,
        counts=lambda name, level: _counts(sets[name].counts.get(level, [])),
        ranks=[_ranking(one, index) for index, one in enumerate(file.ranks)],
        efficiency=_efficiency(file),
        looks=(figures.BASELINE, figures.PRETRAINED),
        equal=equal_text,
        reach=[Reached.of(one) for one in file.reach],
        overall=_overall(file.reach),
        measures=sorted({one.measure for one in file.reach}),
        link_to=lambda part: link_to(part, out),
        failed=_failed(file.parts),
        left_out=[(one, without_folders(one.reason)) for one in file.parts if one.status in ("missing", "broken")],
        notes=[without_folders(note) for note in file.notes],
    )


@dataclass(frozen=True)
class Row:
    """A line of a forest plot; numbers as they are shown."""

    title: str
    small: str
    value: float | None
    low: float | None
    high: float | None
    margin: float | None
    verdict: str
    text: str
    pooled: bool = False


@dataclass(frozen=True)
class Forest:
    """The gains of an arm at a level of labels, set by set, and their mean at the bottom."""

    title: str
    unit: Unit
    scale: Scale
    rows: list[Row]


def _forests(file: AcrossFile, scales: dict[Unit, Scale]) -> list[Forest]:
    sets = {one.name: one for one in file.sets}
    titles = {one.name: one.title for one in file.levels}
    found = []
    for arm in dict.fromkeys(one.arm for one in file.gains if one.kind == STANDARD):
        for level in titles:
            for unit, scale in scales.items():
                key = (arm, level, unit, STANDARD)
                gains = [one for one in file.gains if (one.arm, one.level, one.unit, one.kind) == key]
                means = [one for one in file.pooled if (one.arm, one.level, one.unit, one.kind) == key]
                rows = [_row_of_set(one, sets[one.dataset]) for one in gains if one.value is not None]
                rows += [row for one in means for row in _rows_of_mean(one)]
                if rows:
                    found.append(Forest(f"{arm}, {titles[level]}", unit, scale, rows))
    return found


def _row_of_set(one: GainFile, data: SetFile) -> Row:
    counts = data.counts.get(one.level, [])
    labels = plural(counts[0], "label") if len(counts) == 1 else f"{_counts(counts)} labels"
    parts = f", {plural(one.parts, 'comparison')}" if one.parts > 1 else ""
    factor = UNITS[one.unit][0]
    return Row(
        title=one.dataset,
        small=f"{data.metric_title}, {labels}{parts}",
        margin=data.margin * factor,
        verdict=one.verdict,
        text=span_text(one, one.unit),
        **_shown(one, one.unit),
    )


def _rows_of_mean(one: PooledFile) -> list[Row]:
    """The mean on these sets, and where there are enough of them on sets like these."""
    kinds = [("Mean, these sets", one.these, "these")]
    if one.like_these is not None:
        kinds.append(("Mean, sets like these", one.like_these, "like these"))
    return [
        Row(
            title=title,
            small=plural(one.sets, "data set"),
            margin=one.margin * UNITS[one.unit][0],
            verdict=one.verdict if one.scope == scope else "",
            text=span_text(metric, one.unit),
            pooled=True,
            **_shown(metric, one.unit),
        )
        for title, metric, scope in kinds
    ]


def _shown(metric: MetricFile, unit: Unit) -> dict[str, Any]:
    """Value and interval as they are drawn."""
    ends = {"value": metric.value, "low": metric.low, "high": metric.high}
    return {name: None if end is None else end * UNITS[unit][0] for name, end in ends.items()}


def _other_forests(others: list[PooledFile], scales: dict[Unit, Scale], file: AcrossFile) -> list[Forest]:
    """Means against other baselines, by what they are."""
    titles = {one.name: one.title for one in file.levels}
    found = []
    for unit, scale in scales.items():
        rows = []
        for one in (one for one in others if one.unit == unit):
            metric = one.like_these if one.scope == "like these" and one.like_these is not None else one.these
            about = "sets like these" if metric is one.like_these else "these"
            rows.append(
                Row(
                    title=one.arm,
                    small=f"against {one.baseline}, {titles[one.level]}, {about} {one.sets}",
                    margin=one.margin * UNITS[unit][0],
                    verdict=one.verdict,
                    text=span_text(metric, unit),
                    **_shown(metric, unit),
                )
            )
        if rows:
            found.append(Forest("", unit, scale, rows))
    return found


def _scale(file: AcrossFile, unit: Unit) -> Scale:
    factor = UNITS[unit][0]
    metrics: list[MetricFile] = [one for one in file.gains if one.unit == unit]
    means = [one for one in file.pooled if one.unit == unit]
    metrics += [one for mean in means for one in (mean.these, mean.like_these) if one is not None]
    margins = [one.margin for one in file.sets if one.unit == unit]
    ends = [end for one in metrics for end in (one.low, one.value, one.high) if end is not None]
    return scale_over([factor * end for end in [0.0, *margins, *(-margin for margin in margins), *ends]])


def gain_text(value: float | None, unit: Unit) -> str:
    """A gain with its sign, without the unit."""
    factor, digits, *_ = UNITS[unit]
    return NONE if value is None else signed(value * factor, digits)


def size_text(value: float | None, unit: Unit) -> str:
    """The size of a difference, without sign and unit."""
    factor, digits, *_ = UNITS[unit]
    return number(None if value is None else value * factor, digits)


def _counts(counts: Sequence[int]) -> str:
    if not counts:
        return NONE
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def span_text(metric: MetricFile, unit: Unit) -> str:
    """A gain with its interval."""
    text = gain_text(metric.value, unit)
    if metric.low is None or metric.high is None:
        return text
    return f"{text} [{gain_text(metric.low, unit)}, {gain_text(metric.high, unit)}]"


@dataclass(frozen=True)
class Ranking:
    """Mean ranks with their diagram."""

    file: RankFile
    svg: Markup | None
    alt: str


def _ranking(one: RankFile, index: int) -> Ranking:
    if one.critical is None:
        return Ranking(one, None, "")
    marked = [" tpp" in name for name in one.arms]
    svg = figures.critical_figure(one.arms, one.ranks, one.groups, one.critical, marked, f"critical{index}")
    told = "; ".join(f"{name} {rank:.2f}" for name, rank in zip(one.arms, one.ranks, strict=True))
    groups = "; ".join(" and ".join((one.arms[group[0]], one.arms[group[-1]])) for group in one.groups)
    alike = f" Not told apart are all from {groups.replace(' and ', ' to ')}." if groups else ""
    return Ranking(one, svg, f"Mean ranks, best first: {told}. Critical difference {one.critical:.2f}.{alike}")


@dataclass(frozen=True)
class Curves:
    """Scores over the number of labels on all data sets that have several, of an arm and its baseline."""

    arm: str
    plots: list[tuple[str, Markup, str]]
    equal: list[EqualFile]


def _efficiency(file: AcrossFile) -> list[Curves]:
    found: list[Curves] = []
    pairs = dict.fromkeys((one.arm, one.baseline) for one in file.gains if one.kind == STANDARD)
    for arm, baseline in pairs:
        plots: list[tuple[str, Markup, str]] = []
        for data in file.sets:
            lines = {}
            for look, name in ((figures.BASELINE, baseline), (figures.PRETRAINED, arm)):
                points = [
                    (one.labels, one.value, one.low, one.high)
                    for one in file.scores
                    if one.dataset == data.name and one.arm == name and one.value is not None
                ]
                if len(points) > 1:
                    lines[look] = sorted(points)
            if len(lines) == 2:
                key = f"efficiency{len(found)}-{len(plots)}"
                svg = figures.efficiency_figure(lines, "", key, (3.3, 2.3))
                alt = "; ".join(
                    f"{look.name} from {number(points[0][1])} to {number(points[-1][1])}"
                    for look, points in lines.items()
                )
                plots.append((data.name, svg, f"{data.name}: {data.metric_title} over the number of labels: {alt}."))
        equal = [one for one in file.equal if (one.arm, one.baseline) == (arm, baseline)]
        if plots:
            found.append(Curves(arm, plots, equal))
    return found


def equal_text(value: float | None, beyond: str) -> str:
    """A number of labels, or that it lies beyond those that were tried."""
    if value is None:
        return NONE
    return {"above": "more than ", "below": "fewer than "}.get(beyond, "") + f"{value:,.0f}"


@dataclass(frozen=True)
class Reached:
    """When TPP reaches what its baseline ends with, as texts."""

    file: ReachFile
    steps: str
    share: str
    own: str
    reached: str
    cost: str

    @classmethod
    def of(cls, one: ReachFile) -> Reached:
        """In a reader's words."""
        never = "not reached"
        around = _ends(one.share_low, one.share_high) if one.interval else ""
        costs = _ends(one.cost_low, one.cost_high) if one.interval and one.costed else ""
        return cls(
            file=one,
            steps=never if one.steps is None else f"{one.steps:,.0f} of {one.total:,.0f}",
            share=never if one.share is None else percent(one.share, 0) + around,
            own=never if one.own_share is None else percent(one.own_share, 0),
            reached=f"{one.reached} of {one.seeds}",
            cost=(NONE if not one.costed else never) if one.cost is None else percent(one.cost, 0) + costs,
        )


def _ends(low: float | None, high: float | None) -> str:
    return f" ({percent(low, 0) if low is not None else 'never'} – {percent(high, 0) if high is not None else 'never'})"


@dataclass(frozen=True)
class Overall:
    """An arm at a level of labels over the data sets, as texts: medians, and on how many sets TPP saves something."""

    arm: str
    level: str
    share: str
    own: str
    sooner: str
    cost: str
    cheaper: str


def _overall(reach: Iterable[ReachFile]) -> list[Overall]:
    groups: dict[tuple[str, str], list[ReachFile]] = {}
    for one in reach:
        groups.setdefault((one.arm, one.level), []).append(one)
    found = []
    for (arm, level), every in groups.items():
        shares, own = [_or_never(one.share) for one in every], [_or_never(one.own_share) for one in every]
        costs = [_or_never(one.cost) for one in every if one.costed]
        sooner = sum(ours < theirs for ours, theirs in zip(shares, own, strict=True))
        cheaper = f"{sum(cost < 1 for cost in costs)} of {len(costs)}" if costs else NONE
        told = (_median(shares), _median(own), f"{sooner} of {len(every)}", _median(costs), cheaper)
        found.append(Overall(arm, level, *told))
    return found


def _or_never(value: float | None) -> float:
    return inf if value is None else value


def _median(values: list[float]) -> str:
    if not values:
        return NONE
    middle = median(values)
    return percent(middle, 0) if isfinite(middle) else "not reached"


def link_to(part: PartFile, out: Path) -> str:
    """The way from the study to a comparison's own report, for a link; "" where there is none."""
    way = f"{part.folder}/report.html"
    return quote(way) if part.folder and (out / way).is_file() else ""


def _failed(parts: Iterable[PartFile]) -> list[tuple[str, str, str]]:
    return [(part.title, cell, without_folders(reason)) for part in parts for cell, reason in part.failed]

"""The plots of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from medtpp.report.curves import Band, ClassCurve, smooth
from medtpp.report.plots import GROUND, INK, MUTED, Series, panels, plotting, square, to_svg

LOSS, VALIDATION = Series(0, "training loss"), Series(1, "validation loss")
BASELINE, PRETRAINED = Series(0, "standard start"), Series(1, "after TPP")
_RING: dict[str, Any] = {
    "markersize": 8,
    "markeredgewidth": 1.8,
    "markerfacecolor": GROUND,
    "linestyle": "none",
    "zorder": 4,
}


def pretext_curve(log: pd.DataFrame) -> Markup:
    """Pretext loss, score of a monitor, if there was one, and learning rate of the target parameters over the steps."""
    scored = log[log.monitor.notna()] if "monitor" in log else None
    with plotting():
        if scored is None:
            figure, (upper, lower) = panels(2, height=3.2, ratios=(3, 1))
        else:
            figure, (upper, middle, lower) = panels(3, height=4.2, ratios=(3, 2, 1))
            middle.plot(scored.step, scored.monitor, marker=VALIDATION.marker, markersize=4, **VALIDATION.line)
            middle.set_title("AUC of a probe on training labels")
        _plot_loss(upper, log)
        upper.set_title("pretext loss")
        lower.plot(log.step, log.lr_tuner, color=MUTED, linewidth=1.4)
        lower.set_title("learning rate")
        lower.set_ylim(bottom=0)
        _steps(lower)
        return to_svg(figure, "pretext")


def finetune_curve(log: pd.DataFrame, best: int | None, *, dice: bool = False) -> Markup:
    """Training loss and score on the validation cases over the steps; the step whose weights were kept is marked.

    Args:
        log: Of the stage.
        best: The step.
        dice: Whether the score is the mean Dice, which has a panel of its own, and not minus the loss.
    """
    seen = log[log.validation.notna()] if "validation" in log else None
    with plotting():
        figure, all_axes = panels(2 if dice and seen is not None else 1, height=3.2)
        axes = all_axes[0]
        _plot_loss(axes, log)
        axes.set_title("loss")
        axes.set_ylim(bottom=0)
        if seen is not None:
            scored = seen.validation if dice else -seen.validation
            lower = all_axes[-1]
            lower.plot(seen.step, scored, marker=VALIDATION.marker, markersize=4, **VALIDATION.line)
            if dice:
                lower.set_title("mean Dice, validation cases")
            if best in set(seen.step):
                value = float(scored[seen.step == best].iloc[0])
                lower.axvline(best, color=INK, linewidth=1, linestyle=(0, (2, 2)))
                lower.plot([best], [value], marker="o", markeredgecolor=INK, **_RING)
        _steps(all_axes[-1])
        return to_svg(figure, "finetune")


def _plot_loss(axes: Axes, log: pd.DataFrame) -> None:
    axes.plot(log.step, log.loss, color=LOSS.colour, alpha=0.3, linewidth=0.9)
    axes.plot(log.step, smooth(log.loss), **LOSS.line)


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def roc_figure(curves: Sequence[ClassCurve], series: Sequence[Series]) -> Markup:
    """ROC curves with the operating points."""
    with plotting():
        figure, (axes,) = panels(width=3.7, height=3.7)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for curve, look in zip(curves, series, strict=True):
            axes.plot(curve.false_positive_rate, curve.true_positive_rate, **look.line)
            _operating_point(axes, 1 - curve.specificity, curve.sensitivity, look)
        axes.set(xlabel="1 − specificity (false alarms)", ylabel="sensitivity")
        square(axes)
        return to_svg(figure, "roc")


def precision_recall_figure(curves: Sequence[ClassCurve], series: Sequence[Series]) -> Markup:
    """Precision-recall curves with the operating points; a short mark at the right shows the precision of guessing."""
    with plotting():
        figure, (axes,) = panels(width=3.7, height=3.7)
        for curve, look in zip(curves, series, strict=True):
            axes.plot(curve.recall, curve.precision, drawstyle="steps-post", **look.line)
            axes.plot([0.94, 1], [curve.prevalence] * 2, color=look.colour, linewidth=3, alpha=0.6, gid=look.gid)
            if curve.precision_there is not None:
                _operating_point(axes, curve.sensitivity, curve.precision_there, look)
        axes.set(xlabel="recall (sensitivity)", ylabel="precision")
        square(axes)
        return to_svg(figure, "pr")


def _operating_point(axes: Axes, x: float, y: float, look: Series) -> None:
    axes.plot([x], [y], marker=look.marker, markeredgecolor=look.colour, gid=look.gid, clip_on=False, **_RING)


def reliability_figure(bins: pd.DataFrame) -> Markup:
    """Observed against stated probability, and how many predictions each bin holds."""
    with plotting():
        figure, (upper, lower) = panels(2, width=3.9, height=4.4, ratios=(3.2, 1))
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        upper.vlines(bins.stated, bins.stated, bins.observed, color=LOSS.colour, alpha=0.4, linewidth=2)
        sizes = 14 + 110 * bins["count"] / bins["count"].max()
        upper.scatter(bins.stated, bins.observed, s=sizes, color=LOSS.colour, linewidth=0, clip_on=False, zorder=3)
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="observed share")
        middles, widths = (bins.low + bins.high) / 2, (bins.high - bins.low) * 0.86
        lower.bar(middles, bins["count"], width=widths, color=LOSS.colour, alpha=0.75)
        for middle, count in zip(middles, bins["count"], strict=True):
            lower.annotate(str(count), (middle, count), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        lower.set(xlabel="stated probability", ylabel="count")
        lower.margins(y=0.25)
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        return to_svg(figure, "reliability")


def efficiency_figure(
    lines: Mapping[Series, Sequence[tuple[float, float, float | None, float | None]]],
    title: str,
    key: str = "efficiency",
    size: tuple[float, float] = (4.8, 3.6),
) -> Markup:
    """A metric over the number of labels, with intervals.

    Args:
        lines: Points of a number of labels, value, low and high, ascending, by arm.
        title: Of the metric.
        key: Unique in the page.
        size: Width and height in inches.
    """
    with plotting():
        figure, (axes,) = panels(width=size[0], height=size[1])
        counts = sorted({point[0] for points in lines.values() for point in points})
        step = (counts[-1] / counts[0]) ** 0.013  # of the logarithmic axis
        for index, (look, points) in enumerate(lines.items()):
            labels, values, lows, highs = np.array(points, dtype=np.float64).T  # None becomes not-a-number
            places, known = labels * step ** (index - (len(lines) - 1) / 2), ~np.isnan(lows + highs)
            axes.vlines(places[known], lows[known], highs[known], color=look.colour, alpha=0.55, gid=look.gid)
            axes.plot(places, values, marker=look.marker, **look.line)
        axes.set_xscale("log")
        axes.set_xticks(counts)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set(xlabel="labelled cases", ylabel=title)
        return to_svg(figure, key)


def bands_figure(bands: Mapping[Series, Band], key: str, title: str) -> Markup:
    """Losses averaged over seeds; a band from the least to the greatest."""
    with plotting():
        figure, (axes,) = panels(width=3.3, height=2.3)
        for look, band in bands.items():
            axes.fill_between(band.step, band.low, band.high, color=look.colour, alpha=0.15, linewidth=0, gid=look.gid)
            axes.plot(band.step, band.mean, **look.line)
        axes.set_title(title)
        _steps(axes)
        return to_svg(figure, key)


def critical_figure(
    names: Sequence[str],
    ranks: Sequence[float],
    groups: Sequence[Sequence[int]],
    critical: float,
    marked: Sequence[bool],
    key: str,
) -> Markup:
    """A critical difference diagram (Demšar, JMLR 2006): arms on an axis of mean ranks, bars over those not told apart.

    Args:
        names: Of the arms, best first.
        ranks: Their mean ranks.
        groups: Indices of arms that are not told apart.
        critical: The critical difference.
        marked: Which arms stand out in colour.
        key: Unique in the page.
    """
    half = (len(names) + 1) // 2
    sides = [5.0 * max(map(len, part)) + 10 for part in (names[:half], names[half:])]  # points at font size 9
    inner = max(120.0, 300 - sum(sides))
    axis, row = 60.0, 17.0
    base = axis + 14 + 7 * len(groups)
    height = base + row * half

    def place(rank: float) -> float:
        return sides[0] + 6 + (inner - 12) * (rank - 1) / (len(names) - 1)

    width = max(sum(sides) + inner, place(1 + critical) + 6)  # with few data sets it is longer than the axis
    with plotting():
        figure = Figure(figsize=(width / 72, height / 72))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        axes.plot([place(1), place(1 + critical)], [24, 24], color=INK, marker="|", markersize=8, linewidth=1.4)
        axes.text(place(1), 17, f"critical difference {critical:.2f}", fontsize=9, va="bottom")
        axes.plot([place(1), place(len(names))], [axis, axis], color=INK, linewidth=1.2)
        for tick in range(1, len(names) + 1):
            axes.plot([place(tick)] * 2, [axis - 4, axis], color=INK, linewidth=1.2)
            axes.text(place(tick), axis - 7, str(tick), fontsize=9, ha="center", va="bottom")
        for row_of_group, group in enumerate(groups):
            ends = [place(ranks[group[0]]) - 3, place(ranks[group[-1]]) + 3]
            axes.plot(ends, [axis + 9 + 7 * row_of_group] * 2, color=MUTED, linewidth=3.6)
        for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            left = index < half
            y = base + row * (index if left else len(names) - 1 - index) + 6
            edge = sides[0] - 4 if left else sides[0] + inner + 4
            colour = PRETRAINED.colour if marked[index] else INK
            axes.plot([place(rank), place(rank), edge], [axis, y, y], color=colour, linewidth=1.2)
            at, align = (edge - 4, "right") if left else (edge + 4, "left")
            axes.text(at, y, name, ha=align, va="center", fontsize=9, color=colour, parse_math=False)
        return to_svg(figure, key)

"""The report on a segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import DataError
from medtpp.evaluation import Segmentations, read_segmentations
from medtpp.evaluation.overlays import PREDICTED, TRUE
from medtpp.evaluation.segmentation import TITLES
from medtpp.report import figures, words
from medtpp.report.page import UNIT, Scale, number, render, scale_over
from medtpp.report.plots import Series
from medtpp.report.read import Picture, read_model, read_models, read_picture, without_folders
from medtpp.report.schema import MetricFile, OverlayFile, PictureFile, SegmentationFile
from medtpp.report.training import Training, learning_alts, setup_of, split_of

MOST_DOTS = 400  # cases in the plot, evenly from all
MOST_ROWS = 200  # cases in the table under it
_SHAPES = (  # paths around (0, 0), in pixels; as the markers of the other plots
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.5 -3.5h7v7h-7Z",
    "M0 -4.6L4.4 3.4H-4.4Z",
    "M0 -5L4 0L0 5L-4 0Z",
    "M0 4.6L4.4 -3.4H-4.4Z",
    "M-1.6 -4.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2v-2.9h-2.9v-3.2h2.9Z",
)


def segmentation_page(folder: Path, run: Training) -> str:
    """The HTML page of a finished run. Raises DataError where a file is missing or broken."""
    evaluation, table = _read_evaluation(folder / "evaluation")
    series = [Series(index, name) for index, name in enumerate(table.structures)]
    setup = setup_of(run)
    plots = {"finetune": figures.finetune_curve(run.finetune_log, run.best_step, dice=True)}
    if run.tpp_log is not None:
        plots["pretext"] = figures.pretext_curve(run.tpp_log)
    order = _order(table)
    return render(
        "segmentation.html",
        title=f"{setup.data}: {setup.tuner}" + (" with TPP" if run.tpp else ""),
        run=run,
        evaluation=evaluation,
        titles=_titles(evaluation),
        answer=words.segmentation_answer(evaluation, run.tpp),
        rows=_rows(evaluation),
        unit=UNIT,
        setup=setup,
        split=split_of(run),
        plots=plots,
        alts=learning_alts(run, "Dice on the validation cases is highest"),
        losses=[figures.LOSS],
        effect=[*words.effect(run.tpp), *words.monitored(run.adapter.tpp)] if run.tpp else [],
        notes=[without_folders(note) for note in evaluation.notes],
        series=series,
        shapes=[_SHAPES[one.number % len(_SHAPES)] for one in series],
        cases=_case_plots(evaluation, table, order),
        shown_cases=min(len(order), MOST_DOTS),
        known_cases=len(order),
        table_of=table,
        listed=order[:MOST_ROWS],
        overlays=_read_overlays(folder / "evaluation" / "overlays"),
        colours={"true": TRUE, "predicted": PREDICTED},
    )


def _read_evaluation(folder: Path) -> tuple[SegmentationFile, Segmentations]:
    evaluation = read_model(folder / "evaluation.json", SegmentationFile)
    table = read_segmentations(folder / "segmentation.csv")
    if set(table.structures) != set(evaluation.structures) or len(table) != evaluation.n_cases:
        raise DataError(
            f"In {folder}, segmentation.csv and evaluation.json are of different evaluations. "
            "Make both again with medtpp run and --resume."
        )
    return evaluation, table


def _titles(evaluation: SegmentationFile) -> dict[str, str]:
    """The metrics with their units."""
    units = {"hd95": evaluation.unit, "nsd": f"{evaluation.tolerance:g} {evaluation.unit}"}
    return {name: f"{title} ({units[name]})" if name in units else title for name, title in TITLES.items()}


@dataclass(frozen=True)
class Row:
    """A line of the table of metrics: a structure, or the mean over all."""

    title: str
    cases: int
    metrics: dict[str, MetricFile]
    missed: int | None = None
    invented: int | None = None


def _rows(evaluation: SegmentationFile) -> list[Row]:
    rows = [Row(name, one.n, one.metrics, one.missed, one.invented) for name, one in evaluation.structures.items()]
    return rows if len(rows) == 1 else [Row("mean over structures", evaluation.n_cases, evaluation.metrics), *rows]


def _order(table: Segmentations) -> list[int]:
    """Rows of the cases that have a Dice, from the lowest mean over structures to the highest."""
    known = np.flatnonzero(~np.isnan(table.dice).all(axis=1))
    means = [float(np.nanmean(table.dice[row])) for row in known]
    return [int(known[at]) for at in np.argsort(means, kind="stable")]


@dataclass(frozen=True)
class Dot:
    """A case and a structure in the plot; places in per cent."""

    x: str
    y: str
    structure: int
    text: str


@dataclass(frozen=True)
class CasePlot:
    """A metric of every case.

    Attributes:
        title: The metric with its unit.
        scale: From bottom to top.
        dots: A dot for each case and structure.
        alt: What the plot shows, for who does not see it.
    """

    title: str
    scale: Scale
    dots: list[Dot]
    alt: str

    def height(self, value: float) -> str:
        """Where a value is, in per cent from the top."""
        return _from_top(self.scale, value)


def _case_plots(evaluation: SegmentationFile, table: Segmentations, order: list[int]) -> list[CasePlot]:
    """Dice and HD95, each of the cases sorted by their mean Dice."""
    if not order:
        return []
    chosen = [order[at] for at in np.linspace(0, len(order) - 1, min(len(order), MOST_DOTS)).round().astype(int)]
    titles = _titles(evaluation)
    return [
        _case_plot(titles[name], table, table.numbers[name], chosen, limit)
        for name, limit in (("dice", 1.0), ("hd95", 0.0))
    ]


def _case_plot(
    title: str, table: Segmentations, values: NDArray[np.float64], chosen: list[int], limit: float
) -> CasePlot:
    known = values[chosen][~np.isnan(values[chosen])]
    scale = scale_over([limit, *known.tolist()])
    dots = [
        Dot(
            x=f"{100 * (place + 0.5) / len(chosen):.2f}%",
            y=_from_top(scale, float(values[row, index])),
            structure=index,
            text=f"{table.cases[row]}, {structure}: {title} {number(float(values[row, index]))}",
        )
        for place, row in enumerate(chosen)
        for index, structure in enumerate(table.structures)
        if not np.isnan(values[row, index])
    ]
    low, middle, high = np.quantile(known, [0, 0.5, 1])
    alt = f"{title} of {len(chosen)} cases: from {low:.3f} to {high:.3f}, median {middle:.3f}."
    return CasePlot(title, scale, dots, alt)


def _from_top(scale: Scale, value: float) -> str:
    return f"{100 - float(scale.at(value)[:-1]):.2f}%"


def _read_overlays(folder: Path) -> list[tuple[OverlayFile, list[tuple[PictureFile, Picture]]]]:
    """Each case that is shown, with its pictures."""
    path = folder / "overlays.json"
    if not path.is_file():
        return []
    found = []
    for overlay in read_models(path, OverlayFile):
        outside = [one.image for one in overlay.pictures if PurePosixPath(one.image).name != one.image]
        if outside:
            raise DataError(f"{path} names an image outside its folder: {outside[0]!r}.")
        pictures = [(one, read_picture(folder / one.image, longest=320, lossless=True)) for one in overlay.pictures]
        found.append((overlay, pictures))
    return found

"""The report on a comparison: arms over numbers of labels and seeds, and what may be said of their differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
from markupsafe import Markup

from medtpp.errors import DataError
from medtpp.report import figures
from medtpp.report.curves import loss_band
from medtpp.report.page import Scale, number, plural, render, scale_over
from medtpp.report.plots import Series
from medtpp.report.read import (
    Experiment,
    Picture,
    read_experiment,
    read_model,
    read_picture,
    read_table,
    without_folders,
)
from medtpp.report.schema import ArmFile, ComparedTPPFile, ComparisonFile, DifferenceFile, MeanFile
from medtpp.report.words import rows_of_preview

_DONE = "done"
# Verdict to a sign, so that colour is not all that tells them apart, and the order of telling. "better" and "worse" are
# for arms that differ in more than TPP, never for TPP against no TPP.
VERDICTS = {
    "helps": "▲",
    "hurts": "▼",
    "better": "▲",
    "worse": "▼",
    "equivalent": "=",
    "no difference seen": "○",
    "too few seeds": "…",
    "undefined": "–",
}
_ONE = {
    "helps": "TPP helped",
    "hurts": "TPP did harm",
    "equivalent": "TPP made no difference that matters",
    "no difference seen": "no difference was seen, which is not the same as none",
    "too few seeds": "there are too few seeds to say",
    "undefined": "the difference is undefined",
}
_SEVERAL = {
    "helps": "TPP helped in {}",
    "hurts": "TPP did harm in {}",
    "equivalent": "TPP made no difference that matters in {}",
    "no difference seen": "no difference was seen in {}, which is not the same as none",
    "too few seeds": "there were too few seeds to say in {}",
    "undefined": "the difference is undefined in {}",
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """The files of a comparison.

    Attributes:
        file: comparison.json.
        experiment: What all cells share.
        logs: Fine-tuning logs by arm and labels.
        tpp_logs: TPP logs by the title of the stage: its tuner and pretext task, and of controls what they are.
        previews: What the pretext task restored, of one seed, by the same title, and what its rows are.
    """

    file: ComparisonFile
    experiment: Experiment
    logs: dict[tuple[str, str], list[pd.DataFrame]]
    tpp_logs: dict[str, list[pd.DataFrame]]
    previews: dict[str, tuple[Picture, str]]


def comparison_page(folder: Path) -> str:
    """The HTML page of a finished comparison. Raises DataError where a file is missing or broken."""
    comparison = read_comparison(folder)
    file = comparison.file
    arms = {arm.name: Series(index, arm.name) for index, arm in enumerate(file.arms)}
    tested = [one for one in file.differences if one.value is not None]
    main = [one for one in file.differences if _is_main(file, one)]
    others = [one for one in file.differences if not one.question and not _is_main(file, one)]
    controls = _by_question(file.differences)
    scattered = main or others or file.differences
    gaps = [gap for one in scattered for gap in one.gaps]
    finetune = _finetune_plots(comparison, arms)
    return render(
        "comparison.html",
        title=f"{file.data}: does TPP help?",
        comparison=comparison,
        file=file,
        answer=_answer(file, main),
        main=main,
        unpaired=_unpaired(file),
        others=others,
        controls=controls,
        scattered=scattered,
        verdicts=VERDICTS,
        arms=arms,
        means={(mean.arm, mean.labels): mean for mean in file.means},
        scale=_scale(file, tested) if tested else None,
        seed_scale=scale_over([0.0, *gaps]),
        efficiency=_efficiency(file, arms),
        finetune=finetune,
        losses=[series for series in arms.values() if any(series in plot.looks for plot in finetune)],
        changes=_changes(file.tpp),
        pretext=_pretext_plot(comparison),
        costs=_costs(file),
        failed=[(one.cell, without_folders(one.reason)) for one in file.failed],
        notes=[without_folders(note) for note in file.notes],
    )


def read_comparison(folder: Path) -> Comparison:
    """Read the files of a comparison. Raises DataError where one is missing or broken."""
    file = read_model(folder / "comparison.json", ComparisonFile)
    cells = read_table(folder / "cells.csv", ("arm", "labels", "status", "folder"))
    logs: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for cell in cells[cells.status == _DONE].itertuples():
        path = _inside(folder, str(cell.folder)) / "finetune" / "log.csv"
        logs.setdefault((str(cell.arm), str(cell.labels)), []).append(_read_losses(path))
    tpp_logs: dict[str, list[pd.DataFrame]] = {}
    previews: dict[str, tuple[Picture, str]] = {}
    for stage in file.tpp:
        if stage.log is not None:
            tpp_logs.setdefault(stage.title, []).append(_read_losses(_inside(folder, stage.log)))
        if stage.preview is not None and stage.init == "tpp" and stage.title not in previews:
            picture = read_picture(_inside(folder, stage.preview), longest=900)
            previews[stage.title] = picture, rows_of_preview(stage.views)
    return Comparison(file, read_experiment(folder / "experiment.yaml"), logs, tpp_logs, previews)


def _read_losses(path: Path) -> pd.DataFrame:
    return read_table(path, ("step", "loss"), ("step", "loss"))


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} names a file outside itself: {name!r}. Copy the folder again, whole.")
    return path


def _is_main(file: ComparisonFile, one: DifferenceFile) -> bool:
    """Whether it is TPP against the same tuner's own start."""
    arms = {arm.name: arm for arm in file.arms}
    arm, baseline = arms.get(one.arm), arms.get(one.baseline)
    return arm is not None and baseline is not None and (baseline.tuner, baseline.init) == (arm.tuner, "standard")


def _by_question(differences: Iterable[DifferenceFile]) -> dict[str, list[DifferenceFile]]:
    """What TPP is against its controls, by the question that each answers."""
    found: dict[str, list[DifferenceFile]] = {}
    for one in differences:
        if one.question:
            found.setdefault(one.question, []).append(one)
    return found


def _answer(file: ComparisonFile, main: list[DifferenceFile]) -> str:
    """How the pairs of TPP and standard came out, in one sentence."""
    if not main:
        return f"{_unpaired(file)}, so this comparison does not say whether TPP helps."
    counts = Counter[str](one.verdict for one in main)
    if len(main) == 1:
        said = _ONE[main[0].verdict]
        result = f"At {_labels(file, main[0].labels)}, {said}."
    else:
        parts = [text.format(counts[verdict]) for verdict, text in _SEVERAL.items() if counts[verdict]]
        result = f"Of {len(main)} comparisons, {'; '.join(parts)}."
    unit = f" of {plural(file.n_patients, 'patient')}" if file.unit == "patient" else ""
    counted = [one.seeds for one in main]  # fewer than planned where cells failed
    least, most = min(counted), max(counted)
    return (
        "Does it help to pre-train the target parameters without labels (TPP), instead of fine-tuning from the tuner's "
        f"own start? {result} Measured by {file.metric_title} on {plural(file.n_cases, 'test case')}{unit}, with "
        f"{f'{least} to ' if least < most else ''}{plural(most, 'seed')}."
    )


def _unpaired(file: ComparisonFile) -> str:
    """Why there is no difference of TPP and a tuner's own start, without the full stop."""
    began = {(arm.tuner, arm.init) for arm in file.arms}
    if any((tuner, "standard") in began for tuner, init in began if init == "tpp"):
        return "No seed of TPP and of the tuner's own start is done in both"
    return "No pair of arms differs in TPP alone"


def _scale(file: ComparisonFile, tested: list[DifferenceFile]) -> Scale:
    ends = [end for one in tested for end in (one.low, one.value, one.high) if end is not None]
    return scale_over([0.0, -file.margin, file.margin, *ends])


def _efficiency(file: ComparisonFile, arms: dict[str, Series]) -> Markup | None:
    """The metric over the number of labels; nothing where there is one number alone."""
    if len(file.labels) < 2:
        return None
    lines: dict[Series, list[tuple[int, float, float | None, float | None]]] = {}
    for mean in file.means:
        if mean.value is not None:
            point = (file.label_counts[mean.labels], mean.value, mean.low, mean.high)
            lines.setdefault(arms[mean.arm], []).append(point)
    points = {series: sorted(line) for series, line in lines.items()}
    return figures.efficiency_figure(points, file.title_with_unit) if points else None


@dataclass(frozen=True)
class Plot:
    """A plot with its title, and how its lines look."""

    title: str
    svg: Markup
    alt: str
    looks: tuple[Series, ...]


def _finetune_plots(comparison: Comparison, arms: dict[str, Series]) -> list[Plot]:
    """Losses of each tuner without TPP and with each pretext task of it, at each number of labels."""
    file = comparison.file
    plots: list[Plot] = []
    standard = {arm.tuner: arm.name for arm in file.arms if arm.init == "standard"}
    for arm in (arm for arm in file.arms if arm.init == "tpp"):
        for labels in file.labels:
            bands = {}
            for name in (standard.get(arm.tuner, ""), arm.name):
                logs = comparison.logs.get((name, labels))
                if logs:
                    bands[arms[name]] = loss_band(logs)
            if bands:
                ends = ", ".join(f"{look.name} {band.mean[-1]:.3f}" for look, band in bands.items())
                svg = figures.bands_figure(bands, f"finetune{len(plots)}", "fine-tuning loss")
                title = f"{_without_init(arm)}, {_labels(file, labels)}"
                plots.append(Plot(title, svg, f"Fine-tuning loss, at the end: {ends}.", tuple(bands)))
    return plots


def _without_init(arm: ArmFile) -> str:
    return f"{arm.tuner} {arm.pretext}" if arm.pretext else arm.tuner


def _labels(file: ComparisonFile, labels: str) -> str:
    return f"{file.label_counts[labels]:,} labels" + (" (all)" if labels == "all" else "")


def _pretext_plot(comparison: Comparison) -> Plot | None:
    if not comparison.tpp_logs:
        return None
    bands = {Series(index, title): loss_band(logs) for index, (title, logs) in enumerate(comparison.tpp_logs.items())}
    ends = "; ".join(f"{look.name} from {band.mean[0]:.3f} to {band.mean[-1]:.3f}" for look, band in bands.items())
    svg = figures.bands_figure(bands, "pretext", "pretext loss")
    return Plot("TPP", svg, f"Pretext loss: {ends}.", tuple(bands))


@dataclass(frozen=True)
class Change:
    """What TPP, or a control, changed for a tuner, over its seeds: of each its median and its range, as texts."""

    title: str
    seeds: int
    loss_off: tuple[str, str]
    loss_on: tuple[str, str]
    drift: tuple[str, str]
    seconds: float


def _changes(stages: Iterable[ComparedTPPFile]) -> list[Change]:
    by_title: dict[str, list[ComparedTPPFile]] = {}
    for stage in stages:
        by_title.setdefault(stage.title, []).append(stage)
    return [
        Change(
            title=title,
            seeds=len(found),
            loss_off=_middle([one.pretext_loss_off for one in found]),
            loss_on=_middle([one.pretext_loss_on for one in found]),
            drift=_middle([one.feature_drift for one in found]),
            seconds=median(one.seconds for one in found),
        )
        for title, found in by_title.items()
    ]


def _middle(values: list[float]) -> tuple[str, str]:
    """The median, and the range where there are several."""
    ends = f"{number(min(values), 4)} – {number(max(values), 4)}"
    return number(median(values), 4), ends if len(values) > 1 else ""


@dataclass(frozen=True)
class Cost:
    """An arm with what it costs at each number of labels."""

    arm: ArmFile
    means: list[MeanFile]


def _costs(file: ComparisonFile) -> list[Cost]:
    return [Cost(arm, [mean for mean in file.means if mean.arm == arm.name]) for arm in file.arms]

"""The report on a classification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from markupsafe import Markup

from medtpp.errors import DataError
from medtpp.evaluation import Predictions, read_predictions
from medtpp.evaluation.evaluate import metric_title
from medtpp.report import figures, words
from medtpp.report.curves import ClassCurve, class_curves, reliability
from medtpp.report.page import UNIT, number, percent, render
from medtpp.report.plots import Series
from medtpp.report.read import Picture, read_model, read_models, read_picture, without_folders
from medtpp.report.schema import EvaluationFile, MetricFile, MistakeFile
from medtpp.report.training import Training, learning_alts, setup_of, split_of


def classification_page(folder: Path, run: Training) -> str:
    """The HTML page of a finished run. Raises DataError where a file is missing or broken."""
    evaluation, known = _read_evaluation(folder / "evaluation")
    validation_cases = len(read_predictions(folder / "finetune" / "validation.csv"))
    curves = class_curves(known, evaluation.thresholds, _shown(evaluation))
    series = [Series(index, curve.name) for index, curve in enumerate(curves)]
    setup = setup_of(run)
    return render(
        "classification.html",
        title=f"{setup.data}: {setup.tuner}" + (" with TPP" if run.tpp else ""),
        run=run,
        evaluation=evaluation,
        mistakes=_read_mistakes(folder / "evaluation" / "mistakes"),
        answer=words.answer(evaluation, curves, run.tpp),
        metrics=_metrics(evaluation),
        unit=UNIT,
        setup=setup,
        split=split_of(
            run, list(evaluation.classes), multilabel=evaluation.multilabel, validation_cases=validation_cases
        ),
        classes=list(zip(series, curves, strict=True)),
        plots=_plots(run, known, curves, series),
        alts=_alts(evaluation, curves) | learning_alts(run, "validation loss is least"),
        losses=[figures.LOSS, figures.VALIDATION] if "validation" in run.finetune_log else [figures.LOSS],
        confusions=_confusions(evaluation),
        bins=reliability(known),
        effect=[*words.effect(run.tpp), *words.monitored(run.adapter.tpp)] if run.tpp else [],
        notes=[without_folders(note) for note in evaluation.notes],
    )


def _read_evaluation(folder: Path) -> tuple[EvaluationFile, Predictions]:
    """The evaluation and the predictions of its labelled cases."""
    evaluation = read_model(folder / "evaluation.json", EvaluationFile)
    known = read_predictions(folder / "predictions.csv").labelled()
    if set(known.classes) != set(evaluation.classes) or len(known) != evaluation.n_cases:
        raise DataError(
            f"In {folder}, predictions.csv and evaluation.json are of different evaluations. "
            "Make both again with medtpp run and --resume."
        )
    return evaluation, known


def _read_mistakes(folder: Path) -> list[tuple[MistakeFile, Picture]]:
    path = folder / "mistakes.json"
    if not path.is_file():
        return []
    found = []
    for mistake in read_models(path, MistakeFile):
        if PurePosixPath(mistake.image).name != mistake.image:
            raise DataError(f"{path} names an image outside its folder: {mistake.image!r}.")
        found.append((mistake, read_picture(folder / mistake.image, longest=320)))
    return found


def _shown(evaluation: EvaluationFile) -> list[str]:
    """The classes that have curves: the positive one of two, else all."""
    return list(evaluation.classes) if evaluation.positive is None else [evaluation.positive]


@dataclass(frozen=True)
class MetricRow:
    """A line of the table of metrics."""

    title: str
    meaning: str
    metric: MetricFile
    drawn: bool


def _metrics(evaluation: EvaluationFile) -> list[MetricRow]:
    return [
        MetricRow(metric_title(name, macro=evaluation.positive is None), meaning, evaluation.metrics[name], drawn)
        for name, (meaning, drawn) in words.METRICS.items()
        if name in evaluation.metrics
    ]


def _plots(run: Training, known: Predictions, curves: list[ClassCurve], series: list[Series]) -> dict[str, Markup]:
    plots = {
        "finetune": figures.finetune_curve(run.finetune_log, run.best_step),
        "reliability": figures.reliability_figure(reliability(known)),
    }
    if run.tpp_log is not None:
        plots["pretext"] = figures.pretext_curve(run.tpp_log)
    if curves:
        plots["roc"] = figures.roc_figure(curves, series)
        plots["precision_recall"] = figures.precision_recall_figure(curves, series)
    return plots


def _alts(evaluation: EvaluationFile, curves: list[ClassCurve]) -> dict[str, str]:
    """What the plots show, for who does not see them."""
    areas = evaluation.per_class
    return {
        "roc": "ROC curves. "
        + "; ".join(
            f"{one.name}: AUC {number(areas[one.name]['auc'])}, operating point at sensitivity "
            f"{percent(one.sensitivity)} and specificity {percent(one.specificity)}"
            for one in curves
        ),
        "precision_recall": "Precision-recall curves. "
        + "; ".join(
            f"{one.name}: average precision {number(areas[one.name]['average_precision'])}, guessing "
            f"{number(one.prevalence)}"
            for one in curves
        ),
        "reliability": "Reliability curve. The numbers are in the table beside it.",
    }


@dataclass(frozen=True)
class Confusion:
    """A table of the truth (rows) against the prediction (columns).

    Attributes:
        title: The label it is about, in multi-label tasks.
        names: Of rows and columns.
        rows: Count and share of the row, for each cell.
    """

    title: str
    names: list[str]
    rows: list[list[tuple[int, float]]]


def _confusions(evaluation: EvaluationFile) -> list[Confusion]:
    def table(title: str, names: list[str], counts: list[list[int]]) -> Confusion:
        rows = [[(count, count / max(1, sum(row))) for count in row] for row in counts]
        return Confusion(title, names, rows)

    if not evaluation.multilabel:
        return [table("", list(evaluation.classes), evaluation.confusion)]
    pairs = zip(evaluation.classes, evaluation.confusion, strict=True)
    return [table(name, [f"not {name}", name], counts) for name, counts in pairs]

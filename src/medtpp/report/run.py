"""The report on a run: one model, its test cases, how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from markupsafe import Markup

from medtpp.errors import DataError
from medtpp.evaluation import Predictions, read_predictions
from medtpp.evaluation.evaluate import metric_title
from medtpp.files import MARKER
from medtpp.report import figures, words
from medtpp.report.curves import ClassCurve, class_curves, reliability, smooth
from medtpp.report.page import UNIT, number, percent, plural, render, whole
from medtpp.report.plots import Series
from medtpp.report.read import (
    Experiment,
    Picture,
    read_experiment,
    read_model,
    read_models,
    read_picture,
    read_table,
    without_folders,
)
from medtpp.report.schema import AdapterFile, EvaluationFile, MetricFile, MistakeFile, StageFile

SPLITS = {"train": "training", "val": "validation", "test": "test"}
_LOG = ("step", "loss", "lr_tuner", "validation")


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a run.

    Attributes:
        experiment: As resolved.
        evaluation: On the test cases.
        known: Predictions of the labelled test cases.
        validation_cases: How many validation cases were used.
        split: Columns case, split, label, patient.
        adapter: What is known of the fine-tuned adapter.
        finetune, tpp: What the stages told; the latter None where there was none.
        finetune_log, tpp_log: Losses and rates over the steps.
        mistakes: Pairs of an entry and its image.
        preview: What the pretext task restored.
    """

    experiment: Experiment
    evaluation: EvaluationFile
    known: Predictions
    validation_cases: int
    split: pd.DataFrame
    adapter: AdapterFile
    finetune: StageFile
    finetune_log: pd.DataFrame
    tpp: StageFile | None
    tpp_log: pd.DataFrame | None
    mistakes: list[tuple[MistakeFile, Picture]]
    preview: Picture | None


def run_page(folder: Path) -> str:
    """The HTML page of a finished run. Raises DataError where a file is missing or broken."""
    run = read_run(folder)
    evaluation = run.evaluation
    curves = class_curves(run.known, evaluation.thresholds, _shown(evaluation))
    series = [Series(index, curve.name) for index, curve in enumerate(curves)]
    setup = _setup(run)
    return render(
        "run.html",
        title=f"{setup.data}: {setup.tuner}" + (" with TPP" if run.tpp else ""),
        run=run,
        evaluation=evaluation,
        answer=words.answer(evaluation, curves, run.tpp),
        metrics=_metrics(evaluation),
        unit=UNIT,
        setup=setup,
        split=_split(run),
        classes=list(zip(series, curves, strict=True)),
        plots=_plots(run, curves, series),
        alts=_alts(run, curves),
        losses=[figures.LOSS, figures.VALIDATION] if "validation" in run.finetune_log else [figures.LOSS],
        confusions=_confusions(evaluation),
        bins=reliability(run.known),
        effect=words.effect(run.tpp) if run.tpp else [],
        stages=[(name, stage) for name, stage in (("TPP", run.tpp), ("fine-tuning", run.finetune)) if stage],
        notes=[without_folders(note) for note in evaluation.notes],
    )


def read_run(folder: Path) -> Run:
    """Read the files of a run. Raises DataError where one is missing or broken."""
    finetune, tpp = folder / "finetune", folder / "tpp"
    evaluation = read_model(folder / "evaluation" / "evaluation.json", EvaluationFile)
    known = read_predictions(folder / "evaluation" / "predictions.csv").labelled()
    if set(known.classes) != set(evaluation.classes) or len(known) != evaluation.n_cases:
        raise DataError(
            f"In {folder / 'evaluation'}, predictions.csv and evaluation.json are of different evaluations. "
            "Make both again with medtpp run and --resume."
        )
    has_tpp = (tpp / MARKER).is_file()
    preview = tpp / "preview.png"
    return Run(
        experiment=read_experiment(folder / "experiment.yaml", ("data", "backbone", "tuner", "pretext")),
        evaluation=evaluation,
        known=known,
        validation_cases=len(read_predictions(finetune / "validation.csv")),
        split=read_table(folder / "split.csv", ("case", "split", "label", "patient")),
        adapter=read_model(finetune / "adapter" / "medtpp.json", AdapterFile),
        finetune=read_model(finetune / MARKER, StageFile),
        finetune_log=read_table(finetune / "log.csv", ("step", "loss"), _LOG),
        tpp=read_model(tpp / MARKER, StageFile) if has_tpp else None,
        tpp_log=read_table(tpp / "log.csv", ("step", "loss", "lr_tuner"), _LOG) if has_tpp else None,
        mistakes=_read_mistakes(folder / "evaluation" / "mistakes"),
        preview=read_picture(preview) if has_tpp and preview.is_file() else None,
    )


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


@dataclass(frozen=True)
class Setup:
    """What was run.

    Attributes:
        data: Name of the data set.
        tuner: Name of the PEFT method.
        rows: Pairs of a term and what it was.
    """

    data: str
    tuner: str
    rows: list[tuple[str, str]]


def _setup(run: Run) -> Setup:
    values, card = run.experiment.values, run.adapter
    tuner, pretext = _section(values, "tuner"), _section(values, "pretext")
    rows = [
        ("backbone", f"{_section(values, 'backbone').get('name')} ({card.backbone.architecture})"),
        ("images", f"{card.backbone.image_size} × {card.backbone.image_size} pixels"),
        ("tuner", _method(tuner)),
        ("TPP", f"{_method(pretext)}; {_stage(run.tpp)}" if run.tpp else "none"),
        ("fine-tuning", _stage(run.finetune)),
        ("weights kept", _kept(run.finetune)),
        ("seed", str(values.get("seed", 0))),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ]
    data = PurePosixPath(str(_section(values, "data").get("path", "data")).replace("\\", "/"))
    return Setup(data.name.removesuffix(".csv"), str(tuner.get("name")), rows)


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {"name": section}


def _method(options: Mapping[str, Any]) -> str:
    parts = [
        f"{key.replace('_', ' ')} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in options.items()
        if key != "name"
    ]
    return f"{options.get('name')}" + (f" ({'; '.join(parts)})" if parts else "")


def _stage(stage: StageFile) -> str:
    rate = f"{stage.learning_rate:g}".replace("-", "−")
    warmup = f", after {whole(stage.head_warmup)} steps of its head alone" if stage.head_warmup else ""
    return f"{stage.steps:,} steps of {plural(stage.batch_size, 'image')}, learning rate {rate}{warmup}"


def _kept(stage: StageFile) -> str:
    best = stage.best
    return f"of step {best.step:,}, the best on the validation cases" if best else "of the last step"


@dataclass(frozen=True)
class Split:
    """How the cases were divided.

    Attributes:
        rows: Title, cases, patients (None where unknown) and counts by class, for each split.
        statements: Who is apart from whom, and what TPP saw.
        cautions: What makes the numbers less sure.
    """

    rows: list[tuple[str, int, int | None, list[int]]]
    statements: list[str]
    cautions: list[str]


def _split(run: Run) -> Split:
    table, classes = run.split, list(run.evaluation.classes)
    known = table[table.patient != ""]
    rows = []
    for name, title in SPLITS.items():
        part = table[table.split == name]
        has = [set(label.split(";")) if run.evaluation.multilabel else {label} for label in part.label]
        patients = part.patient[part.patient != ""].nunique() if len(known) else None
        rows.append((title, len(part), patients, [sum(one in labels for labels in has) for one in classes]))
    statements, cautions = [], []
    shared = int((known.groupby("patient").split.nunique() > 1).sum())
    if shared:
        cautions.append(f"{plural(shared, 'patient')} in more than one part: the test flatters.")
    elif len(known) == len(table):
        statements.append("No patient is in more than one part.")
    if not len(known):
        cautions.append(
            "Patients are unknown. Images of one patient may be in several parts, and then the test flatters."
        )
    elif len(known) < len(table):
        cautions.append(f"{plural(len(table) - len(known), 'case')} without a patient, each taken as one of its own.")
    used = _section(run.experiment.values, "data").get("labels", "all")
    if used != "all":
        statements.append(
            f"Of the training and validation cases, {used} labelled ones were drawn and used "
            f"({plural(run.validation_cases, 'validation case')} among them)."
        )
    seen = run.adapter.tpp
    if run.tpp and seen:
        statements.append(f"TPP saw {plural(seen.images, 'image')}, without labels.")
        if seen.transductive:
            cautions.append(
                "Transductive: TPP saw images of validation and test cases, without their labels. "
                "These numbers do not hold for new images."
            )
    return Split(rows, statements, cautions)


def _plots(run: Run, curves: list[ClassCurve], series: list[Series]) -> dict[str, Markup]:
    best = run.finetune.best.step if run.finetune.best else None
    plots = {
        "finetune": figures.finetune_curve(run.finetune_log, best),
        "reliability": figures.reliability_figure(reliability(run.known)),
    }
    if run.tpp_log is not None:
        plots["pretext"] = figures.pretext_curve(run.tpp_log)
    if curves:
        plots["roc"] = figures.roc_figure(curves, series)
        plots["precision_recall"] = figures.precision_recall_figure(curves, series)
    return plots


def _alts(run: Run, curves: list[ClassCurve]) -> dict[str, str]:
    """What the plots show, for who does not see them."""
    areas = run.evaluation.per_class
    best = run.finetune.best
    alts = {
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
        "finetune": f"Training loss of {run.finetune.steps} steps of fine-tuning, {_fall(run.finetune_log)}."
        + (f" The validation loss is least at step {best.step}." if best else ""),
    }
    if run.tpp_log is not None:
        alts["pretext"] = f"Pretext loss of {len(run.tpp_log)} logged steps, {_fall(run.tpp_log)}; learning rate below."
    return alts


def _fall(log: pd.DataFrame) -> str:
    loss = smooth(log.loss)
    return f"from {loss.iloc[0]:.3f} to {loss.iloc[-1]:.3f}"


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

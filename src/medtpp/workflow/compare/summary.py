"""From the cells' files to cells.csv and comparison.json: means, paired differences, and what may be said of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from medtpp.data.problems import count
from medtpp.evaluation.bootstrap import Bootstrap
from medtpp.evaluation.evaluate import metric_title
from medtpp.evaluation.paired import (
    LOWER_IS_BETTER,
    Run,
    Scorable,
    Scores,
    SegmentationRun,
    as_other_method,
    difference,
    holm,
    judge,
    resample,
    resamples_for,
)
from medtpp.evaluation.predictions import read_predictions
from medtpp.evaluation.segmentation import TITLES
from medtpp.evaluation.segmentation_table import read_segmentations
from medtpp.files import MARKER, atomic, read_json, write_json
from medtpp.report.schema import ArmFile, ComparedTPPFile, ComparisonFile, DifferenceFile, FailedFile, MeanFile
from medtpp.seeds import Seeds
from medtpp.workflow.compare.comparison import Comparison, log_file
from medtpp.workflow.compare.plan import CONTROLS, PRIMED, REFERENCES, STARTS, Arm, Cell, Labels
from medtpp.workflow.compare.words import QUESTIONS, Measure, sentence

LEVEL = 0.95
_DESCRIPTIONS = {
    "standard": "{} from its own start, then fine-tuning",
    "tpp": "{}, Target Parameter Pre-training, then the same fine-tuning",
    "tpp_labelled": "{}, as many steps of TPP on the labelled training images alone, then the same fine-tuning",
    "tpp_foreign": "{}, as many steps of TPP on foreign images, then the same fine-tuning",
    "random_direction": "{} as far from its own start as TPP ends, in a random direction, then the same fine-tuning",
    "longer": "{} from its own start, fine-tuned for as long as TPP and fine-tuning take together",
    "pissa": "{} started from the main singular values of the weights (PiSSA), then fine-tuning",
    "olora": "{} started from a QR decomposition of the weights (OLoRA), then fine-tuning",
    "lora_ga": "{} started from the main directions of the task's first gradients (LoRA-GA), then fine-tuning",
    "eva": "{} started from the main directions of the training images' features (EVA), then fine-tuning",
    "scratch": "all weights of the backbone trained from random ones",
}
_FULL = "all weights of the backbone fine-tuned"


def summarise(comparison: Comparison, out: Path) -> ComparisonFile:
    """Evaluate what is there, and write `cells.csv` and `comparison.json`."""
    rows = [_row(comparison, cell, out) for cell in comparison.cells]
    _write_rows(out / "cells.csv", rows)
    test = comparison.prepared.cases("test")
    patients = {case.patient or f"case {case.id}" for case in test}
    axes, seeds = comparison.axes, sorted({cell.seed for cell in comparison.cells})
    families = _families(comparison)
    bootstrap = Bootstrap(
        resamples_for(max(map(len, families.values()))),
        LEVEL,
        Seeds(comparison.base.seed).number("bootstrap"),
        "patient" if any(case.patient for case in test) else "case",
    )
    runs = {cell: read_result(cell.folder(out)) for cell in comparison.cells if (cell.folder(out) / MARKER).is_file()}
    scores: dict[tuple[Arm, str], Scores] = {}
    for arm in comparison.arms:
        for labels in comparison.labels:
            mine = {cell.seed: run for cell, run in runs.items() if (cell.arm, cell.labels) == (arm, labels)}
            if mine:
                scores[arm, str(labels)] = resample(mine, axes.metric, bootstrap)
    title, unit, margin = _title(comparison), _unit(axes.metric, runs.values()), axes.margin or 0.0
    counts = {str(labels): _count(comparison, labels) for labels in comparison.labels}
    summary = ComparisonFile(
        schema=1,
        data=comparison.prepared.dataset.root.resolve().name,
        metric=axes.metric,
        metric_title=title,
        metric_unit=unit,
        higher_is_better=axes.metric not in LOWER_IS_BETTER,
        margin=margin,
        level=LEVEL,
        n_cases=len(test),
        n_patients=len(patients),
        unit=bootstrap.unit,
        resamples=bootstrap.resamples,
        seeds=seeds,
        labels=list(counts),
        label_counts=counts,
        arms=[_describe(comparison, arm) for arm in comparison.arms],
        means=[
            _mean(arm, str(labels), scores.get((arm, str(labels))), rows)
            for arm, labels in dict.fromkeys((cell.arm, cell.labels) for cell in comparison.cells)
        ],
        differences=_differences(families, scores, Measure(axes.metric, title, unit, margin)),
        tpp=_pretext(comparison, out),
        failed=_failed(comparison, out),
        notes=notes_of(comparison, list(scores.values())),
    )
    write_json(out / "comparison.json", summary.model_dump(mode="json", by_alias=True))
    return summary


def _describe(comparison: Comparison, arm: Arm) -> ArmFile:
    masks = bool(comparison.prepared.dataset.structures)
    references = {"full": _FULL, "linear": f"{'decoder and head' if masks else 'a head'} on frozen features"}
    text = references[arm.tuner] if arm.is_reference else _DESCRIPTIONS[arm.init].format(arm.tuner)
    if len(comparison.pretexts) > 1 and arm.init in PRIMED:
        text += f"; TPP by {comparison.pretext_of(arm)}"
    return ArmFile(name=arm.name, tuner=arm.tuner, init=arm.init, pretext=arm.pretext, description=text)


def _count(comparison: Comparison, labels: Labels) -> int:
    return len(comparison.prepared.cases("train", "val")) if labels == "all" else labels


def _title(comparison: Comparison) -> str:
    """The metric in a reader's words."""
    metric, dataset = comparison.axes.metric, comparison.prepared.dataset
    if dataset.structures:
        return TITLES[metric]
    return metric_title(metric, macro=dataset.multilabel or len(dataset.classes) != 2)


def _unit(metric: str, runs: Iterable[Scorable]) -> str:
    """The unit of a distance; nothing for shares, and where no cell is done."""
    tables = [run.table for run in runs if isinstance(run, SegmentationRun)]
    return tables[0].unit if tables and metric == "hd95" else ""


def read_result(folder: Path) -> Scorable:
    """The test results of a cell that is done. Raises DataError where they are broken."""
    masks = folder / "evaluation" / "segmentation.csv"
    if masks.is_file():
        return SegmentationRun(read_segmentations(masks))
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    predictions = read_predictions(folder / "evaluation" / "predictions.csv")
    return Run(predictions, evaluation["thresholds"], evaluation["positive"])


def _row(comparison: Comparison, cell: Cell, out: Path) -> dict[str, Any]:
    """A cell for `cells.csv`: what it is, what came out, what it cost."""
    folder = cell.folder(out)
    row: dict[str, Any] = {
        "data": comparison.prepared.dataset.root.resolve().name,
        "tuner": cell.arm.tuner,
        "init": cell.arm.init,
        "pretext": comparison.pretext_of(cell.arm),
        "arm": cell.arm.name,
        "labels": cell.labels,
        "n_labels": _count(comparison, cell.labels),
        "seed": cell.seed,
        "status": "failed" if log_file(out, folder).with_suffix(".json").is_file() else "missing",
        "folder": folder.relative_to(out).as_posix(),
    }
    if not (folder / MARKER).is_file():
        return row
    done, stage = read_json(folder / MARKER), read_json(folder / "finetune" / MARKER)
    row |= {"status": "done", **{f"n_{name}": count for name, count in done["cases"].items()}}
    row |= done["metrics"]
    for name in ("steps", "batch_size", "seconds", "peak_memory_mib", "target_parameters", "head_parameters"):
        row[name] = stage[name]
    if cell.starts and cell.starts[-1].origin is None:
        pretext = read_json(cell.starts[-1].folder(out) / MARKER)
        for name in ("steps", "seconds", "peak_memory_mib", "pretext_loss_on", "pretext_loss_off", "feature_drift"):
            row[f"tpp_{name}"] = pretext[name]
    return row


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _mean(arm: Arm, labels: str, scores: Scores | None, rows: list[dict[str, Any]]) -> MeanFile:
    done = [row for row in rows if (row["arm"], str(row["labels"]), row["status"]) == (arm.name, labels, "done")]
    if scores is None or not done:
        return MeanFile(arm=arm.name, labels=labels, seeds=0)
    estimate = scores.mean()
    spent = [row["tpp_seconds"] for row in done if "tpp_seconds" in row]
    peaks = [max(row["peak_memory_mib"], row.get("tpp_peak_memory_mib", 0.0)) for row in done]  # one stage at a time
    return MeanFile(
        arm=arm.name,
        labels=labels,
        seeds=len(done),
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        seconds=median(row["seconds"] for row in done),
        tpp_seconds=median(spent) if spent else None,
        peak_memory_mib=median(peaks),
        target_parameters=done[0]["target_parameters"],
    )


def _families(comparison: Comparison) -> dict[str, list[tuple[Arm, Arm, str]]]:
    """TPP against other starts of its tuner, its controls and the references, at each label count, by kind."""
    return {
        kind: [
            (arm, baseline, labels)
            for arm in comparison.arms
            for baseline in comparison.arms
            for labels in map(str, comparison.labels)
            if arm.init == "tpp" and _is_baseline(comparison, baseline, kind, arm)
        ]
        for kind in ("standard", "longer", *STARTS, *REFERENCES, "scratch", *CONTROLS)
    }


def _differences(
    families: dict[str, list[tuple[Arm, Arm, str]]], scores: dict[tuple[Arm, str], Scores], measure: Measure
) -> list[DifferenceFile]:
    """Those of the pairs that have seeds in common; each kind of baseline is a family of tests."""
    found = []
    for kind, planned in families.items():
        pairs = [
            (arm, baseline, labels, difference(scores[arm, labels], scores[baseline, labels]))
            for arm, baseline, labels in planned
            if _share_seeds(scores.get((arm, labels)), scores.get((baseline, labels)))
        ]
        for (arm, baseline, labels, gap), p_holm in zip(pairs, holm([pair[3].p for pair in pairs]), strict=True):
            verdict = judge(gap, p_holm, metric=measure.metric, margin=measure.margin)
            verdict = as_other_method(verdict) if arm.is_method_beside(baseline) else verdict
            found.append(
                DifferenceFile(
                    arm=arm.name,
                    baseline=baseline.name,
                    labels=labels,
                    seeds=len(gap.by_seed),
                    value=gap.estimate.value,
                    low=gap.estimate.low,
                    high=gap.estimate.high,
                    p=gap.p,
                    p_holm=p_holm,
                    verdict=verdict,
                    sentence=sentence(arm, baseline, labels, gap, verdict, measure),
                    by_seed={str(seed): value for seed, value in gap.by_seed.items()},
                    question=QUESTIONS.get(kind, ""),
                )
            )
    return found


def _is_baseline(comparison: Comparison, baseline: Arm, kind: str, arm: Arm) -> bool:
    if kind in REFERENCES:
        return baseline.is_reference and baseline.tuner == kind != arm.tuner
    if kind == "scratch":  # one for all tuners
        return baseline.init == kind
    if kind in CONTROLS and baseline.pretext != arm.pretext:
        return False
    if kind == "longer" and arm.pretext != comparison.pretexts[0]:  # it takes as long as TPP by that one
        return False
    return baseline.init == kind and baseline.tuner == arm.tuner


def _share_seeds(first: Scores | None, second: Scores | None) -> bool:
    return first is not None and second is not None and not set(first.seeds).isdisjoint(second.seeds)


def _pretext(comparison: Comparison, out: Path) -> list[ComparedTPPFile]:
    found = []
    for start in comparison.starts:
        folder = start.folder(out)
        if start.origin is None and (folder / MARKER).is_file():
            files = {"log": folder / "log.csv", "preview": folder / "preview.png"}
            paths = {name: path.relative_to(out).as_posix() for name, path in files.items() if path.is_file()}
            arm = start.arm
            what = {"tuner": arm.tuner, "init": arm.init, "pretext": arm.pretext, "seed": start.seed}
            labels = None if start.labels is None else str(start.labels)
            told = {**read_json(folder / MARKER), **what, "labels": labels, **paths}
            found.append(ComparedTPPFile.model_validate(told))
    return found


def _failed(comparison: Comparison, out: Path) -> list[FailedFile]:
    starts, cells = comparison.starts, comparison.cells
    folders = [*(start.folder(out) for start in starts), *(cell.folder(out) for cell in cells)]
    files = [log_file(out, folder).with_suffix(".json") for folder in folders if not (folder / MARKER).is_file()]
    found = [read_json(path) for path in files if path.is_file()]
    return [FailedFile(cell=failure["name"], reason=failure["reason"]) for failure in found]


def notes_of(comparison: Comparison, scores: list[Scores]) -> list[str]:
    """What is to be known when the numbers are read."""
    notes = []
    if comparison.held_out is not None:
        notes.append(f"The test cases are one of several test sets: {comparison.held_out.title}.")
    undefined = max((scored.mean().undefined_share for scored in scores), default=0.0)
    if undefined > 0.01:
        kind = "a structure" if comparison.prepared.dataset.structures else "a class"
        notes.append(
            f"In {undefined:.0%} of the resamples the metric does not exist, since no case of {kind} was drawn; these "
            "are left out of intervals and p-values."
        )
    if "tpp_labelled" in comparison.axes.inits and set(comparison.labels_of_tpp) & set(comparison.axes.labels):
        notes.append(
            "At all labels, TPP on the labelled images alone would be TPP itself, since there are no unlabelled ones: "
            "it is left out there."
        )
    if comparison.axes.seeds < 10:
        notes.append(f"{count(comparison.axes.seeds, 'seed')}: with few labels at least 10 are advised.")
    if not any(case.patient for case in comparison.prepared.dataset.cases):
        notes.append("No patient is known: the bootstrap draws cases, and intervals are too narrow if patients repeat.")
    return notes

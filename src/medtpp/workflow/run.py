"""Runs: stages as cached steps over one folder, alone or all in a row.

OUT/experiment.yaml   # fully resolved
OUT/split.csv         # who is in train, val, test
OUT/tpp/adapter       # after Target Parameter Pre-training
OUT/finetune/adapter  # the result
OUT/evaluation/       # predictions.csv, evaluation.json
OUT/summary.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medtpp.adapter import load_adapter, read_card, refuse_overlap
from medtpp.backbones.folder import seen_by
from medtpp.config import Experiment
from medtpp.errors import LeakageError
from medtpp.evaluation import Evaluation, evaluate, positive_class, write_predictions
from medtpp.files import MARKER, prepare_folder, read_json, write_json
from medtpp.inference.predict import as_predictions, predict_rows
from medtpp.seeds import Seeds
from medtpp.training.device import choose_accelerator
from medtpp.training.finetune import FinetuneInputs, run_finetune
from medtpp.training.tpp import TPPInputs, run_tpp
from medtpp.workflow.experiment import write_experiment
from medtpp.workflow.prepare import Prepared, prepare
from medtpp.workflow.steps import step

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        folder: Of the run.
        adapter: The fine-tuned adapter folder.
        prepared: The data and the resolved experiment.
        evaluation: On the test cases.
        stages: What each stage told, by name.
    """

    folder: Path
    adapter: Path
    prepared: Prepared
    evaluation: Evaluation
    stages: dict[str, dict[str, Any]]


def open_run(
    experiment: Experiment,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Make the output folder, prepare the data, keep the split and the resolved experiment there.

    Raises:
        OutputError: The folder is not empty and neither `resume` nor `overwrite` is given.
        DataError, ConfigError: As `prepare`.
        LeakageError: The backbone was pre-trained on test cases.
    """
    prepare_folder(out, resume=resume, overwrite=overwrite)
    prepared = prepare(experiment, split_file=out / "split.csv", progress=progress)
    refuse_overlap(
        f"The backbone {experiment.backbone.name}",
        seen_by(experiment.backbone).overlap(prepared.cases("test"), prepared.records),
    )
    write_experiment(out / "experiment.yaml", prepared.experiment)
    return prepared


def run(experiment: Experiment, out: Path, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """TPP, fine-tuning, one evaluation on the test cases, and a summary.

    Raises:
        MedtppError: As the stages and `open_run`.
    """
    return run_stages(open_run(experiment, out, resume=resume, overwrite=overwrite), out)


def run_stages(prepared: Prepared, out: Path, tell: Tell = lambda _: None) -> RunResult:
    """The stages of a run that was opened; those done before are not done again."""
    stages: dict[str, dict[str, Any]] = {}
    start = None
    if prepared.experiment.tpp.enabled:
        start = tpp_stage(prepared, out / "tpp", tell)
        stages["tpp"] = read_json(out / "tpp" / MARKER)
    adapter = finetune_stage(prepared, out / "finetune", tell, start=start)
    stages["finetune"] = read_json(out / "finetune" / MARKER)
    evaluation = evaluate_stage(prepared, adapter, out / "evaluation")
    metrics = {name: estimate.value for name, estimate in evaluation.metrics.items()}
    write_json(out / "summary.json", {"adapter": str(adapter), "stages": stages, "test": metrics})
    return RunResult(out, adapter, prepared, evaluation, stages)


def tpp_stage(prepared: Prepared, folder: Path, tell: Tell) -> Path:
    """Target Parameter Pre-training as a step. Gives its adapter folder."""
    experiment, cases = prepared.experiment, prepared.tpp
    inputs = TPPInputs(experiment, prepared.preprocessing, prepared.data(cases), prepared.fingerprints(cases))
    key = _key(prepared, "tpp", "pretext") | {"cases": sorted(case.id for case in cases)}
    if not step(folder, key, lambda: run_tpp(inputs, folder)):
        tell("TPP was done before.")
    return folder / "adapter"


def finetune_stage(prepared: Prepared, folder: Path, tell: Tell, *, start: Path | None = None) -> Path:
    """Fine-tuning as a step, from a TPP adapter or the tuner's own start. Gives its adapter folder.

    Raises:
        LeakageError: The adapter to start from saw test cases, and was not made transductively on purpose.
    """
    test = prepared.cases("test")
    if start is not None:
        card = read_card(start)
        if card.tpp is not None and not card.tpp.transductive:
            refuse_overlap(f"The adapter {start}", card.tpp.fingerprints.overlap(test, prepared.records))
    inputs = FinetuneInputs(
        experiment=prepared.experiment,
        preprocessing=prepared.preprocessing,
        train=prepared.data(prepared.cases("train")),
        val=prepared.data(prepared.cases("val")),
        classes=prepared.dataset.classes,
        multilabel=prepared.dataset.multilabel,
        fingerprints=prepared.fingerprints(prepared.cases("train", "val")),
        start=start,
    )
    key = _key(prepared, "finetune", "task") | {
        "start": None if start is None else read_card(start).model_dump(mode="json", exclude={"versions"}),
        "split": prepared.split,
    }
    if not step(folder, key, lambda: run_finetune(inputs, folder)):
        tell("Fine-tuning was done before.")
    return folder / "adapter"


def evaluate_stage(prepared: Prepared, adapter: Path, folder: Path) -> Evaluation:
    """Predict the test cases in float32 and write predictions.csv and evaluation.json.

    Raises:
        LeakageError: The adapter or its backbone was trained on test cases.
    """
    test = prepared.cases("test")
    loaded = load_adapter(adapter)
    card, task = loaded.card, loaded.task
    if task is None or card.task is None:
        raise LeakageError(f"The adapter {adapter} has no head: fine-tune it first.")
    refuse_overlap(f"The adapter {adapter}", card.trained_on.overlap(test, prepared.records))
    refuse_overlap(f"The backbone of {adapter}", seen_by(card.backbone.options).overlap(test, prepared.records))
    notes = []
    if card.tpp is not None:
        overlap = card.tpp.fingerprints.overlap(test, prepared.records)
        if not card.tpp.transductive:
            refuse_overlap(f"TPP of {adapter}", overlap)
        elif overlap:
            notes.append(f"Transductive: TPP saw {len(overlap)} of the test images, without their labels.")
    device = torch.device(choose_accelerator(prepared.experiment.hardware.accelerator))
    loaded.backbone.to(device)
    task.to(device)
    data = prepared.data(test)
    logits = predict_rows(loaded.backbone, task, data.cache.images, data.rows, device=device)
    predictions = as_predictions(
        test, "test", task.probabilities(logits), card.task.classes, multilabel=card.task.multilabel
    )
    write_predictions(folder / "predictions.csv", predictions)
    evaluation = evaluate(
        predictions,
        thresholds=card.task.thresholds,
        positive=positive_class(predictions, card.task.positive),
        seed=Seeds(prepared.experiment.seed).number("bootstrap"),
        notes=notes,
    )
    evaluation.save(folder)
    return evaluation


def _key(prepared: Prepared, *sections: str) -> dict[str, Any]:
    """What a stage's result depends on, of the experiment. The machine is not part of it."""
    values = prepared.experiment.model_dump(mode="json")
    shared = ("seed", "backbone", "tuner", *sections)
    data = {name: values["data"][name] for name in ("modality", "augment", "multilabel")}
    return {name: values[name] for name in shared} | {
        "data": data,
        "preprocessing": prepared.preprocessing.model_dump(mode="json"),
    }

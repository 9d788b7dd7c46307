"""Runs: stages as cached steps over one folder, alone or all in a row.

OUT/experiment.yaml   # fully resolved
OUT/split.csv         # who is in train, val, test
OUT/tpp/adapter       # after Target Parameter Pre-training
OUT/tpp-TASK          # with tpp.choose, the stage with each task, of which one is copied to tpp
OUT/finetune/adapter  # the result
OUT/evaluation/       # predictions.csv, evaluation.json
OUT/summary.json
OUT/report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtpp.adapter import load_adapter, read_card, refuse_overlap, save_adapter
from medtpp.backbones.folder import seen_by
from medtpp.config import TASKS, TUNERS, Experiment
from medtpp.data.cache import ImageCache
from medtpp.data.case import Case
from medtpp.data.holdout import Holdout
from medtpp.data.preprocess import Preprocessing
from medtpp.data.split import write_split
from medtpp.data.volume_plan import as_options
from medtpp.errors import ConfigError
from medtpp.evaluation import Evaluation, SegmentationEvaluation
from medtpp.files import MARKER, digest, prepare_folder, read_json, write_json
from medtpp.report import write_report
from medtpp.seeds import Seeds
from medtpp.training.finetune import FinetuneInputs, run_finetune
from medtpp.training.monitor import plan_monitor
from medtpp.training.tpp import TPPInputs, candidates, run_tpp
from medtpp.workflow.evaluate import classified, segmented
from medtpp.workflow.experiment import write_experiment
from medtpp.workflow.guards import refuse_changes, require_fit, require_head
from medtpp.workflow.prepare import Prepared, PreparedData, arrange, prepare
from medtpp.workflow.steps import refuse_folder, step

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
    evaluation: Evaluation | SegmentationEvaluation
    stages: dict[str, dict[str, Any]]


def open_run(
    experiment: Experiment,
    out: Path,
    *,
    adapter: Path | None = None,
    all_test: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Make the output folder, prepare the data, keep the split and the resolved experiment there.

    What was in the folder is replaced when all is known to be well, and not before.

    Args:
        experiment: As written by the user.
        out: The output folder.
        adapter: An adapter folder that the run will read.
        all_test: Take all labelled cases as test cases.
        resume: Go on with what the folder holds.
        overwrite: Replace what the folder holds.
        progress: Called with images decoded so far and in all.

    Raises:
        OutputError: The folder is not empty and neither `resume` nor `overwrite` is given.
        DataError, ConfigError: As `prepare`; or the folder holds a run of another experiment.
        LeakageError: The backbone was pre-trained on test cases.
    """
    prepared = read_run(
        experiment, out, adapter=adapter, all_test=all_test, resume=resume, overwrite=overwrite, progress=progress
    )
    if overwrite:
        prepare_folder(out, overwrite=True)
    else:
        refuse_changes(out, prepared)
    keep_run(prepared, prepared.experiment, out)
    return prepared


def read_run(
    experiment: Experiment,
    out: Path,
    *,
    adapter: Path | None = None,
    all_test: bool = False,
    held_out: Holdout | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """The first part of `open_run`: the data are prepared. Nothing in the folder is changed.

    Args:
        experiment: As written by the user.
        out: The output folder.
        adapter: An adapter folder that the run will read.
        all_test: Take all labelled cases as test cases.
        held_out: Take a fold or a site as test cases.
        resume: Go on with what the folder holds.
        overwrite: What the folder holds will be replaced.
        progress: Called with images decoded so far and in all.

    Raises:
        MedtppError: As `open_run`, but that the folder may hold another experiment.
    """
    backbone = experiment.backbone
    reads = [experiment.data.path, *experiment.data.unlabelled, Path(backbone.name), Path(backbone.weights)]
    refuse_folder(out, [*reads, *([adapter] if adapter else [])], resume=resume, overwrite=overwrite)
    kept = None if overwrite else out / "split.csv"
    prepared = prepare(experiment, split_file=kept, all_test=all_test, held_out=held_out, progress=progress)
    refuse_overlap(f"The backbone {backbone.name}", seen_by(backbone).overlap(prepared.cases("test"), prepared.records))
    return prepared


def keep_run(prepared: PreparedData, experiment: Experiment, out: Path) -> None:
    """The last part of `open_run`: write what the run is."""
    write_experiment(out / "experiment.yaml", experiment)  # first: it says what the split belongs to
    write_split(out / "split.csv", prepared.dataset, prepared.whole_split)


def as_trained(experiment: Experiment, adapter: Path, *, backbone: str | None = None) -> Experiment:
    """An experiment with the backbone, tuner and preprocessing of an adapter, to evaluate it on the experiment's data.

    Args:
        experiment: Its data, seed and hardware stay.
        adapter: A fine-tuned adapter folder; it is loaded once, so that what is wrong with it is said first.
        backbone: Where the backbone lies now, if it moved.

    Raises:
        WeightsError: The adapter cannot be loaded, or has no head.
    """
    loaded = load_adapter(adapter, backbone=backbone)
    card = loaded.card
    task_card = require_head(adapter, card.task)
    preprocessing = card.preprocessing
    if isinstance(preprocessing, Preprocessing):
        prepared: dict[str, Any] = preprocessing.model_dump(include={"image_size", "channels", "fit"})
    else:
        prepared = {"volume": as_options(preprocessing)}
    data = experiment.data.model_copy(update=prepared)
    return experiment.model_copy(
        update={
            "data": data,
            "backbone": loaded.backbone.options,
            "tuner": TUNERS.get(card.tuner["name"]).Options.model_validate(card.tuner),
            "task": TASKS.get(task_card.options["name"]).Options.model_validate(task_card.options),
            "tpp": experiment.tpp.model_copy(update={"enabled": card.tpp is not None}),
        }
    )


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
    summary = {"adapter": adapter.relative_to(out).as_posix(), "stages": stages, "test": metrics}
    write_json(out / "summary.json", summary)
    write_report(out)
    return RunResult(out, adapter, prepared, evaluation, stages)


def tpp_stage(prepared: Prepared, folder: Path, tell: Tell) -> Path:
    """Target Parameter Pre-training as a step. Gives its adapter folder.

    With `tpp.choose`, the stage is done with each task in a folder beside, and the best one copied.
    """
    experiment, cases = prepared.experiment, prepared.tpp
    if experiment.tpp.choose:
        return _best_stage(prepared, folder, tell)
    monitor = plan_monitor(experiment, prepared.data(prepared.cases("train"))) if experiment.tpp.monitor else None
    fingerprints = prepared.fingerprints(cases)
    inputs = TPPInputs(experiment, prepared.preprocessing, prepared.data(cases), fingerprints, monitor)
    sections = ("tpp", "pretext", "task") if experiment.tpp.decoder else ("tpp", "pretext")
    key = _key(prepared, *sections) | {"images": content(prepared, cases)}
    if monitor is not None:
        key |= {"monitored cases": content(prepared, monitor.data.cases)}
    if not step(folder, key, lambda: run_tpp(inputs, folder)):
        tell("TPP was done before.")
    return folder / "adapter"


def _best_stage(prepared: Prepared, folder: Path, tell: Tell) -> Path:
    """A pretext stage for each task of `tpp.choose`; that of the monitor's best score is copied to `folder`."""
    experiment = prepared.experiment
    alone = experiment.tpp.model_copy(update={"choose": []})
    stages: dict[str, Path] = {}
    for pretext in candidates(experiment.pretext, experiment.tpp):
        stages[pretext.name] = folder.with_name(f"{folder.name}-{pretext.name}")
        one = experiment.model_copy(update={"pretext": pretext, "tpp": alone})
        tell(f"TPP with {pretext.name}:")
        tpp_stage(arrange(prepared, one), stages[pretext.name], tell)
    scores = {name: read_json(stage / MARKER)["best"]["score"] for name, stage in stages.items()}
    best = max(scores, key=lambda name: scores[name])  # of equal ones the first
    key = {"scores": scores, "weights": weights_digest(stages[best] / "adapter")}
    step(folder, key, lambda: _copy_stage(stages[best], folder, scores))
    return folder / "adapter"


def _copy_stage(stage: Path, folder: Path, scores: dict[str, float]) -> None:
    """Copy a stage, and tell in its adapter among which tasks labels chose it."""
    adapter = load_adapter(stage / "adapter")
    tpp = adapter.card.tpp
    if tpp is None or tpp.monitor is None:
        raise TypeError("the stage had no monitor")
    monitor = tpp.monitor.model_copy(update={"candidates": scores})
    card = adapter.card.model_copy(update={"tpp": tpp.model_copy(update={"monitor": monitor})})
    for name in ("log.csv", "preview.png"):
        if (stage / name).is_file():
            shutil.copy(stage / name, folder / name)
    save_adapter(folder / "adapter", adapter.backbone, card)
    write_json(folder / MARKER, {**read_json(stage / MARKER), "candidates": scores})


def finetune_stage(prepared: Prepared, folder: Path, tell: Tell, *, start: Path | None = None) -> Path:
    """Fine-tuning as a step, from a TPP adapter or the tuner's own start. Gives its adapter folder.

    Raises:
        LeakageError: The adapter to start from saw test cases, and was not made transductively on purpose.
        ConfigError: It belongs to another backbone than the experiment's.
    """
    train, val, test = (prepared.cases(name) for name in ("train", "val", "test"))
    trained_on = prepared.fingerprints([*train, *val])
    card = None
    if start is not None:
        card = read_card(start)
        if card.backbone.sha256 != prepared.backbone_sha256:
            raise ConfigError(
                f"The adapter {start} belongs to the backbone {card.backbone.options.name}, and the experiment names "
                f"{prepared.experiment.backbone.name} with other weights. "
                f"Use --set backbone.name={card.backbone.options.name}."
            )
        seen = card.trained_on
        if card.tpp is not None and not card.tpp.transductive:
            seen |= card.tpp.fingerprints
        refuse_overlap(f"The adapter {start}", seen.overlap(test, prepared.records))
        if card.tpp is not None and not card.tpp.transductive:
            # Validation cases choose weights and thresholds: TPP may not have seen them either.
            refuse_overlap(f"TPP of {start}", card.tpp.fingerprints.overlap(val, prepared.records), "validation")
        trained_on |= card.trained_on
    inputs = FinetuneInputs(
        experiment=prepared.experiment,
        preprocessing=prepared.preprocessing,
        train=prepared.data(train),
        val=prepared.data(val),
        classes=prepared.dataset.classes,
        multilabel=prepared.dataset.multilabel,
        structures=prepared.dataset.structures,
        fingerprints=trained_on,
        start=start,
    )
    key = _key(prepared, "finetune", "task") | {
        "start": None if start is None else weights_digest(start),
        "start card": None if card is None else card.model_dump(mode="json", exclude={"versions"}),
        "classes": prepared.dataset.classes,
        "structures": [[structure.name, structure.values] for structure in prepared.dataset.structures],
        "training cases": content(prepared, train),
        "validation cases": content(prepared, val),
    }
    if not step(folder, key, lambda: run_finetune(inputs, folder)):
        tell("Fine-tuning was done before.")
    return folder / "adapter"


def evaluate_stage(
    prepared: Prepared,
    adapter: Path,
    folder: Path,
    *,
    backbone: str | None = None,
    mistakes: bool = True,
    resamples: int = 2000,
) -> Evaluation | SegmentationEvaluation:
    """Predict the test cases in float32 and write predictions.csv or segmentation.csv, and evaluation.json.

    Args:
        prepared: The data.
        adapter: A fine-tuned adapter folder.
        folder: Of the results.
        backbone: Where the backbone lies now, if it moved.
        mistakes: Write the most confident mistakes, or the worst masks, with their images, too.
        resamples: Of the bootstrap.

    Raises:
        LeakageError: The adapter or its backbone was trained on test cases.
        WeightsError: The adapter cannot be loaded, or has no head.
        DataError: The data set has other classes, or was prepared otherwise than the adapter's images.
    """
    test = prepared.cases("test")
    loaded = load_adapter(adapter, backbone=backbone)
    card = loaded.card
    require_head(adapter, card.task)
    require_fit(prepared, adapter, card)
    refuse_overlap(f"The adapter {adapter}", card.trained_on.overlap(test, prepared.records))
    refuse_overlap(
        f"The backbone of {adapter}",
        seen_by(loaded.backbone.options or card.backbone.options).overlap(test, prepared.records),
    )
    notes = []
    if not card.trained_on.images:
        notes.append(
            "The adapter keeps no fingerprints of its training cases: nothing shows that no test case is among them."
        )
    if card.tpp is not None:
        overlap = card.tpp.fingerprints.overlap(test, prepared.records)
        if not card.tpp.transductive:
            refuse_overlap(f"TPP of {adapter}", overlap)
        elif overlap:
            notes.append(f"Transductive: TPP saw {len(overlap)} of the test images, without their labels.")
    seed = Seeds(prepared.experiment.seed).number("bootstrap")
    if prepared.dataset.structures:
        return segmented(prepared, loaded, folder, seed=seed, resamples=resamples, notes=notes, pictures=mistakes)
    return classified(prepared, loaded, folder, seed=seed, resamples=resamples, notes=notes, pictures=mistakes)


def weights_digest(adapter: Path) -> str:
    """One hash of an adapter folder's parameters."""
    return digest(*(file.read_bytes() for file in sorted(adapter.glob("*.safetensors"))))


def _key(prepared: Prepared, *sections: str) -> dict[str, Any]:
    """What a stage's result depends on, of the experiment. The machine is not part of it."""
    values = prepared.experiment.model_dump(mode="json")
    shared = ("seed", "backbone", "tuner", *sections)
    data = {name: values["data"][name] for name in ("modality", "augment", "multilabel")}
    return {name: values[name] for name in shared} | {
        "backbone weights": prepared.backbone_sha256,
        "data": data,
        "preprocessing": prepared.preprocessing.model_dump(mode="json"),
    }


def content(prepared: PreparedData, cases: Iterable[Case]) -> str:
    """One hash of what some cases are: names, labels, pixels, masks."""
    store = prepared.store

    def what(case: Case) -> str:
        text = f"{case.id}|{case.labels}|{prepared.records[case.id].fingerprint}"
        # A store's name of a case is a digest of its files, the mask among them.
        return text if isinstance(store, ImageCache) else f"{text}|{store.names[store.row[case.id]]}"

    return digest(*map(what, cases))

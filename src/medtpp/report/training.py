"""How a model was trained: what the reports on runs of all tasks show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from medtpp.files import MARKER
from medtpp.report.curves import smooth
from medtpp.report.page import plural, whole
from medtpp.report.read import Experiment, Picture, read_experiment, read_model, read_picture, read_table
from medtpp.report.schema import AdapterFile, StageFile
from medtpp.report.words import rows_of_preview

SPLITS = {"train": "training", "val": "validation", "test": "test"}
_LOG = ("step", "loss", "lr_tuner", "validation", "monitor")


@dataclass(frozen=True, eq=False)
class Training:
    """The files of a run, but for those of its evaluation.

    Attributes:
        experiment: As resolved.
        split: Columns case, split, label, patient.
        adapter: What is known of the fine-tuned adapter.
        finetune, tpp: What the stages told; the latter None where there was none.
        finetune_log, tpp_log: Losses and rates over the steps.
        preview: What the pretext task restored.
    """

    experiment: Experiment
    split: pd.DataFrame
    adapter: AdapterFile
    finetune: StageFile
    finetune_log: pd.DataFrame
    tpp: StageFile | None
    tpp_log: pd.DataFrame | None
    preview: Picture | None

    @property
    def stages(self) -> list[tuple[str, StageFile]]:
        """Title and report of each stage."""
        return [(name, stage) for name, stage in (("TPP", self.tpp), ("fine-tuning", self.finetune)) if stage]

    @property
    def preview_rows(self) -> str:
        """What the rows of the preview are, below the images."""
        return rows_of_preview(self.tpp.views if self.tpp else [])

    @property
    def volumetric(self) -> bool:
        """Whether the network sees volumes."""
        return len(self.adapter.preprocessing.patch or ()) == 3

    @property
    def best_step(self) -> int | None:
        """The step whose weights were kept, where validation cases chose it."""
        return self.finetune.best.step if self.finetune.best else None


def read_training(folder: Path) -> Training:
    """Read the files of a run's stages. Raises DataError where one is missing or broken."""
    finetune, tpp = folder / "finetune", folder / "tpp"
    has_tpp = (tpp / MARKER).is_file()
    preview = tpp / "preview.png"
    return Training(
        experiment=read_experiment(folder / "experiment.yaml", ("data", "backbone", "tuner", "pretext")),
        split=read_table(folder / "split.csv", ("case", "split", "label", "patient")),
        adapter=read_model(finetune / "adapter" / "medtpp.json", AdapterFile),
        finetune=read_model(finetune / MARKER, StageFile),
        finetune_log=read_table(finetune / "log.csv", ("step", "loss"), _LOG),
        tpp=read_model(tpp / MARKER, StageFile) if has_tpp else None,
        tpp_log=read_table(tpp / "log.csv", ("step", "loss", "lr_tuner"), _LOG) if has_tpp else None,
        preview=read_picture(preview) if has_tpp and preview.is_file() else None,
    )


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


def setup_of(run: Training) -> Setup:
    """What was run, in a reader's words."""
    values, card = run.experiment.values, run.adapter
    tuner, pretext = _section(values, "tuner"), (card.tpp and card.tpp.pretext) or _section(values, "pretext")
    rows = [
        ("backbone", f"{_section(values, 'backbone').get('name')} ({card.backbone.architecture})"),
        ("images", _images(card)),
        ("tuner", _method(tuner)),
        *([("task", _method(card.task.options))] if card.task and card.task.options else []),
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
        if key != "name" and value != []
    ]
    return f"{options.get('name')}" + (f" ({'; '.join(parts)})" if parts else "")


def _images(card: AdapterFile) -> str:
    """What the network sees at once, and how scans were made alike."""
    made = card.preprocessing
    shape = made.patch or (made.image_size or card.backbone.sides[0],) * 2
    size = f"{' × '.join(map(str, shape))} {'pixels' if len(shape) == 2 else 'voxels'}"
    if made.size is not None and made.size != made.patch:
        size += f" of {' × '.join(map(str, made.size))}"
    if made.spacing is None:
        return size
    spacing = " × ".join(f"{step:.3g}" for step in made.spacing)
    return f"{size}, spacing {spacing}{' mm' if len(shape) == 3 else ''}"


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
        classes: Whose cases are counted.
        rows: Title, cases, patients (None where unknown) and counts by class, for each split.
        statements: Who is apart from whom, and what TPP saw.
        cautions: What makes the numbers less sure.
    """

    classes: list[str]
    rows: list[tuple[str, int, int | None, list[int]]]
    statements: list[str]
    cautions: list[str]


def split_of(
    run: Training, classes: Sequence[str] = (), *, multilabel: bool = False, validation_cases: int | None = None
) -> Split:
    """How the cases were divided; `validation_cases` says how many were used, where not all were."""
    table = run.split
    known = table[table.patient != ""]
    rows = []
    for name, title in SPLITS.items():
        part = table[table.split == name]
        has = [set(label.split(";")) if multilabel else {label} for label in part.label]
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
        among = None if validation_cases is None else plural(validation_cases, "validation case")
        statements.append(
            f"Of the training and validation cases, {used} labelled ones were drawn and used "
            + ("(validation cases among them)." if among is None else f"({among} among them).")
        )
    seen = run.adapter.tpp
    if run.tpp and seen:
        monitor = seen.monitor
        chosen = f"; {plural(monitor.cases, 'labelled training case')} chose the step" if monitor else ""
        statements.append(f"TPP saw {plural(seen.images, 'image')}, without labels{chosen}.")
        if seen.transductive:
            cautions.append(
                "Transductive: TPP saw images of validation and test cases, without their labels. "
                "These numbers do not hold for new images."
            )
    return Split(list(classes), rows, statements, cautions)


def learning_alts(run: Training, chosen_by: str) -> dict[str, str]:
    """What the learning curves show, for who does not see them; `chosen_by` says what is best at the kept step."""
    alts = {
        "finetune": f"Training loss of {run.finetune.steps} steps of fine-tuning, {_fall(run.finetune_log)}."
        + (f" The {chosen_by} at step {run.best_step}." if run.best_step is not None else ""),
    }
    if run.tpp_log is not None:
        below = "the AUC of a probe and the learning rate" if "monitor" in run.tpp_log else "learning rate"
        alts["pretext"] = f"Pretext loss of {len(run.tpp_log)} logged steps, {_fall(run.tpp_log)}; {below} below."
    return alts


def _fall(log: pd.DataFrame) -> str:
    loss = smooth(log.loss)
    return f"from {loss.iloc[0]:.3f} to {loss.iloc[-1]:.3f}"

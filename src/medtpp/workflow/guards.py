"""What makes a run stop before it does anything: another experiment in its folder, an adapter that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medtpp.adapter import AdapterCard, TaskCard
from medtpp.config import Experiment
from medtpp.data.case import Structure
from medtpp.errors import ConfigError, DataError, WeightsError
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.prepare import Prepared

# What a run may be gone on with although it changed: the machine, and where the same images now lie.
_FREE = ("hardware", "logging", "data.path", "data.unlabelled")


def require_head(adapter: Path, card: TaskCard | None) -> TaskCard:
    """The card of an adapter's head. Raises WeightsError where there is none."""
    if card is None:
        raise WeightsError(
            f"The adapter {adapter} was pre-trained (TPP) but not fine-tuned: there is no head to evaluate. "
            f"First: medtpp finetune DATA --adapter {adapter} --out FOLDER."
        )
    return card


def require_fit(prepared: Prepared, adapter: Path, card: AdapterCard) -> None:
    """Raise DataError unless the data are of the adapter's classes and prepared as its training images were."""
    dataset, problems = prepared.dataset, []
    if card.task is not None:
        unknown = sorted(set(dataset.classes).difference(card.task.classes))
        if unknown:
            problems.append(f"classes it does not know: {', '.join(unknown)} (it knows {', '.join(card.task.classes)})")
        if not dataset.structures and dataset.multilabel != card.task.multilabel:
            problems.append(f"data.multilabel is {dataset.multilabel}, and {card.task.multilabel} in the adapter")
        if dataset.structures != card.task.structures:
            problems.append(f"structures {_named(dataset.structures)}, not {_named(card.task.structures)}")
    if prepared.preprocessing != card.preprocessing:
        problems.append(f"images prepared otherwise: {prepared.preprocessing}, not {card.preprocessing}")
    if problems:
        raise DataError(f"The adapter {adapter} does not fit the data set {dataset.root}:", problems)


def refuse_changes(out: Path, prepared: Prepared) -> None:
    """Raise ConfigError that lists what differs from the experiment that the folder holds."""
    kept = out / "experiment.yaml"
    if kept.is_file():
        refuse_other(out, load_experiment(kept), prepared.experiment)


def refuse_other(out: Path, before: Experiment, now: Experiment, *, free: tuple[str, ...] = ()) -> None:
    """Raise ConfigError that lists in which fields an experiment differs from the one that the folder was made with.

    Args:
        out: The folder.
        before: What it was made with.
        now: What it would be gone on with.
        free: Beginnings of the names of further fields that may differ.
    """
    then, fields = _fields(before.model_dump(mode="json")), _fields(now.model_dump(mode="json"))
    differing = [
        f"{name}: {then.get(name)} there, {fields.get(name)} now"
        for name in sorted(then.keys() | fields.keys())
        if then.get(name) != fields.get(name) and not name.startswith((*_FREE, *free))
    ]
    if differing:
        raise ConfigError(
            f"{out} holds a run of another experiment, so it cannot be gone on with. "
            "Use --overwrite, or another --out. What differs:",
            differing,
        )


def _named(structures: Sequence[Structure]) -> str:
    return ", ".join(f"{one.name} ({', '.join(map(str, one.values))})" for one in structures) or "none"


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields

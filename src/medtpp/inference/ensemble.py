"""Several adapters on the weights of one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from medtpp.adapter import Adapter, TaskCard, load_adapter
from medtpp.backbones import Backbone
from medtpp.config import Window
from medtpp.errors import WeightsError
from medtpp.tasks.base import Task

_PREPARED = "preprocessing: "
_ONE_FILE = (
    " Preprocessing is planned from the training cases, and those differ from seed to seed. Train the members from one "
    "experiment file, which holds the plan: medtpp init DATA -o EXPERIMENT.yaml once, then for each seed medtpp run "
    "EXPERIMENT.yaml --set seed=1 --out runs/seed1."
)


def load_ensemble(folders: Sequence[Path], *, backbone: str | None, device: torch.device) -> list[Adapter]:
    """Load fine-tuned adapters whose probabilities can be averaged.

    They may have different tuners. The frozen weights of the backbone are in memory once: see `share_weights`. While
    one is loaded, its own copy is there beside them.

    Args:
        folders: Adapter folders.
        backbone: Where the backbone lies now, if it moved.
        device: Where to compute.

    Raises:
        WeightsError: An adapter cannot be loaded, has no head, or does not go with the first one.
    """
    members: list[Adapter] = []
    for folder in folders:
        member = load_adapter(folder, backbone=backbone)
        head(member)
        if members:
            check_alike([members[0], member], [str(folders[0]), str(folder)])
        member.backbone.to(device)
        if member.task is not None:
            member.task.to(device)
        if members:
            share_weights(members[0].backbone, member.backbone)
        members.append(member)
    return members


def head(adapter: Adapter) -> tuple[Task, TaskCard]:
    """The task of an adapter and its card.

    Raises:
        WeightsError: It has none.
    """
    if adapter.task is None or adapter.card.task is None:
        raise WeightsError("This adapter was pre-trained (TPP) but not fine-tuned, so it predicts nothing yet.")
    return adapter.task, adapter.card.task


def check_alike(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Refuse adapters whose probabilities do not mean the same, voxel by voxel and class by class.

    Args:
        adapters: With heads.
        names: For the message.

    Raises:
        WeightsError: They differ in backbone, preprocessing, task, or in classes or structures; each field that
            differs is listed.
    """
    first = _meaning(adapters[0])
    problems = []
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        other = _meaning(adapter)
        problems += [
            f"{what}: {first.get(what, 'none')} in {names[0]}, {other.get(what, 'none')} in {name}"
            for what in first | other
            if first.get(what) != other.get(what)
        ]
    if problems:
        prepared = any(problem.startswith(_PREPARED) for problem in problems)
        raise WeightsError(
            "These adapters do not predict the same thing, so they cannot be averaged."
            + (_ONE_FILE if prepared else ""),
            problems,
        )


def share_weights(first: Backbone, other: Backbone) -> None:
    """Let a backbone use the frozen weights of another one, where they are the same bits; both are on one device.

    What a tuner trained stays its own. This serves any tuners side by side, and nothing has to be switched when members
    take turns.
    """
    frozen = {_name(name): value.data for name, value in first.encoder.named_parameters() if not value.requires_grad}
    known = {**first.source_state(), **frozen}  # where the first one trained a copy, the original still is there
    for name, parameter in other.encoder.named_parameters():
        shared = known.get(_name(name))
        if shared is None or parameter.requires_grad or shared.shape != parameter.shape:
            continue
        if shared.device == parameter.device and torch.equal(shared, parameter):
            parameter.data = shared


def _name(name: str) -> str:
    """The original name of a parameter that `peft` wrapped."""
    return name.replace(".base_layer.", ".")


def _meaning(adapter: Adapter) -> dict[str, str]:
    """What members of an ensemble have to have in common."""
    card, (_, task_card) = adapter.card, head(adapter)
    spec = adapter.backbone.spec
    return {
        "backbone": f"{card.backbone.architecture} with sha256 {card.backbone.sha256[:16]}…",
        "patch of the backbone": " x ".join(map(str, spec.patch)),
        "image size of the backbone": " x ".join(map(str, spec.image_size)),
        **{f"{_PREPARED}{field}": _text(value) for field, value in card.preprocessing},
        "task": task_card.options["name"],
        "classes or structures": task_card.described,
        "several labels": "yes" if task_card.multilabel else "no",
    }


def _text(value: object) -> str:
    """A value of the preprocessing in all its digits."""
    if isinstance(value, Window):
        return f"{value.kind} {value.low} to {value.high}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "none" if value is None else str(value)

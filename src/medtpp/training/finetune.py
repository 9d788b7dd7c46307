"""Supervised fine-tuning of target parameters and a task head, from the tuner's own start or from a TPP adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medtpp import backbones, tuners
from medtpp.adapter import Adapter, TaskCard, load_adapter, make_task, new_card, read_card, save_adapter
from medtpp.backbones import Backbone
from medtpp.config import TUNERS, Experiment, FinetuneOptions
from medtpp.data.augment import Augmenter
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.errors import ConfigError
from medtpp.evaluation import choose_thresholds, positive_class, write_predictions
from medtpp.files import MARKER, write_json
from medtpp.inference.predict import as_predictions, predict_rows
from medtpp.seeds import Draws, Seeds
from medtpp.tasks.base import Task
from medtpp.training.device import make_fabric
from medtpp.training.loop import Group, fit
from medtpp.training.resume import finish
from medtpp.training.stage import (
    StageData,
    StageResult,
    count_parameters,
    launch,
    number,
    resolve_stage,
    schedule_of,
    to_unit,
)


@dataclass(frozen=True)
class FinetuneInputs:
    """All that the stage needs; it pickles.

    Attributes:
        experiment: With `auto` values of the data answered.
        preprocessing: How the images were made.
        train, val: Labelled cases.
        classes: Names of the classes, in the order of the logits.
        multilabel: Whether a case may have several labels.
        fingerprints: Of training and validation cases.
        start: A TPP adapter folder to start from, or None for the tuner's own start.
    """

    experiment: Experiment
    preprocessing: Preprocessing
    train: StageData
    val: StageData
    classes: tuple[str, ...]
    multilabel: bool
    fingerprints: Fingerprints
    start: Path | None = None


class SupervisedModule(nn.Module):
    """What the loop trains: images (B, C, *spatial) uint8 and targets to the task's loss."""

    def __init__(self, backbone: Backbone, task: Task, augmenter: Augmenter) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.augmenter = augmenter

    def forward(self, images: Tensor, targets: Tensor, visits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; nothing else to log."""
        with torch.autocast(images.device.type, enabled=False):
            images = self.augmenter(to_unit(images), Draws(visits))
        return self.task.loss(self.task(self.backbone.encode(images)), targets), {}


def run_finetune(inputs: FinetuneInputs, folder: Path) -> StageResult:
    """Fine-tune and write `folder/adapter` and `folder/validation.csv`; a resume file found in `folder` is taken up.

    Raises:
        ConfigError: The adapter to start from was made with another tuner.
        WeightsError: It does not fit the backbone.
    """
    experiment = inputs.experiment
    return launch(make_fabric(experiment.hardware, experiment.logging, folder), _train, inputs, folder)


def resolve_finetune(
    options: FinetuneOptions, *, cases: int, learning_rate: float, devices: int = 1
) -> FinetuneOptions:
    """Answer the `auto` values: 30 passes over the cases within 200 to 2,000 steps.

    Args:
        options: As given.
        cases: How many there are to train on.
        learning_rate: The tuner's own.
        devices: The batch size is a multiple of them.
    """
    options = resolve_stage(
        options, passes=30, batch_size=32, cases=cases, limits=(200, 2000), learning_rate=learning_rate, devices=devices
    )
    if options.validate_every != "auto":
        return options
    return options.model_copy(update={"validate_every": max(1, number(options.steps) // 20)})


def _train(fabric: Fabric, inputs: FinetuneInputs, folder: Path) -> StageResult:
    experiment, seeds = inputs.experiment, Seeds(inputs.experiment.seed)
    own_rate = TUNERS.get(experiment.tuner.name).learning_rate
    options = resolve_finetune(
        experiment.finetune, cases=len(inputs.train), learning_rate=own_rate, devices=fabric.world_size
    )
    rate, batch_size = float(options.learning_rate), number(options.batch_size)
    begun = _begin(inputs, seeds)
    tuned = begun.backbone
    task_card = TaskCard(
        options=experiment.task.model_dump(mode="json"), classes=inputs.classes, multilabel=inputs.multilabel
    )
    task = make_task(task_card, tuned, seeds)
    train = replace(inputs.train, targets=task.targets(inputs.train.cases))
    if train.targets is not None:
        task.balance(train.targets)
    module = SupervisedModule(tuned, task, Augmenter(experiment.data.augment, experiment.data.modality))
    groups = [
        Group("head", dict(task.named_parameters()), options.head_learning_rate, options.head_weight_decay),
        *([Group("tuner", tuned.targets, rate, options.weight_decay)] if tuned.targets else []),
    ]
    targets = task.targets(inputs.val.cases)

    def score() -> float:
        logits = predict_rows(
            tuned, task, inputs.val.cache.images, inputs.val.rows, device=fabric.device, autocast=fabric.autocast
        )
        return -float(task.loss(logits.to(fabric.device), targets.to(fabric.device)))

    record = fit(
        fabric,
        module,
        groups,
        train.stream(batch_size, seeds.child("finetune"), fabric),
        schedule_of(options, number(options.validate_every)),
        folder=folder,
        title="fine-tuning",
        after_step=tuned.after_step,
        validate=score if options.keep == "best" else None,
    )
    result = StageResult(number(options.steps), batch_size, rate, record, parameters=count_parameters(tuned, head=task))
    if fabric.global_rank == 0:
        logits = predict_rows(tuned, task, inputs.val.cache.images, inputs.val.rows, device=fabric.device)
        validation = as_predictions(
            inputs.val.cases, "val", task.probabilities(logits), inputs.classes, multilabel=inputs.multilabel
        )
        write_predictions(folder / "validation.csv", validation)
        thresholds = choose_thresholds(validation)
        chosen = {
            "thresholds": thresholds.values,
            "threshold_notes": thresholds.notes,
            "positive": positive_class(validation, experiment.data.positive),
        }
        card = begun.card.model_copy(
            update={"task": task_card.model_copy(update=chosen), "trained_on": inputs.fingerprints}
        )
        save_adapter(folder / "adapter", tuned, card, task)
        finish(folder)
        write_json(folder / MARKER, result.summary())
    return result


def _begin(inputs: FinetuneInputs, seeds: Seeds) -> Adapter:
    """A tuned backbone at its start: from a TPP adapter, or the tuner's own."""
    experiment = inputs.experiment
    wanted = experiment.tuner.model_dump(mode="json")
    if inputs.start is None:
        backbone = backbones.load(experiment.backbone, image_size=inputs.preprocessing.image_size)
        tuned = tuners.attach(backbone, experiment.tuner, seed=seeds)
        return Adapter(new_card(tuned, inputs.preprocessing, experiment.data.modality, experiment.seed), tuned, None)
    adapter = load_adapter(inputs.start, backbone=experiment.backbone)
    was_patch = read_card(inputs.start).backbone.options.patch_size
    made = {
        "backbone.patch_size": (was_patch, experiment.backbone.patch_size),
        "tuner": (adapter.card.tuner, wanted),
        "preprocessing": (adapter.card.preprocessing, inputs.preprocessing),
    }
    differing = [
        f"{name}: {was} in the adapter, {now} in the experiment" for name, (was, now) in made.items() if was != now
    ]
    if differing:
        raise ConfigError(f"The adapter {inputs.start} was made otherwise than this experiment says.", differing)
    return adapter

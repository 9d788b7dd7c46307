"""Supervised fine-tuning of target parameters and a task head, from the tuner's own start or from a TPP adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medtpp import backbones, tuners
from medtpp.adapter import Adapter, TaskCard, load_adapter, make_task, new_card, read_card, save_adapter
from medtpp.backbones import Backbone, Spec
from medtpp.config import TASKS, TUNERS, Experiment, FinetuneOptions
from medtpp.data.augment import Augmenter
from medtpp.data.batches import to_unit
from medtpp.data.case import Structure
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing, overlapping
from medtpp.errors import ConfigError
from medtpp.files import MARKER, write_json
from medtpp.seeds import Draws, Seeds
from medtpp.tasks.base import FittedTask, Task
from medtpp.training.device import make_fabric
from medtpp.training.features import as_they_are, read_features
from medtpp.training.loop import Group, Hooks, Stream, fit
from medtpp.training.resume import finish
from medtpp.training.stage import (
    StageData,
    StageResult,
    augmenter_of,
    count_parameters,
    dense_batch,
    launch,
    number,
    resolve_stage,
    schedule_of,
    tuner_groups,
    with_penalty,
)
from medtpp.training.validation import ClassificationValidation, SegmentationValidation, Validation, plan_scores
from medtpp.tuners.base import check_keys

TOKENS = 6_272  # in a batch of a classification: 32 images of 14 x 14 patches
STARTING = 128  # images that a start is made from, at most
GRADIENTS = 8  # batches that a start is made from


@dataclass(frozen=True)
class FinetuneInputs:
    """All that the stage needs; it pickles.

    Attributes:
        experiment: With `auto` values of the data answered.
        preprocessing: How the images were made.
        train, val: Labelled cases.
        classes: Names of the classes, in the order of the logits; () in segmentation.
        multilabel: Whether a case may have several labels.
        structures: What masks show; () in classification.
        fingerprints: Of training and validation cases.
        start: A TPP adapter folder to start from, or None for the tuner's own start.
    """

    experiment: Experiment
    preprocessing: Preprocessing | VolumePreprocessing
    train: StageData
    val: StageData
    classes: tuple[str, ...]
    multilabel: bool
    fingerprints: Fingerprints
    structures: tuple[Structure, ...] = ()
    start: Path | None = None

    def task_card(self) -> TaskCard:
        """What the head will predict."""
        options = self.experiment.task.model_dump(mode="json")
        if not self.structures:
            return TaskCard(options=options, classes=self.classes, multilabel=self.multilabel)
        return TaskCard(
            options=options,
            classes=tuple(structure.name for structure in self.structures),
            multilabel=overlapping(self.structures),
            mask_values=tuple(structure.values for structure in self.structures),
        )


class SupervisedModule(nn.Module):
    """What the loop trains: images (B, C, *spatial) and targets, or masks (B, *spatial), to the task's loss."""

    def __init__(self, backbone: Backbone, task: Task, augmenter: Augmenter) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.augmenter = augmenter

    def forward(self, images: Tensor, targets: Tensor, visits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; nothing else to log."""
        with torch.autocast(images.device.type, enabled=False):
            if self.task.dense:
                images, masks = self.augmenter(to_unit(images), Draws(visits), targets)
                targets = self.task.from_masks(masks)
            else:
                images = self.augmenter(to_unit(images), Draws(visits))
        loss = self.task.loss(self.task(self.backbone.encode(images, taps=self.task.taps)), targets)
        return with_penalty(loss, self.backbone, self.task), {}


def run_finetune(inputs: FinetuneInputs, folder: Path) -> StageResult:
    """Fine-tune and write `folder/adapter` and `folder/validation.csv`; a resume file found in `folder` is taken up.

    Raises:
        ConfigError: The adapter to start from was made with another tuner.
        WeightsError: It does not fit the backbone.
    """
    experiment = inputs.experiment
    return launch(make_fabric(experiment.hardware, experiment.logging, folder), _train, inputs, folder)


def resolve_finetune(
    options: FinetuneOptions, *, tuner: str, task: str, cases: int, spec: Spec, devices: int = 1
) -> FinetuneOptions:
    """Answer the `auto` values: 30 passes over the cases within 200 to 2,000 steps.

    A new decoder has more to learn: with masks it is 60 passes within 600 to 3,000 steps. A classifier on frozen
    features starts fitted to them; beside a tuner a head learns with it from a random start.

    Args:
        options: As given.
        tuner: Its name, which has a learning rate of its own.
        task: Its name.
        cases: How many there are to train on.
        spec: Of the backbone; large images and volumes make small batches.
        devices: The batch size is a multiple of them.

    Raises:
        ConfigError: The head of the task cannot start fitted, or a given batch size is none.
    """
    method, tuning = TASKS.get(task), TUNERS.get(tuner)
    fits = issubclass(method, FittedTask)
    if options.head_start == "fitted" and not fits:
        raise ConfigError(f"The head of a {task} cannot be fitted. Use finetune.head_start: auto.")
    masks = method.dense
    options = resolve_stage(
        options,
        passes=60 if masks else 30,
        batch_size=dense_batch(spec) if masks else min(32, max(2, TOKENS // spec.effort)),
        cases=cases,
        limits=(600, 3000) if masks else (200, 2000),
        learning_rate=tuning.learning_rate,
        devices=devices,
    )
    answers: dict[str, object] = {}
    if options.head_start == "auto":
        answers["head_start"] = "fitted" if fits and not tuning.has_targets else "random"
    if options.validate_every == "auto":
        answers["validate_every"] = max(1, number(options.steps) // 20)
    return options.model_copy(update=answers)


def _train(fabric: Fabric, inputs: FinetuneInputs, folder: Path) -> StageResult:
    experiment, seeds = inputs.experiment, Seeds(inputs.experiment.seed)
    begun = _begin(inputs, seeds)
    tuned, task_card = begun.backbone, inputs.task_card()
    masks = bool(inputs.structures)
    options = resolve_finetune(
        experiment.finetune,
        tuner=experiment.tuner.name,
        task=experiment.task.name,
        cases=len(inputs.train),
        spec=tuned.spec,
        devices=fabric.world_size,
    )
    rate, batch_size = float(options.learning_rate), number(options.batch_size)
    task = make_task(task_card, tuned, seeds)
    if begun.decoder is not None:
        _take_over(task, begun, inputs)
    train = replace(inputs.train, targets=task.targets(inputs.train.cases), masks=masks)
    if train.targets is not None:
        task.balance(train.targets)
    module = SupervisedModule(tuned, task, augmenter_of(experiment, inputs.preprocessing)).to(fabric.device)
    rates = options.head_learning_rate, options.head_weight_decay
    heads = [Group(name, own, *rates) for name, own in task.groups().items()]
    targets = tuner_groups(tuned, rate, options.weight_decay)
    began = time.perf_counter()
    if options.head_start == "fitted" and isinstance(task, FittedTask) and train.targets is not None:
        images = as_they_are(train, tuned.spec.image_size)
        task.fit(read_features(task.read, tuned, fabric, images), train.targets)
    spent = time.perf_counter() - began
    if inputs.start is None:
        stream = train.stream(batch_size, seeds.child("start"), fabric)
        losses = first_losses(module, stream, fabric.device)
        tuned.start_from(losses, lambda values: cast(Tensor, fabric.all_reduce(values)))
    validation = _validation(inputs, tuned, task, fabric)
    choose, every = options.keep == "best", number(options.validate_every)
    scored: Validation | None = validation
    if not choose:
        plan = plan_scores(inputs.val, steps=number(options.steps), batch_size=batch_size, every=every, masks=masks)
        scored, every = (replace(validation, data=plan.data), plan.every) if plan else (None, 0)
    record = fit(
        fabric,
        module,
        [*heads, *targets],
        train.stream(batch_size, seeds.child("finetune"), fabric),
        schedule_of(options, every),
        folder=folder,
        title="fine-tuning",
        hooks=Hooks(tuned.after_step, tuned.after_step_buffers),
        validate=scored.score if scored else None,
        choose=choose,
        spent=spent,
    )
    result = StageResult(number(options.steps), batch_size, rate, record, parameters=count_parameters(tuned, head=task))
    if fabric.global_rank == 0:
        result.figures.update(validation.figures())
        card = begun.card.model_copy(
            update={
                "task": task_card.model_copy(update=validation.finish(folder)),
                "trained_on": inputs.fingerprints,
            }
        )
        save_adapter(folder / "adapter", tuned, card, task)
        finish(folder)
        write_json(folder / MARKER, result.summary())
    return result


def first_losses(module: nn.Module, stream: Stream, device: torch.device) -> Iterator[Tensor]:
    """Losses of the first batches, each computed when it is asked for."""
    for given in stream.iterate(0, GRADIENTS):
        batch = given.to(device)
        yield module(batch.images, batch.targets, batch.draws.visits)[0]


def _take_over(task: Task, begun: Adapter, inputs: FinetuneInputs) -> None:
    """Start the task's decoder where TPP ended."""
    made = begun.card.tpp.decoder if begun.card.tpp else None
    wanted = inputs.experiment.task.model_dump(mode="json")
    shaping = ("name", "head", "feature_size", "image_skip")
    if made is None or any(made.get(field) != wanted.get(field) for field in shaping):
        raise ConfigError(
            f"The decoder of {inputs.start} was pre-trained for {made}, and the experiment's task is {wanted}. "
            "Pre-train it again for this task."
        )
    decoder = task.get_submodule("decoder")
    state = begun.decoder or {}
    check_keys(state, decoder.state_dict())
    decoder.load_state_dict(state)


def _validation(inputs: FinetuneInputs, backbone: Backbone, task: Task, fabric: Fabric) -> Validation:
    if inputs.structures:
        return SegmentationValidation(backbone, task, fabric, inputs.val)
    return ClassificationValidation(backbone, task, fabric, inputs.val, inputs.experiment.data.positive)


def _begin(inputs: FinetuneInputs, seeds: Seeds) -> Adapter:
    """A tuned backbone at its start: from a TPP adapter, or the tuner's own."""
    experiment = inputs.experiment
    wanted = experiment.tuner.model_dump(mode="json")
    if inputs.start is None:
        backbone = backbones.load(experiment.backbone, image_size=inputs.preprocessing.patch)
        needed = TUNERS.get(experiment.tuner.name)(experiment.tuner).needs_images
        images = inputs.train.images(limit=STARTING) if needed else None
        tuned = tuners.attach(backbone, experiment.tuner, seed=seeds, images=images)
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

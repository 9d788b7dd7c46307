"""The library in a few calls, for people with a training script of their own.

`tpp` takes any model and pre-trains, in place, exactly the parameters that require gradients. `finetune`, `save` and
`predict` complete it for backbones loaded with medtpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from lightning.fabric import Fabric
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medtpp import backbones
from medtpp.adapter import Adapter, TaskCard, TPPCard, new_card, save_adapter
from medtpp.api_checks import check_empty, check_labelled, check_saved, in_python, training
from medtpp.api_data import Images, UserStream, check_range, count, first_images, scaled
from medtpp.api_state import random_state, restored
from medtpp.backbones import Backbone
from medtpp.config import (
    PRETEXTS,
    TASKS,
    TUNERS,
    AugmentOptions,
    AutoPretext,
    FinetuneOptions,
    Modality,
    Options,
    TPPOptions,
)
from medtpp.data.augment import Augmenter
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.errors import ConfigError, DataError
from medtpp.evaluation import Predictions
from medtpp.files import prepare_folder
from medtpp.inference.cases import image_cases, relative_cases
from medtpp.inference.ensemble import check_alike, head, share_weights
from medtpp.inference.predict import predict_files
from medtpp.inference.segment import Segmented, SegmentOptions, segment_files
from medtpp.inference.stored import patches_at_once
from medtpp.seeds import Seeds
from medtpp.tasks.base import FittedTask, Task
from medtpp.training.device import choose_precision, mixed, quiet_fabric
from medtpp.training.features import read_features
from medtpp.training.finetune import SupervisedModule, first_losses, resolve_finetune
from medtpp.training.loop import Group, Hooks, fit
from medtpp.training.stage import PretextModule, number, schedule_of, target_groups, tuner_groups, warm_up_heads
from medtpp.training.tpp import make_pretext, require_batches, require_pair, resolve_pretext, resolve_tpp
from medtpp.tuners import TunedBackbone

Adapters = Adapter | Sequence[Adapter]
Paths = str | Path | Sequence[str | Path]
O = TypeVar("O", bound=Options)  # noqa: E741  (options)


@dataclass(frozen=True)
class TPPRecord:
    """What `tpp` did.

    Attributes:
        trained: Names of the parameters that were pre-trained.
        untouched: Names of parameters that require gradients but that the pretext task cannot reach, such as a
            classification head; they are as they were.
        losses: The pretext loss at the logged steps.
        steps: Optimiser steps.
        seconds: Of training.
        card: For the adapter folder.
    """

    trained: tuple[str, ...]
    untouched: tuple[str, ...]
    losses: tuple[float, ...]
    steps: int
    seconds: float
    card: TPPCard


def tpp(
    model: nn.Module,
    images: Images,
    pretext: str | Mapping[str, Any] = "auto",
    *,
    features: str | None = None,
    seed: int = 0,
    precision: str = "auto",
    **options: Any,
) -> TPPRecord:
    """Pre-train, in place, exactly the parameters of a model that require gradients, by a self-supervised task.

    Modes, `requires_grad`, gradients, buffers and the global random state are afterwards as they were. After an
    exception the parameters are so, too.

    Args:
        model: Any model, such as `peft.get_peft_model(timm_vit, LoraConfig(...))`, or what `medtpp.attach` gave. In one
            that holds a backbone that medtpp knows, this is pre-trained; any other is called with images, and its
            output is taken for features.
        images: A tensor (N, C, H, W) or (N, C, D, H, W), a Dataset or a DataLoader; items and batches may be tuples or
            dicts, of which the first image-like tensor is taken. Floating point, as the model's own forward takes them
            (normalised); in [0, 1] for a model that `medtpp.attach` gave.
        pretext: Name of the pretext task, or its options: {"name": "mae", "mask_ratio": 0.6}. "auto": where tokens can
            be dropped mae, or features for a backbone of DINO's or CLIP's kind; simmim where they can be masked alone,
            restoration where there is a grid of features with steps of at most 16 pixels, byol for all else.
        features: Name of a module, as "encoder.layer4", whose output is taken for features in place of what medtpp
            would find; "" for the output of the whole model.
        seed: Of all draws.
        precision: "auto", "32", "bf16" or "16".
        options: Fields of `TPPOptions`: steps, batch_size, learning_rate, head_warmup, ... A DataLoader brings its own
            batch size; `learning_rate` is 1e-3 unless the tuner says otherwise.

    Raises:
        ConfigError: The model gives no features or is not in float32, nothing can be trained, or the images or options
            do not fit.
        DataError: The images are of another size than the model's.
    """
    chosen = _options(TPPOptions, options)
    if chosen.monitor:
        raise ConfigError("monitor needs labels, and medtpp.tpp has none: it is for `medtpp tpp` and `medtpp run`.")
    wish = {"name": pretext} if isinstance(pretext, str) else {"name": "auto", **pretext}
    seeds = Seeds(seed)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not wanted:
        raise ConfigError("No parameter of the model requires gradients: there are no target parameters to pre-train.")
    device = next(iter(wanted.values())).device
    with training("medtpp.tpp"), restored(model, wanted, seeds):
        number_of_images = count(images)
        first = first_images(images)
        low, high = check_range(images if isinstance(images, Tensor) else first, unit=isinstance(model, Backbone))
        if not isinstance(model, Backbone):
            backbone = backbones.find(model, tuple(first.shape[2:]), channels=first.shape[1], features=features)
            backbone.take_normalised(low, high)
        elif features is None:
            backbone = model
        else:
            raise ConfigError("features names a module in a model of your own; a medtpp backbone has its features.")
        backbones.check_float32(backbone)
        tuner = model.tuner.name if isinstance(model, TunedBackbone) else None
        kind = AutoPretext if wish["name"] == "auto" else PRETEXTS.get(str(wish["name"])).Options
        pretext_options = resolve_pretext(_options(kind, wish), backbone.spec, tuner)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        if isinstance(model, TunedBackbone):
            model.seen_channels = first.shape[1]
        model.eval()
        task, trained_head = make_pretext(pretext_options, backbone, seeds)
        task.begin(backbone)
        module = PretextModule(backbone, task).to(device)
        reached = _reached(module, wanted, scaled(first[:2], low, high).to(device), seeds)
        for name, parameter in wanted.items():
            parameter.requires_grad_(name in reached)
        rate = TUNERS.get(model.tuner.name).learning_rate if isinstance(model, TunedBackbone) else 1e-3
        if isinstance(images, DataLoader) and images.batch_size:
            chosen = chosen.model_copy(update={"batch_size": images.batch_size})
        chosen = resolve_tpp(
            chosen, images=number_of_images, learning_rate=rate, spec=backbone.spec, trained_head=trained_head
        )
        require_batches(task, chosen)
        if isinstance(model, TunedBackbone):
            require_pair(model.tuner.name, task)
        warmup = number(chosen.head_warmup)
        stream = UserStream(images, None, number(chosen.batch_size), seeds, (low, high))
        fabric = _fabric(device, precision)
        relative = model.relative_rates if isinstance(model, TunedBackbone) else {}
        targets = target_groups(
            {name: wanted[name] for name in reached}, relative, float(chosen.learning_rate), chosen.weight_decay
        )
        head = Group("pretext", dict(task.named_parameters()), chosen.head_learning_rate)
        hooks, spent = module.hooks(), 0.0
        if warmup:
            spent = warm_up_heads(fabric, module, [head], targets, stream, warmup, hooks)
        record = fit(
            fabric, module, [*targets, head], stream, schedule_of(chosen), title="TPP", hooks=hooks, spent=spent
        )
    if isinstance(model, TunedBackbone):
        model.seen_seed = seed
    card = TPPCard(
        pretext=pretext_options.model_dump(mode="json"),
        steps=number(chosen.steps),
        head_warmup=warmup,
        batch_size=stream.batch_size,
        learning_rate=float(chosen.learning_rate),
        seed=seed,
        images=number_of_images,
        transductive=False,
        fingerprints=Fingerprints(),
    )
    untouched = tuple(name for name in wanted if name not in reached)
    losses = tuple(row["loss"] for row in record.rows)
    return TPPRecord(reached, untouched, losses, card.steps, record.seconds, card)


def finetune(
    model: TunedBackbone,
    images: Tensor,
    labels: Sequence[str],
    *,
    task: str = "classification",
    modality: Modality = "unknown",
    seed: int = 0,
    precision: str = "auto",
    **options: Any,
) -> Task:
    """Fine-tune a tuned backbone in place with labels; gives the task with its trained head.

    Args:
        model: What `medtpp.attach` gave, after `tpp` or without.
        images: (N, C, S, S) floating point in [0, 1].
        labels: N class names.
        task: Name of the task: one that gives classes of whole images.
        modality: Decides which flips are allowed.
        seed: Of the head, the order and the augmentation.
        precision: "auto", "32", "bf16" or "16".
        options: Fields of `FinetuneOptions`. The weights of the last step are kept: there is no validation set here.

    Raises:
        ConfigError: Images are no tensor or do not fit with the labels, labels are no names, the task is segmentation,
            or the model is not in float32.
    """
    if not isinstance(model, TunedBackbone):
        raise ConfigError(f"medtpp.finetune takes what medtpp.attach gave, not a {type(model).__name__}.")
    method = TASKS.get(task)
    classes = check_labelled(images, labels, method, len(model.spec.image_size))
    backbones.check_float32(model)
    check_range(images, unit=True)
    model.seen_channels = images.shape[1]
    seeds = Seeds(seed)
    chosen = resolve_finetune(
        _options(FinetuneOptions, options), tuner=model.tuner.name, task=task, cases=len(images), spec=model.spec
    )
    device = next(model.parameters()).device
    head: Task = method(method.Options(), model.spec, classes, False, seeds)
    module = SupervisedModule(model, head.to(device), Augmenter(AugmentOptions(), modality))
    targets = torch.tensor([classes.index(label) for label in labels])
    heads = [Group("head", dict(head.named_parameters()), chosen.head_learning_rate, chosen.head_weight_decay)]
    tuned = tuner_groups(model, float(chosen.learning_rate), chosen.weight_decay)
    stream = UserStream(images, targets, number(chosen.batch_size), seeds)
    with training("medtpp.finetune"), random_state(seeds):
        fabric = _fabric(device, precision)
        if isinstance(head, FittedTask) and chosen.head_start == "fitted":
            parts = (part.float() for part in torch.split(images, patches_at_once(model.spec.image_size)))
            head.fit(read_features(head.read, model, fabric, parts), targets)
        model.start_from(first_losses(module, stream, device), lambda values: values)
        fit(
            fabric,
            module,
            [*heads, *tuned],
            stream,
            schedule_of(chosen),
            title="fine-tuning",
            hooks=Hooks(model.after_step, model.after_step_buffers),
        )
    model.seen_seed = seed
    return head.eval()


def save(
    folder: str | Path,
    model: TunedBackbone,
    task: Task | None = None,
    *,
    tpp: TPPRecord | None = None,
    modality: Modality = "unknown",
    channels: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder that `load_adapter`, `predict` and the command line read.

    Args:
        folder: Where to.
        model: Tuned.
        task: With its head, after `finetune`.
        tpp: What `tpp` gave, for the record.
        modality: Of the images.
        channels: Of the images, 1 or 3; by default those of the images that `tpp` or `finetune` saw.
        overwrite: Replace what the folder holds.

    Raises:
        ConfigError: The model does not take square images of two dimensions, or channels are not known, or not 1 or 3.
        OutputError: The folder is not empty, or cannot be written.
        WeightsError: The backbone was wrapped in memory, so nobody else could load it.
    """
    side, channels = check_saved(model, channels)
    preprocessing = Preprocessing.model_validate({"image_size": side, "channels": channels})
    seed = model.start_seed if model.seen_seed is None else model.seen_seed
    card = new_card(model, preprocessing, modality, seed)
    update: dict[str, Any] = {"tpp": tpp.card if tpp else None}
    if task is not None:
        options, classes = task.options.model_dump(mode="json"), task.classes
        thresholds = dict.fromkeys(classes, 0.5)
        update["task"] = TaskCard(options=options, classes=classes, multilabel=task.multilabel, thresholds=thresholds)
    if not overwrite:
        check_empty(Path(folder))
    with in_python():
        prepare_folder(Path(folder), overwrite=overwrite)
    save_adapter(Path(folder), model, card.model_copy(update=update), task)
    return Path(folder)


@overload
def predict(adapter: Adapters, images: Paths, output: None = None) -> Predictions: ...


@overload
def predict(adapter: Adapters, images: Paths, output: str | Path, **options: Any) -> Segmented: ...


def predict(
    adapter: Adapters,
    images: Paths,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Predictions | Segmented:
    """Probabilities of images or scans, or a mask for each; in float32 on the adapter's device.

    Args:
        adapter: With a head. Of several the probabilities are averaged; see `medtpp.inference.ensemble`.
        images: Files, or folders of them.
        output: In segmentation the folder for masks; not in classification.
        resume: Keep the masks that are there.
        overwrite: Replace what an earlier call wrote to `output`.
        options: Fields of `SegmentOptions`: format, probabilities, flips, overlap.

    Raises:
        ConfigError: `output` is missing, or given in classification, or an option is not known.
        DataError: A file cannot be read. The masks of the others are written.
        WeightsError: An adapter has no head, or the adapters differ.
    """
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    paths = [Path(path) for path in ([images] if isinstance(images, str | Path) else images)]
    check_alike(adapters, [f"adapter {number}" for number in range(1, len(adapters) + 1)])
    device = next(adapters[0].backbone.parameters()).device
    for other in adapters[1:]:
        share_weights(adapters[0].backbone, other.backbone)
    cases = image_cases(paths, adapters[0].card.preprocessing, lambda line: warnings.warn(line, stacklevel=4))
    dense = head(adapters[0])[0].dense
    result: Predictions | Segmented | None
    if dense and output is None:
        raise ConfigError("This adapter writes masks. Name a folder: medtpp.predict(adapter, images, output).")
    if not dense and (output is not None or resume or overwrite or options):
        raise ConfigError("This adapter gives a table: medtpp.predict(adapter, images). Other arguments are for masks.")
    if output is None:
        found = predict_files(adapters, cases, device=device)
        unreadable, result = found.unreadable, found.predictions
    else:
        folder, chosen = Path(output), _options(SegmentOptions, options)
        cases = relative_cases(cases, paths, folder)
        with in_python():
            masks = segment_files(adapters, cases, folder, chosen, device=device, resume=resume, overwrite=overwrite)
        unreadable, result = masks.unreadable, masks
    if unreadable or result is None:
        raise DataError("Some images cannot be read.", [f"{name}: {reason}" for name, reason in unreadable.items()])
    return result


def _reached(
    module: PretextModule, wanted: Mapping[str, nn.Parameter], images: Tensor, seeds: Seeds
) -> tuple[str, ...]:
    """Names of the parameters that the pretext loss depends on."""
    cases = torch.arange(len(images), device=images.device)
    loss, _ = module(images, None, seeds.draws(cases * 0, cases).visits)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    reached = tuple(name for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None)
    if not reached:
        raise ConfigError(
            "None of the parameters that require gradients takes part in the pretext task. They may sit outside of "
            f'{module.backbone.spec.name}, which it trains: features="" takes the output of the whole model.',
            list(wanted)[:20],
        )
    return reached


def _options(kind: type[O], values: Mapping[str, Any]) -> O:
    try:
        return kind(**values)
    except ValidationError as error:
        found = {(str((*item["loc"], "options")[0]), item["msg"]) for item in error.errors()}
        problems = [f"{name}: {message[0].lower()}{message[1:]}" for name, message in sorted(found)]
        raise ConfigError(
            f"There are mistakes in the options; known are {', '.join(kind.model_fields)}:", problems
        ) from error


def _fabric(device: torch.device, precision: str) -> Fabric:
    chosen, _ = choose_precision(precision, device.type)
    devices: Any = [device.index or 0] if device.type == "cuda" else 1
    return quiet_fabric(accelerator=device.type, devices=devices, precision=mixed(chosen))

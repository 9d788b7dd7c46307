"""Target Parameter Pre-training (arXiv 2408.15011): a pretext task on the target parameters of a frozen backbone.

The stage in one view: attach the tuner; start the pretext head from the backbone's own where its weights bring one, and
otherwise warm a new one up alone; train target parameters and head together on images without labels; save the targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from torch import Tensor
from torch.nn import functional as F

from medtpp import backbones, tuners
from medtpp.adapter import MonitorCard, TPPCard, new_card, save_adapter
from medtpp.config import PRETEXTS, TUNERS, AutoPretext, Experiment, MethodOptions, TPPOptions
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError
from medtpp.files import MARKER, atomic, write_json
from medtpp.pretext.base import Pretext
from medtpp.seeds import Seeds, name_key
from medtpp.training.dense import DenseReconstruction, make_dense
from medtpp.training.device import make_fabric
from medtpp.training.loop import Group, fit
from medtpp.training.monitor import PATIENCE, Monitor, MonitorPlan
from medtpp.training.resume import RESUME, Record, finish
from medtpp.training.stage import (
    PretextModule,
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
    warm_up_heads,
)

TOKENS = 12_544  # in a batch: 64 images of 14 x 14 patches
# What `natural_pretext` does, in words for lists.
AUTO_PRETEXT = (
    "where backbone and tuner can do without some tokens, features for backbones like DINO or CLIP and mae for all "
    "others; else simmim where patches can be masked; else restoration on fine grids; else byol."
)
COARSE = 16  # pixels per step; of a coarser map, a linear layer that restores the image would outgrow the network


@dataclass(frozen=True)
class TPPInputs:
    """All that the stage needs; it pickles.

    Attributes:
        experiment: With `auto` values of the data answered.
        preprocessing: How the images were made.
        data: The images TPP may see.
        fingerprints: Of those images and their patients.
        monitor: Labelled cases to score by, and when; None: labels have no part in it.
    """

    experiment: Experiment
    preprocessing: Preprocessing | VolumePreprocessing
    data: StageData
    fingerprints: Fingerprints
    monitor: MonitorPlan | None = None


def run_tpp(inputs: TPPInputs, folder: Path) -> StageResult:
    """Pre-train the target parameters and write `folder/adapter`; a resume file found in `folder` is taken up.

    Raises:
        ConfigError: The tuner has no target parameters, or the backbone lacks what the pretext task needs.
    """
    experiment = inputs.experiment
    require_targets(experiment)
    return launch(make_fabric(experiment.hardware, experiment.logging, folder), _train, inputs, folder)


def _train(fabric: Fabric, inputs: TPPInputs, folder: Path) -> StageResult:
    experiment, data = inputs.experiment, inputs.data
    seeds = Seeds(experiment.seed)
    backbone = backbones.load(experiment.backbone, image_size=inputs.preprocessing.patch)
    pretext, trained_head = make_pretext(experiment.pretext, backbone, seeds)
    own_rate = TUNERS.get(experiment.tuner.name).learning_rate
    options = resolve_tpp(
        experiment.tpp,
        images=len(data),
        learning_rate=own_rate,
        spec=backbone.spec,
        trained_head=trained_head,
        devices=fabric.world_size,
    )
    require_batches(pretext, options)
    require_pair(experiment.tuner.name, pretext)
    batch_size, rate = number(options.batch_size), float(options.learning_rate)
    head_warmup = number(options.head_warmup)
    schedule, plan = schedule_of(options), inputs.monitor
    if plan is not None:
        schedule = replace(schedule, validate_every=plan.every, patience=PATIENCE)
    tuned = tuners.attach(backbone, experiment.tuner, seed=seeds)
    dense = make_dense(experiment, backbone.spec, seeds)
    pretext.begin(tuned)
    module = PretextModule(tuned, pretext, augmenter_of(experiment, inputs.preprocessing), dense)
    heads = head_groups(pretext, dense, options.head_learning_rate)
    targets = tuner_groups(tuned, rate, options.weight_decay)

    spent = 0.0
    if head_warmup and not (folder / RESUME).is_file():
        warmup_stream = data.stream(batch_size, seeds.child("head-warmup"), fabric)
        spent = warm_up_heads(fabric, module, heads, targets, warmup_stream, head_warmup, module.hooks())
    stream = data.stream(batch_size, seeds.child("tpp"), fabric)
    monitor = Monitor(tuned, fabric, plan.data) if plan else None
    record = fit(
        fabric,
        module,
        [*targets, *heads],
        stream,
        schedule,
        folder=folder,
        title="TPP",
        hooks=module.hooks(),
        validate=monitor.score if monitor else None,
        score_name="monitor",
        spent=spent,
    )

    images = data.images(limit=32).to(fabric.device)
    figures = {"head_warmup": float(head_warmup), **effect(fabric, tuned, pretext, images, seeds)}
    chosen = _chosen(monitor, record)
    if chosen:
        figures["monitor_without"] = chosen.without
    steps = int(record.rows[-1]["step"])
    result = StageResult(steps, batch_size, rate, record, figures, count_parameters(tuned, pretext=pretext))
    if fabric.global_rank == 0:
        tpp = TPPCard(
            pretext=experiment.pretext.model_dump(mode="json"),
            steps=steps,
            head_warmup=head_warmup,
            batch_size=batch_size,
            learning_rate=rate,
            seed=experiment.seed,
            images=len(data),
            transductive=options.transductive,
            decoder=experiment.task.model_dump(mode="json") if dense else None,
            monitor=chosen,
            fingerprints=inputs.fingerprints,
        )
        views = save_preview(folder / "preview.png", images[:6], pretext, tuned, seeds)
        card = new_card(tuned, inputs.preprocessing, experiment.data.modality, experiment.seed)
        decoder = dense.decoder if dense else None
        save_adapter(folder / "adapter", tuned, card.model_copy(update={"tpp": tpp}), decoder=decoder)
        finish(folder)
        write_json(folder / MARKER, {**result.summary(), "views": views})
    return result


def _chosen(monitor: Monitor | None, record: Record) -> MonitorCard | None:
    """What the monitor chose, for the adapter."""
    if monitor is None or record.best is None:
        return None
    with monitor.backbone.disabled():
        without = monitor.score()
    return MonitorCard(
        cases=len(monitor.data),
        score=record.best[0],
        step=record.best[1],
        scores=sum("monitor" in row for row in record.rows),
        without=without,
    )


def resolve_tpp(
    options: TPPOptions,
    *,
    images: int,
    learning_rate: float,
    spec: backbones.Spec,
    trained_head: bool,
    devices: int = 1,
) -> TPPOptions:
    """Answer the `auto` values: 40 passes over the images within 200 to 2,000 steps.

    With a decoder batches are those of a segmentation.

    Args:
        options: As given.
        images: How many TPP sees.
        learning_rate: The tuner's own.
        spec: Of the backbone; large images and volumes make small batches.
        trained_head: Whether the pretext head came trained with the backbone.
        devices: The batch size is a multiple of them.
    """
    options = resolve_stage(
        options,
        passes=40,
        batch_size=dense_batch(spec) if options.decoder else min(64, max(8, TOKENS // spec.effort)),
        cases=images,
        limits=(200, 2000),
        learning_rate=learning_rate,
        devices=devices,
    )
    if options.head_warmup != "auto":
        return options
    # A new head would move the target parameters at random before it knows its task.
    return options.model_copy(update={"head_warmup": 0 if trained_head else max(200, number(options.steps) // 10)})


def require_targets(experiment: Experiment) -> None:
    """Raise ConfigError if the tuner has nothing that TPP could train, or a start in its place."""
    if not TUNERS.get(experiment.tuner.name).has_targets:
        raise ConfigError(
            f"The tuner {experiment.tuner.name} has no target parameters, so there is nothing to pre-train. "
            "Use --set tpp.enabled=false, or another tuner."
        )
    start = TUNERS.get(experiment.tuner.name)(experiment.tuner).own_start
    if start is not None:
        raise ConfigError(
            f"tuner.start={start} and TPP exclude each other: both are starts. Use --set tpp.enabled=false, or "
            "--set tuner.start=standard."
        )


def refusal(tuner: str, needs: frozenset[str]) -> str | None:
    """Why TPP cannot train a tuner with a pretext task that needs these capabilities; None if it can."""
    method = TUNERS.get(tuner)
    if not method.has_targets:
        return f"{tuner} has no target parameters"
    if method.needs_grid and "drops_tokens" in needs:
        return f"{tuner} needs all patches, and the task drops some"
    return None


def require_pair(tuner: str, pretext: Pretext) -> None:
    """Raise ConfigError if the tuner and the pretext task make no sense together."""
    reason = refusal(tuner, pretext.needs)
    if reason:
        raise ConfigError(
            f"The tuner {tuner} and the pretext task {pretext.name} exclude each other: {reason}. Use another of "
            "either (`medtpp list matrix` shows what goes together), such as --set pretext.name=simmim."
        )


def natural_pretext(spec: backbones.Spec, tuner: str | None = None) -> str:
    """The name of the pretext task that follows a backbone's own objective, and uses most of what it can do.

    A loss on pixels can damage features that were not made from them: those of DINO and of CLIP are predicted instead.

    Args:
        spec: Of the backbone.
        tuner: Name of the tuner, which may need all patches.
    """
    drops = "drops_tokens" in spec.capabilities and not (tuner and TUNERS.get(tuner).needs_grid)
    if drops:
        return "features" if spec.objective in ("features", "language") else "mae"
    if "masks" in spec.capabilities and math.prod(spec.grid) > 1:
        return "simmim"
    return "restoration" if "dense" in spec.capabilities and max(spec.patch) <= COARSE else "byol"


def resolve_pretext(options: MethodOptions, spec: backbones.Spec, tuner: str | None = None) -> MethodOptions:
    """Answer `auto` by `natural_pretext`, with the options that came with it; a named task stays as it is.

    Raises:
        ConfigError: The task that is chosen does not take these options.
    """
    if not isinstance(options, AutoPretext):
        return options
    name = natural_pretext(spec, tuner)
    kind: type[MethodOptions] = PRETEXTS.get(name).Options
    try:
        return kind(name=name, **options.model_extra or {})
    except ValidationError as error:
        known = ", ".join(field for field in kind.model_fields if field != "name") or "none"
        raise ConfigError(
            f"pretext is auto, which for {spec.name} is {name}. Its options are {known}. Change them, or name another "
            "task: --set pretext.name=NAME. What does not fit:",
            [f"pretext.{item['loc'][0]}: {_reason(item)}" for item in error.errors()],
        ) from error


def candidates(pretext: MethodOptions, tpp: TPPOptions) -> list[MethodOptions]:
    """The pretext tasks of a stage: the experiment's own, or those among which its monitor chooses."""
    if not tpp.choose:
        return [pretext]
    return [pretext if name == pretext.name else PRETEXTS.get(name).Options() for name in tpp.choose]


def _reason(error: ErrorDetails) -> str:
    return "there is no such option" if error["type"] == "extra_forbidden" else error["msg"]


def make_pretext(options: MethodOptions, backbone: backbones.Backbone, seeds: Seeds) -> tuple[Pretext, bool]:
    """The pretext task for a backbone, and whether its head came trained with the backbone.

    Raises:
        ConfigError: The backbone lacks what the task needs.
    """
    method: type[Pretext] = PRETEXTS.get(options.name)
    has = backbone.spec.capabilities
    lacking = backbones.describe_lacking(method.needs_of(options), has)
    if lacking:  # before a head is made, which for images without a grid could be of any size
        fitting = [name for name, task in PRETEXTS.items() if name != "sum" and task.needs <= has]
        raise ConfigError(
            f"The pretext task {options.name} does not fit {backbone.spec.name}: it needs {lacking}. Choose of "
            f"{', '.join(fitting)} (see `medtpp list matrix`): --set pretext=NAME, or medtpp.tpp(model, images, NAME). "
            f"{backbone.advice}".rstrip()
        )
    pretext = method(options, backbone.spec, seeds)
    return pretext, pretext.load_head(backbone.pretext_heads)


def require_batches(pretext: Pretext, options: TPPOptions) -> None:
    """Raise ConfigError if the pretext task cannot do with resolved batches."""
    name, size = pretext.name, number(options.batch_size)
    if options.accumulate > 1 and pretext.couples_images:
        raise ConfigError(
            f"tpp.accumulate is {options.accumulate}, but {name} compares the images of a batch with each other, so "
            "that it cannot be computed in parts. Leave it at 1 and lower tpp.batch_size."
        )
    if size < pretext.least_batch:
        raise ConfigError(
            f"{name} needs batches of at least {pretext.least_batch} images; here there are {size}. Raise "
            "tpp.batch_size, or use a task that needs no others in the batch, such as pretext=moco_v3 with its queue."
        )


def head_groups(pretext: Pretext, dense: DenseReconstruction | None, rate: float) -> list[Group]:
    """The pretext head, and where TPP pre-trains it the decoder."""
    heads = {"pretext": dict(pretext.named_parameters())}
    if dense is not None:
        heads["pretext"] |= {f"dense.{name}": parameter for name, parameter in dense.predict.named_parameters()}
        heads["decoder"] = {f"decoder.{name}": parameter for name, parameter in dense.decoder.named_parameters()}
    return [Group(name, parameters, rate) for name, parameters in heads.items()]


def save_preview(path: Path, images: Tensor, pretext: Pretext, backbone: backbones.Backbone, seeds: Seeds) -> list[str]:
    """A picture of what the pretext task does: a column for each image, the image on top of the task's views of it.

    Returns:
        The names of the views, from top to bottom; without one there is no picture.
    """
    from PIL import Image

    cases = torch.arange(len(images), device=images.device)
    views = pretext.preview(backbone, images, seeds.draws(cases * 0, cases))
    if not views:
        return []
    rows = [_flat(view) for view in (images, *views.values())]  # each (B, 3, H, W)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).permute(1, 2, 0)
    with atomic(path) as temporary:
        Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(temporary, format="PNG")
    return list(views)


def _flat(images: Tensor) -> Tensor:
    """(B, 3, H, W) in colour, of volumes the middle slice, of several channels the first."""
    while images.ndim > 4:
        images = images[:, :, images.shape[2] // 2]
    return backbones.match_channels(images if images.shape[1] in (1, 3) else images[:, :1], 3)


@torch.no_grad()
def effect(
    fabric: Fabric, tuned: tuners.TunedBackbone, pretext: Pretext, images: Tensor, seeds: Seeds
) -> dict[str, float]:
    """What TPP changed: the pretext loss with the target parameters on and off, and how far the features drifted.

    Where nothing moved, nothing was tested. The drift is 1 - cosine of the mean patch token, averaged over the images.
    """
    cases = torch.tensor([name_key("effect", index) for index in range(len(images))], device=images.device)
    draws = seeds.draws(torch.zeros_like(cases), cases)
    with fabric.autocast():
        on, _ = pretext.loss(tuned, images, draws)
        tokens_on = tuned.encode(images).pooled("mean").float()
        with tuned.disabled():
            off, _ = pretext.loss(tuned, images, draws)
            tokens_off = tuned.encode(images).pooled("mean").float()
    drift = (1 - F.cosine_similarity(tokens_on, tokens_off)).mean()
    return {"pretext_loss_on": float(on), "pretext_loss_off": float(off), "feature_drift": float(drift)}

"""Pre-training a backbone itself: all parameters, on unlabelled images. The result is a backbone folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric
from pydantic import Field

from medtpp import backbones
from medtpp.backbones.folder import save_backbone
from medtpp.config import (
    PRETEXTS,
    AugmentOptions,
    Auto,
    BackboneOptions,
    HardwareOptions,
    LoggingOptions,
    MethodOptions,
    Modality,
    Rate,
    StageOptions,
)
from medtpp.data.augment import Augmenter
from medtpp.data.fingerprints import Fingerprints
from medtpp.errors import ConfigError
from medtpp.files import MARKER, write_json, write_text
from medtpp.pretext.base import Pretext
from medtpp.pretext.masked import sincos_positions
from medtpp.seeds import Seeds
from medtpp.training.device import make_fabric
from medtpp.training.loop import Group, fit
from medtpp.training.resume import finish
from medtpp.training.stage import PretextModule, StageData, StageResult, launch, number, resolve_stage, schedule_of


class PretrainOptions(StageOptions):
    """Pre-training of a whole backbone."""

    architecture: str = Field("vit_tiny_patch16_224", description="a timm name of a plain vision transformer")
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    learning_rate: Rate | Auto = Field("auto", description="auto: 1.5e-3 x batch / 256, as suits small ViTs")
    half: bool = Field(True, description="store 16-bit weights")


@dataclass(frozen=True)
class PretrainInputs:
    """All that the stage needs; it pickles.

    Attributes:
        options: Of the stage.
        pretext: Of the pretext task.
        data: The images.
        fingerprints: Of the images and patients.
        modality, augment: For the augmentation.
        hardware, logging: Where to compute and what to log.
        description: What the images are, for the model card.
        seed: Root of all draws.
    """

    options: PretrainOptions
    pretext: MethodOptions
    data: StageData
    fingerprints: Fingerprints
    modality: Modality
    augment: AugmentOptions
    hardware: HardwareOptions
    logging: LoggingOptions
    description: str
    seed: int


def resolve_pretrain(options: PretrainOptions, images: int) -> PretrainOptions:
    """Answer the `auto` values."""
    batch = 128 if options.batch_size == "auto" else options.batch_size
    return resolve_stage(
        options, passes=100, batch_size=batch, cases=images, limits=(500, 50_000), learning_rate=1.5e-3 * batch / 256
    )


def run_pretrain(inputs: PretrainInputs, folder: Path) -> StageResult:
    """Train and write a backbone folder; a resume file found there is taken up."""
    return launch(make_fabric(inputs.hardware, inputs.logging, folder), _train, inputs, folder)


def _train(fabric: Fabric, inputs: PretrainInputs, folder: Path) -> StageResult:
    data, seeds = inputs.data, Seeds(inputs.seed)
    options = resolve_pretrain(inputs.options, len(data))
    batch_size, rate = number(options.batch_size), float(options.learning_rate)
    schedule = schedule_of(options)
    name = BackboneOptions(name=options.architecture, weights="random")
    backbone = backbones.load(name, image_size=tuple(data.images(limit=1).shape[2:]))
    if backbone.spec.family != "timm_vit":
        raise ConfigError(f"`architecture` is the timm name of a plain vision transformer; {name.name} is none.")
    _start_positions(backbone)
    backbone.encoder.requires_grad_(True)
    pretext: Pretext = PRETEXTS.get(inputs.pretext.name)(inputs.pretext, backbone.spec, seeds)
    pretext.begin(backbone)
    module = PretextModule(backbone, pretext, Augmenter(inputs.augment, inputs.modality))
    matrices = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    vectors = {name: p for name, p in module.named_parameters() if p.ndim <= 1}
    groups = [Group("matrices", matrices, rate, options.weight_decay), Group("vectors", vectors, rate)]
    stream = data.stream(batch_size, seeds.child("pretrain"), fabric)
    record = fit(fabric, module, groups, stream, schedule, folder=folder, title="pre-training", hooks=module.hooks())
    result = StageResult(schedule.steps, batch_size, rate, record)
    if fabric.global_rank == 0:
        spec = backbone.spec
        card = {
            "architecture": spec.architecture,
            "image_size": spec.image_size[0],
            "channels": spec.channels,
            "mean": spec.mean,
            "std": spec.std,
            "objective": inputs.pretext.name,
            "training": {
                "pretext": inputs.pretext.model_dump(mode="json"),
                "options": options.model_dump(mode="json"),
                "augment": inputs.augment.model_dump(mode="json"),
                "modality": inputs.modality,
                "data": inputs.description,
                "images": len(data),
                "seed": inputs.seed,
                **result.summary(),
            },
        }
        heads = {inputs.pretext.name: pretext.head_state()}
        save_backbone(folder, backbone.encoder.state_dict(), heads, card, inputs.fingerprints, half=options.half)
        write_text(folder / "README.md", _model_card(card, result, len(data), inputs.description))
        finish(folder)
        write_json(folder / MARKER, result.summary())
    return result


def _start_positions(backbone: backbones.Backbone) -> None:
    """Start learned positions at sines and cosines, with which MAE's reference model begins (and stays)."""
    positions = getattr(backbone.encoder, "pos_embed", None)
    if isinstance(positions, torch.nn.Parameter):
        table = sincos_positions(backbone.spec.grid, backbone.spec.width)
        with torch.no_grad():
            positions.zero_()
            positions[0, -len(table) :] = table


def _model_card(card: dict[str, object], result: StageResult, images: int, description: str) -> str:
    return "\n".join(
        [
            f"# {card['architecture']} pre-trained with `{card['objective']}`",
            "",
            f"Pre-trained by medtpp on {images} images without labels ({description}), {card['image_size']} pixels, "
            f"{result.steps} steps of {result.batch_size}, learning rate {result.learning_rate:.2g}.",
            f"Last loss {result.record.rows[-1]['loss']:.4f}; the whole curve is in `log.csv`.",
            "",
            "Use it wherever a backbone is named:",
            "",
            "    medtpp run DATA --out runs/x --set backbone.name=THIS_FOLDER",
            "",
            "`fingerprints.json` holds hashes of the images and patients it saw: a test on any of them is refused.",
            "",
        ]
    )

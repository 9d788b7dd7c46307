"""The experiment: strict, typed, assembled from the registries; all mistakes of a file are reported at once.

Each method owns its options (a subclass of `MethodOptions` with a literal `name`); `experiment_schema()` joins them to
one pydantic model, so that a new method's options are checked and documented without an edit here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from medtpp.registry import Registry

BACKBONES: Registry[Any] = Registry("backbone", "medtpp.backbones")
TUNERS: Registry[Any] = Registry("tuner", "medtpp.tuners")
PRETEXTS: Registry[Any] = Registry("pretext", "medtpp.pretext")
TASKS: Registry[Any] = Registry("task", "medtpp.tasks")
SOURCES: Registry[Any] = Registry("source", "medtpp.data.sources")

Modality = Literal["unknown", "xray", "ct", "mri", "ultrasound", "pathology", "microscopy", "retina", "photo"]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class Options(BaseModel):
    """Options of anything: unknown names and wrong types are errors, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class MethodOptions(Options):
    """Options of a tuner, pretext task or task; a subclass gives `name` a literal type."""

    name: str


class ColumnOptions(Options):
    """Names of a manifest's columns."""

    image: str = Field("image", description="path of the image, relative to the manifest")
    label: str = Field("label", description="name of the class; empty: unlabelled")
    patient: str = Field("patient", description="a pseudonym; images of a patient stay in one split")
    site: str = Field("site", description="hospital or scanner")
    split: str = Field("split", description="train, val or test")


class AugmentOptions(Options):
    """Whole-batch augmentation. `auto` values follow the modality."""

    crop_min: float = Field(0.5, gt=0, le=1, description="smallest share of the area that a random crop keeps")
    flip_horizontal: bool | Auto = Field("auto", description="left-right flips; auto: not for X-ray, CT, MRI, unknown")
    flip_vertical: bool | Auto = Field("auto", description="upside-down flips; auto: microscopy and pathology alone")
    intensity: float = Field(0.15, ge=0, le=1, description="strength of brightness, contrast and gamma changes")


class DataOptions(Options):
    """Where the cases are, how they are split, and how images become tensors."""

    path: Path = Field(description="folder of class folders, or a CSV manifest (or the folder that holds manifest.csv)")
    layout: str = Field("auto", description="name of a data layout, or auto")
    columns: ColumnOptions = ColumnOptions()
    multilabel: bool = Field(False, description="a case may have several labels, separated by label_separator")
    label_separator: str = Field(";", description="between the labels of a case")
    positive: str | None = Field(
        None, description="of two classes, the one that sensitivity is about; by default guessed from the names"
    )
    exclude: list[str] = Field([], description="case ids or patterns (*.png) to leave out")
    unlabelled: list[Path] = Field([], description="folders of further images without labels, for TPP")
    modality: Modality = Field("unknown", description="decides which flips are allowed")
    image_size: Count | Auto = Field(
        "auto", description="side in pixels of what the backbone sees; auto: the backbone's own"
    )
    channels: Literal["auto", 1, 3] = Field(
        "auto", description="1 grey, 3 colour; auto: colour if one of 64 images has it"
    )
    fit: Literal["stretch", "pad"] = Field("stretch", description="how an image is made square")
    val_fraction: float = Field(0.15, gt=0, lt=1, description="share of the training cases held out for validation")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of all cases held out, where no test split is given"
    )
    labels: Count | Literal["all"] = Field(
        "all", description="how many labelled cases to use in all, validation included; draws are nested"
    )
    augment: AugmentOptions = AugmentOptions()


class BackboneOptions(Options):
    """Which backbone, and its weights."""

    name: str = Field(
        "medtpp_vit_tiny", description="a backbone name (`medtpp list backbones`) or a folder made by `medtpp pretrain`"
    )
    weights: str = Field("pretrained", description="pretrained, random, or a local .safetensors / .pth file")
    revision: str | None = Field(None, description="revision of a hub repository")
    patch_size: Count | None = Field(None, description="resample the patch embedding to this patch size")


class StageOptions(Options):
    """What training stages have in common. Budgets are optimiser steps."""

    steps: Count | Auto = Field("auto", description="optimiser steps")
    batch_size: Count | Auto = Field("auto", description="images per step, over all devices")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    learning_rate: Rate | Auto = Field("auto", description="auto: the tuner's own")
    weight_decay: float = Field(0.0, ge=0, description="of the target parameters, as in AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps for linear warm-up; cosine decay follows")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 for no clipping")
    checkpoint_every: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps between resume checkpoints; 0 for none"
    )


class TPPOptions(StageOptions):
    """The pretext stage on the target parameters."""

    enabled: bool = Field(True, description="false: fine-tune from the tuner's own start")
    head_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the pretext head")
    head_warmup: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps in which a new pretext head trains alone; auto: max(200, 10%)"
    )
    transductive: bool = Field(False, description="let TPP see validation and test images (flagged in the adapter)")


class FinetuneOptions(StageOptions):
    """The supervised stage."""

    head_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the task head")
    head_weight_decay: float = Field(0.01, ge=0, description="weight decay of the task head")
    keep: Literal["best", "last"] = Field("best", description="which weights: best on validation, or of the last step")
    validate_every: Count | Auto = Field("auto", description="steps between validations")


class HardwareOptions(Options):
    """Where and how precisely to compute."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    devices: int = Field(1, ge=1, description="processes, one per device")
    precision: Literal["auto", "32", "bf16", "16"] = Field(
        "auto", description="of training: float32, or mixed with bfloat16 or float16"
    )
    threads: Count | Auto = Field("auto", description="CPU threads")


class LoggingOptions(Options):
    """Logs beside the CSV file that every stage writes."""

    tensorboard: bool = Field(True, description="event files in the stage's folder")
    mlflow: bool = Field(False, description="to MLFLOW_TRACKING_URI, or to mlflow.db in the stage's folder")
    wandb: bool = Field(False, description="to the project medtpp of Weights & Biases")


class Experiment(Options):
    """A whole experiment. Get the complete class, with every method's options, from `experiment_schema()`."""

    seed: int = Field(0, ge=0)
    data: DataOptions
    backbone: BackboneOptions = BackboneOptions()
    tuner: MethodOptions
    pretext: MethodOptions
    task: MethodOptions
    tpp: TPPOptions = TPPOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    hardware: HardwareOptions = HardwareOptions()
    logging: LoggingOptions = LoggingOptions()

    def __reduce__(self) -> tuple[Any, ...]:
        # The complete class is made at run time, so it cannot be pickled by name for another process.
        return _rebuild, (self.model_dump(mode="json"),)


def _rebuild(values: dict[str, Any]) -> Experiment:
    return experiment_schema().model_validate(values)


def _methods(registry: Registry[Any], default: str) -> tuple[Any, Any]:
    options = tuple(entry.Options for _, entry in registry.items())
    chosen = registry.get(default).Options
    kind: Any = Union[options] if len(options) > 1 else options[0]  # noqa: UP007  (built at run time)
    field = Field(default_factory=chosen, discriminator="name") if len(options) > 1 else Field(default_factory=chosen)
    return kind, field


@functools.cache
def experiment_schema() -> type[Experiment]:
    """The experiment model with the options of every registered method."""
    model: type[Experiment] = create_model(
        "Experiment",
        __base__=Experiment,
        tuner=_methods(TUNERS, "lora"),
        pretext=_methods(PRETEXTS, "mae"),
        task=_methods(TASKS, "classification"),
    )
    return model

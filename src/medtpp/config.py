"""The experiment: strict, typed, assembled from the registries; all mistakes of a file are reported at once.

Each method owns its options (a subclass of `MethodOptions` with a literal `name`); `experiment_schema()` joins them to
one pydantic model, so that a new method's options are checked and documented without an edit here.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from medtpp.registry import Registry

BACKBONES: Registry[Any] = Registry("backbone", "medtpp.backbones")
TUNERS: Registry[Any] = Registry("tuner", "medtpp.tuners")
PRETEXTS: Registry[Any] = Registry("pretext", "medtpp.pretext")
TASKS: Registry[Any] = Registry("task", "medtpp.tasks")
SOURCES: Registry[Any] = Registry("source", "medtpp.data.sources")
RECIPES: Registry[Any] = Registry("recipe", "medtpp.data.recipes")

Modality = Literal["unknown", "xray", "ct", "mri", "ultrasound", "pathology", "microscopy", "retina", "photo"]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
# {kidney: 1, tumour: 2}, {1: kidney, 2: tumour}, or regions of several values: {whole kidney: [1, 2], tumour: 2}
MaskValues = dict[Annotated[str, Field(coerce_numbers_to_str=True)], StrictInt | StrictStr | list[StrictInt]]


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
    mask: str = Field("mask", description="path of the segmentation, relative to the manifest; empty: none")
    patient: str = Field("patient", description="a pseudonym; images of a patient stay in one split")
    site: str = Field("site", description="hospital or scanner")
    split: str = Field("split", description="train, val or test")


class AugmentOptions(Options):
    """Whole-batch augmentation; each effect meets a case with its own probability.

    `auto` flips follow the modality, other `auto` values the task (in brackets: for classification; for segmentation).
    Scans that are classified on a grid in millimetres keep their size: no crops, but rotations as for segmentation.
    """

    crop_min: Share | Auto = Field("auto", description="smallest share of the area that a random crop keeps (0.5; 1)")
    flip_horizontal: bool | Auto = Field("auto", description="left-right flips; auto: not for X-ray, CT, MRI, unknown")
    flip_vertical: bool | Auto = Field("auto", description="upside-down flips; auto: microscopy and pathology alone")
    rotation: Annotated[float, Field(ge=0, le=180)] | Auto = Field(
        "auto", description="largest rotation in degrees, in 3D about each axis (0; 30)"
    )
    scaling: Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto", description="0.4: between 1/1.4 and 1.4 times the size (0; 0.4)"
    )
    shear: Annotated[float, Field(ge=0, le=0.5)] | Auto = Field("auto", description="largest shear, a slope (0; 0.05)")
    affine_probability: Probability = Field(0.2, description="of rotation, of scaling and of shear")
    elastic: Annotated[float, Field(ge=0, le=0.4)] | Auto = Field(
        "auto", description="largest move of control points, as a share of their distance, a quarter image (0; 0.3)"
    )
    elastic_probability: Probability = Field(0.2, description="of elastic deformation")
    blur: Annotated[float, Field(ge=0, le=10)] | Auto = Field(
        "auto", description="largest standard deviation of Gaussian blur in pixels; the smallest is half of it (0; 1)"
    )
    blur_probability: Probability = Field(0.15, description="of blur")
    low_resolution: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="largest loss of resolution; 0.5: down to half the pixels along each axis (0; 0.5)"
    )
    low_resolution_probability: Probability = Field(0.15, description="of low resolution")
    noise: Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto", description="largest standard deviation of Gaussian noise, as a share of the range (0; 0.07)"
    )
    noise_probability: Probability = Field(0.1, description="of noise")
    intensity: Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto", description="strength of brightness, contrast and gamma changes (0.15; 0.25)"
    )
    intensity_probability: Probability | Auto = Field(
        "auto", description="of brightness, of contrast and of gamma changes (1; 0.2)"
    )


class Window(Options):
    """Which intensities of a channel become 0 and 1; what lies outside is cut off.

    `low` and `high` are values (fixed), or for each scan anew percentiles of its content, or standard deviations from
    the mean of its content (zscore: -3 and 3, say).
    """

    kind: Literal["fixed", "percentiles", "zscore"] = Field(
        description="what low and high are: values, percentiles of each scan's content, or standard deviations from "
        "its mean"
    )
    low: float = Field(description="becomes 0")
    high: float = Field(description="becomes 1")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.kind == "percentiles" and not 0 <= self.low < self.high <= 100:
            raise ValueError("percentiles lie between 0 and 100")
        return self


class VolumeOptions(Options):
    """How volumes, and images with masks, are prepared. `auto` is planned from the training cases; axes (D, H, W)."""

    patch: tuple[Count, ...] | Auto = Field(
        "auto", description="voxels that the network sees at once, a multiple of the backbone's patch"
    )
    spacing: tuple[Rate, ...] | Literal["auto", "none"] = Field(
        "auto", description="in mm, that every scan is resampled to; none: as it is"
    )
    size: tuple[Count, ...] | Literal["auto", "none"] = Field(
        "auto", description="voxels of every scan, in place of spacing; auto: of 2D images without a known spacing"
    )
    windows: tuple[Window, ...] | Auto = Field(
        "auto", description="intensities that become 0 and 1, by channel; kind: fixed, percentiles or zscore"
    )
    air: float | Auto | None = Field("auto", description="content is brighter than this; null: than the darkest voxel")
    crop: bool | Auto = Field("auto", description="keep the box of the content alone")
    center_crop: tuple[Rate, ...] | None = Field(
        None, description="keep the middle alone, so many mm along each axis: of scans cut around what they show"
    )


class DataOptions(Options):
    """Where the cases are, how they are split, and how images become tensors."""

    path: Path = Field(
        description="folder of class folders, a CSV manifest (or the folder that holds manifest.csv), or "
        "medmnist:pneumoniamnist@224, which is downloaded"
    )
    layout: str = Field("auto", description="name of a data layout, or auto")
    columns: ColumnOptions = ColumnOptions()
    multilabel: bool = Field(False, description="a case may have several labels, separated by label_separator")
    label_separator: str = Field(";", description="between the labels of a case")
    positive: str | None = Field(
        None, description="of two classes, the one that sensitivity is about; by default guessed from the names"
    )
    structures: MaskValues = Field(
        {}, description="names of the values in masks: {kidney: 1, tumour: 2}; a list of values makes a region"
    )
    exclude: list[str] = Field([], description="case ids or patterns (*.png) to leave out")
    unlabelled: list[Path] = Field([], description="folders of further images without labels, for TPP")
    modality: Modality = Field("unknown", description="decides which flips are allowed")
    image_size: Count | Auto = Field(
        "auto",
        description="side in pixels of what the backbone sees in 2D; auto: the backbone's own, with masks the images' "
        "up to 256",
    )
    channels: Literal["auto", 1, 3] = Field(
        "auto", description="1 grey, 3 colour; auto: colour if one of 64 images has it"
    )
    fit: Literal["stretch", "pad"] = Field("stretch", description="how an image is made square")
    volume: VolumeOptions = VolumeOptions()
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
    dims: Literal[2, 3] | Auto = Field(
        "auto", description="3: encode volumes, with the patch embedding inflated along depth; auto: as the data"
    )
    patch_size: Count | tuple[Count, ...] | None = Field(
        None, description="resample the patch embedding to this patch size; for volumes [4, 8, 8] (depth first)"
    )

    channels: Count | None = Field(
        None, description="of volumes: input channels, such as MRI sequences; by default as the data's"
    )

    @model_validator(mode="after")
    def _one_side_for_each_axis(self) -> Self:
        if isinstance(self.patch_size, tuple) and self.dims != "auto" and len(self.patch_size) != self.dims:
            raise ValueError(f"patch_size has {len(self.patch_size)} numbers; dims is {self.dims}")
        return self


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
    decoder: bool = Field(
        False, description="pre-train the decoder of a segmentation, too, by restoring hidden parts of images"
    )
    monitor: bool = Field(
        False,
        description="score features by a probe on training labels now and then, and keep the step of the best score "
        "(classification; not in comparisons)",
    )
    choose: list[str] = Field(
        [], description="pretext tasks to try, each for all steps; the one with the best score of the monitor is kept"
    )
    transductive: bool = Field(False, description="let TPP see validation and test images (flagged in the adapter)")

    @field_validator("choose")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in PRETEXTS.names()]
        if unknown:
            raise ValueError(f"there is no pretext task {unknown[0]!r}; known: {', '.join(PRETEXTS.names())}")
        if names and len(set(names)) != max(2, len(names)):
            raise ValueError("name two tasks or more, each once; for one of them use pretext.name")
        return names

    @model_validator(mode="after")
    def _scores_to_choose_by(self) -> Self:
        if self.choose and not self.monitor:
            raise ValueError("choose needs monitor: true, whose scores decide")
        return self


class FinetuneOptions(StageOptions):
    """The supervised stage."""

    head_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the task head")
    head_weight_decay: float = Field(0.01, ge=0, description="weight decay of the task head")
    head_start: Literal["fitted", "random"] | Auto = Field(
        "auto",
        description="fitted: the head of a classification starts as the logistic regression, with an L2 penalty that "
        "stays, of the labels on the features as they are (arXiv 2202.10054); auto: fitted on a frozen backbone, "
        "random beside a tuner and with masks",
    )
    keep: Literal["best", "last"] = Field("best", description="which weights: best on validation, or of the last step")
    validate_every: Count | Auto = Field(
        "auto", description="steps between validations; at least, with keep: last, where they are logged alone if cheap"
    )


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


class AutoPretext(MethodOptions):
    """The pretext task that suits the backbone. Options of pretext tasks are kept for the one that is chosen.

    Raises:
        ValueError: No pretext task has such an option, or none takes its value.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["auto"] = Field("auto", description="auto: what the backbone was pre-trained for decides")

    @model_validator(mode="after")
    def _some_task_takes_each(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            owners = {task: entry.Options for task, entry in PRETEXTS.items() if name in entry.Options.model_fields}
            if not owners:
                known = sorted({field for _, entry in PRETEXTS.items() for field in entry.Options.model_fields})
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"no pretext task has an option {name}; {hint}")
            found = [_mistake_in(options, {name: value}) for options in owners.values()]
            if all(found):
                raise ValueError(f"{name} of {', '.join(owners)}: {found[0]}")
        return self


def _mistake_in(options: type[MethodOptions], values: dict[str, Any]) -> str | None:
    try:
        options.model_validate(values)
    except ValidationError as error:
        message: str = error.errors()[0]["msg"]
        return message[0].lower() + message[1:]
    return None


class AutoTask(MethodOptions):
    """The task that the data set is made for."""

    name: Literal["auto"] = Field(
        "auto", description="auto: segmentation where there are masks, classification where there are labels"
    )


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


def _methods(registry: Registry[Any], default: str | type[MethodOptions]) -> tuple[Any, Any]:
    options = tuple(entry.Options for _, entry in registry.items())
    if isinstance(default, str):
        chosen = registry.get(default).Options
    else:
        chosen, options = default, (*options, default)
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
        pretext=_methods(PRETEXTS, AutoPretext),
        task=_methods(TASKS, AutoTask),
    )
    return model

"""The files of a run and of a comparison, as far as a report reads them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medtpp.evaluation.paired import Verdict
from medtpp.evaluation.segmentation_table import METRICS, Unit


class FileModel(BaseModel):
    """A JSON file or a part of one; what a report does not show is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class MetricFile(FileModel):
    """A metric with its interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class BootstrapFile(FileModel):
    """How intervals were made."""

    resamples: int
    level: float
    unit: Literal["patient", "case"]


class EvaluatedFile(FileModel):
    """evaluation/evaluation.json of any task."""

    task: Literal["classification", "segmentation"] = "classification"


class EvaluationFile(FileModel):
    """evaluation/evaluation.json of a classification."""

    n_cases: int
    n_patients: int
    multilabel: bool
    classes: dict[str, int]
    positive: str | None
    thresholds: dict[str, float]
    metrics: dict[str, MetricFile]
    per_class: dict[str, dict[str, float | None]]
    confusion: list[Any]
    bootstrap: BootstrapFile
    notes: list[str]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names, count = set(self.classes), len(self.classes)
        if not names == set(self.thresholds) == set(self.per_class) or len(self.confusion) != count:
            raise ValueError("classes, thresholds, per_class and confusion are of different classes")
        if self.positive is not None and self.positive not in names:
            raise ValueError(f"the positive class {self.positive!r} is none of the classes")
        if not {"auc", "ece"} <= set(self.metrics):
            raise ValueError("metrics lacks auc or ece")
        return self


class StructureFile(FileModel):
    """How one structure came out."""

    n: int
    absent: int
    missed: int
    invented: int
    metrics: dict[str, MetricFile]


class SegmentationFile(FileModel):
    """evaluation/evaluation.json of a segmentation."""

    n_cases: int
    n_patients: int
    unit: Unit
    tolerance: float
    metrics: dict[str, MetricFile]
    structures: dict[str, StructureFile]
    bootstrap: BootstrapFile
    notes: list[str]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for where in (self.metrics, *(structure.metrics for structure in self.structures.values())):
            lacking = set(METRICS) - set(where)
            if lacking:
                raise ValueError(f"metrics lack {', '.join(sorted(lacking))}")
        return self


class BestFile(FileModel):
    """The step whose weights were kept."""

    score: float
    step: int


class StageFile(FileModel):
    """complete.json of a stage. Runs of older versions lack the fields that may be None."""

    steps: int
    batch_size: int
    learning_rate: float
    seconds: float
    images_per_second: float
    waiting: float
    best: BestFile | None = None
    head_warmup: float = 0
    pretext_loss_on: float | None = None
    pretext_loss_off: float | None = None
    feature_drift: float | None = None
    target_parameters: int | None = None
    backbone_parameters: int | None = None
    head_parameters: int | None = None
    peak_memory_mib: float | None = None
    views: list[str] = []  # rows of TPP's preview below the images; [] of older versions


class BackboneFile(FileModel):
    """Which backbone an adapter belongs to."""

    architecture: str
    image_size: int | tuple[int, ...]

    @property
    def sides(self) -> tuple[int, ...]:
        """Of what the network sees; one for all where they are equal."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)


class PreprocessingFile(FileModel):
    """How images were prepared: photographs have an image size, scans and images with masks a patch."""

    image_size: int | None = None
    patch: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None


class TaskFile(FileModel):
    """What the head predicts."""

    options: dict[str, Any] = {}


class MonitorFile(FileModel):
    """What a probe on training labels chose in the pretext stage."""

    cases: int
    score: float
    step: int
    scores: int
    without: float
    candidates: dict[str, float] = {}


class TPPFile(FileModel):
    """What the pretext stage did."""

    images: int
    transductive: bool
    pretext: dict[str, Any] = {}
    monitor: MonitorFile | None = None


class AdapterFile(FileModel):
    """medtpp.json of the fine-tuned adapter."""

    backbone: BackboneFile
    versions: dict[str, str]
    preprocessing: PreprocessingFile = PreprocessingFile()
    tpp: TPPFile | None = None
    task: TaskFile | None = None


class MistakeFile(FileModel):
    """An entry of evaluation/mistakes/mistakes.json."""

    case: str
    label: str
    predicted: str
    probability: float
    image: str


class PictureFile(FileModel):
    """One picture of an overlay."""

    plane: str
    image: str


class StructureOverlayFile(FileModel):
    """How one structure of a shown case came out."""

    name: str
    dice: float | None
    hd95: float | None


class OverlayFile(FileModel):
    """An entry of evaluation/overlays/overlays.json."""

    kind: Literal["best", "median", "worst"]
    case: str
    dice: float | None
    hd95: float | None
    structures: list[StructureOverlayFile]
    pictures: list[PictureFile]


class ArmFile(FileModel):
    """An arm of a comparison."""

    name: str
    tuner: str
    init: str
    pretext: str = ""  # where it is not the experiment's own
    description: str


class MeanFile(FileModel):
    """An arm at a number of labels, averaged over seeds; None where all its cells failed."""

    arm: str
    labels: str
    seeds: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    tpp_seconds: float | None = None
    peak_memory_mib: float | None = None
    target_parameters: int | None = None


class DifferenceFile(FileModel):
    """An arm minus its baseline at a number of labels, paired."""

    arm: str
    baseline: str
    labels: str
    seeds: int
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    verdict: Verdict
    sentence: str
    by_seed: dict[str, float | None]
    question: str = ""  # that the baseline answers, where it is a control for TPP

    @property
    def gaps(self) -> list[float]:
        """The differences of the seeds in which the metric exists."""
        return [gap for gap in self.by_seed.values() if gap is not None]


class ComparedTPPFile(FileModel):
    """A TPP stage of a comparison: TPP itself, or a control on other images."""

    tuner: str
    init: str = "tpp"
    pretext: str = ""
    labels: str | None = None
    seed: int
    pretext_loss_on: float
    pretext_loss_off: float
    feature_drift: float
    seconds: float
    log: str | None = None
    preview: str | None = None
    views: list[str] = []  # rows of the preview below the images; [] of older versions

    @property
    def title(self) -> str:
        """The tuner, with the pretext task where it is not the experiment's own.

        Of a control, the arm, with its labels where it is another for each number of them.
        """
        labels = "" if self.labels is None else f", {self.labels} labels"
        parts = [self.tuner, *([] if self.init == "tpp" else [self.init]), *([self.pretext] if self.pretext else [])]
        return " ".join(parts) + labels


class FailedFile(FileModel):
    """A cell that did not end well."""

    cell: str
    reason: str


class ComparisonFile(FileModel):
    """comparison.json, which `medtpp compare` writes; docs/compare.md says what the numbers mean."""

    schema_version: Literal[1] = Field(alias="schema")
    data: str
    metric: str
    metric_title: str
    metric_unit: Literal["", "mm", "px"] = ""
    higher_is_better: bool
    margin: float
    level: float
    n_cases: int
    n_patients: int
    unit: Literal["patient", "case"]
    resamples: int
    seeds: list[int]
    labels: list[str]
    label_counts: dict[str, int]
    arms: list[ArmFile]
    means: list[MeanFile]
    differences: list[DifferenceFile]
    tpp: list[ComparedTPPFile] = []
    failed: list[FailedFile] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        arms = {arm.name for arm in self.arms}
        named = {mean.arm for mean in self.means} | {
            name for one in self.differences for name in (one.arm, one.baseline)
        }
        labels = {*self.labels, *(one.labels for one in self.means), *(one.labels for one in self.differences)}
        unknown = sorted((named - arms) | (labels - set(self.label_counts)))
        if unknown:
            raise ValueError(
                f"means or differences are of arms or label counts that are not listed: {', '.join(unknown)}"
            )
        return self

    @property
    def masks(self) -> bool:
        """Whether the task is a segmentation."""
        return self.metric in METRICS

    @property
    def title_with_unit(self) -> str:
        """The metric with its unit, for tables and axes."""
        return f"{self.metric_title} ({self.metric_unit})" if self.metric_unit else self.metric_title

    @property
    def digits(self) -> int:
        """How many digits of the metric are worth showing: those of a hundredth of a mm, or a tenth of a point."""
        return 2 if self.metric_unit else 3


class StudyPartFile(FileModel):
    """A comparison of a study; "" where the study has no such axis. The folder is relative to the study's."""

    dataset: str
    backbone: str = ""
    fold: str = ""
    site: str = ""
    folder: str


class StudyFailedFile(FileModel):
    """A cell of a study that failed, or a whole comparison, which has no cell."""

    part: str
    cell: str = ""
    reason: str


class StudyFile(FileModel):
    """study.json, which `medtpp compare` writes of several comparisons."""

    schema_version: Literal[1] = Field(alias="schema")
    levels: list[str]
    axes: dict[str, dict[str, Any]]
    parts: list[StudyPartFile]
    failed: list[StudyFailedFile] = []

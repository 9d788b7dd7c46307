"""across.json: what the comparisons of a study say together. Gains are oriented: above zero TPP is better."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medtpp.evaluation.paired import Verdict
from medtpp.report.schema import ArmFile, FileModel, MetricFile

Unit = Literal["points", "mm", "px", "log_loss"]
Beyond = Literal["", "below", "above"]
Scope = Literal["like these", "these"]


class PartFile(FileModel):
    """A comparison of the study.

    Attributes:
        dataset, backbone, fold, site: What it is; "" where that axis is not there.
        folder: From the study's folder, with slashes; "" where there is no way from there.
        status: "partial" where cells failed or are missing.
        cells, done: How many there are, and how many are done.
        reason: Why it is left out.
        failed: Cells that failed, with the reason.
    """

    dataset: str
    backbone: str
    fold: str
    site: str
    folder: str
    status: Literal["done", "partial", "missing", "broken"]
    cells: int = 0
    done: int = 0
    reason: str = ""
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """In a reader's words."""
        named = (("", self.dataset), ("", self.backbone), ("fold ", self.fold), ("without site ", self.site))
        return ", ".join(f"{what}{name}" for what, name in named if name)


class SetFile(FileModel):
    """A data set, over all its comparisons.

    Attributes:
        name: Of the data set.
        metric, metric_title, unit: What is compared.
        higher_is_better: Whether gains have the sign of the metric's differences.
        margin: Of equivalence, in the metric's own unit.
        counts: Level of labels to how many labels; several where comparisons differ.
        cases, patients: Of the test, over the parts that do not share it.
        parts: How many comparisons were read.
        seeds: Of each comparison, at most.
    """

    name: str
    metric: str
    metric_title: str
    unit: Unit
    higher_is_better: bool
    margin: float
    counts: dict[str, list[int]]
    cases: int
    patients: int
    parts: int
    seeds: int


class ScoreFile(MetricFile):
    """An arm's mean score on a data set at a level of labels, in the metric's own unit."""

    dataset: str
    level: str
    labels: float
    arm: str
    seeds: int


class GainFile(MetricFile):
    """What TPP gains over a baseline on one data set, in the metric's own unit.

    Attributes:
        kind: Of baseline: "standard", "longer", another start, a control, or a reference.
        p, p_holm: Adjusted over arms, levels and data sets of the kind.
        half_width: Of the interval.
        detectable: The true difference that would be seen in four of five repetitions.
    """

    dataset: str
    level: str
    arm: str
    baseline: str
    kind: str
    unit: Unit
    parts: int
    seeds: int
    p: float | None
    p_holm: float | None
    verdict: Verdict
    half_width: float | None
    detectable: float | None


class PooledFile(FileModel):
    """What TPP gains over a baseline on average over data sets of one unit.

    Attributes:
        these: Interval with the data sets held fixed.
        like_these: With the data sets as a sample of others; None below 3.
        p, p_holm: Of the scope; adjusted over arms and levels of the kind.
        wilcoxon, wilcoxon_holm: Over the data sets; None below 6.
        helps, hurts, equivalent: On how many sets, "better" and "worse" included; the verdicts of `GainFile`.
        scope: What the verdict is about: other data sets, or these alone where they are fewer than 6.
        margin: The smallest of the sets'.
        left_out: Data sets on which there is no such difference.
    """

    level: str
    arm: str
    baseline: str
    kind: str
    unit: Unit
    sets: int
    these: MetricFile
    like_these: MetricFile | None
    p: float | None
    p_holm: float | None
    wilcoxon: float | None
    wilcoxon_holm: float | None
    helps: int
    hurts: int
    equivalent: int
    scope: Scope
    margin: float
    verdict: Verdict
    sentence: str
    left_out: list[str]


class RankFile(FileModel):
    """Mean ranks of arms over data sets at a level of labels; `reason` says why there are none.

    Attributes:
        arms, ranks: Best first; 1 is best.
        groups: Indices of arms that are not told apart.
        left_out: Arms and data sets that are not among them, since others lack them.
    """

    level: str
    sets: int
    arms: tuple[str, ...] = ()
    ranks: tuple[float, ...] = ()
    p: float | None = None
    critical: float | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    reason: str = ""
    sentence: str = ""


class EqualFile(FileModel):
    """TPP with some labels equals the baseline with others.

    Attributes:
        labels: That TPP had.
        value, low, high: That the baseline needs; the nearest number it had where `..._beyond` is not "".
    """

    dataset: str
    arm: str
    baseline: str
    level: str
    labels: float
    value: float
    value_beyond: Beyond
    low: float | None
    low_beyond: Beyond
    high: float | None
    high_beyond: Beyond
    sentence: str


class ReachFile(FileModel):
    """When fine-tuning after TPP reaches what fine-tuning without it ends with; medians over the seeds.

    None is "not reached", of an end of an interval, too, where `interval` is true.

    Attributes:
        measure: "validation" or "training loss".
        seeds: Pairs of trainings with the same seed.
        reached: How many of them get there.
        total: Steps of fine-tuning.
        steps, share: From TPP until there.
        own_share: The baseline's own first step there, by the same rule.
        costed: Whether times were recorded.
        cost: Time of TPP and of fine-tuning until there, as a share of the baseline's whole fine-tuning.
    """

    dataset: str
    level: str
    arm: str
    baseline: str
    measure: Literal["validation", "training loss"]
    seeds: int
    reached: int
    total: float
    steps: float | None
    share: float | None
    interval: bool
    share_low: float | None
    share_high: float | None
    own_share: float | None
    costed: bool
    cost: float | None
    cost_low: float | None
    cost_high: float | None


class LevelFile(FileModel):
    """A level of labels: a number that all sets have, a rank where they differ, or all."""

    name: str
    title: str


class AcrossFile(FileModel):
    """across.json, which a study's summary writes; docs/study-summary.md says what the numbers mean."""

    schema_version: Literal[1] = Field(alias="schema")
    level: float
    parts: list[PartFile]
    sets: list[SetFile]
    levels: list[LevelFile]
    arms: list[ArmFile]
    scores: list[ScoreFile]
    gains: list[GainFile]
    pooled: list[PooledFile]
    ranks: list[RankFile]
    equal: list[EqualFile]
    reach: list[ReachFile]
    answer: str
    notes: list[str]

"""Sentences made from the numbers of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from medtpp.evaluation.paired import FEWEST_SEEDS, Difference, Verdict
from medtpp.workflow.compare.plan import Arm

BASELINES = {
    "standard": "no TPP",
    "longer": "fine-tuning for as long",
    "pissa": "a start by PiSSA",
    "olora": "a start by OLoRA",
    "eva": "a start by EVA",
    "lora_ga": "a start by LoRA-GA",
    "linear": "frozen features",
    "full": "full fine-tuning",
    "scratch": "training from scratch",
    "tpp_labelled": "TPP on the labelled images alone",
    "tpp_foreign": "TPP on foreign images",
    "random_direction": "a step as large in a random direction",
}
# What a control is there to answer.
QUESTIONS = {
    "tpp_labelled": "What do the labelled images alone give?",
    "tpp_foreign": "Is it these images, or any images?",
    "random_direction": "Is it the direction, or the size of the step?",
}


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        metric: Its name.
        title: Its name for readers.
        unit: "mm" or "px" of distances; "" for others.
        margin: Of equivalence, in the metric's own unit.
    """

    metric: str
    title: str
    unit: str
    margin: float

    @property
    def in_points(self) -> bool:
        """Whether it lies between 0 and 1, so that differences are told in points of a hundred."""
        return self.metric not in ("log_loss", "hd95")

    @property
    def noun(self) -> str:
        """What follows a number: " points", " mm", nothing."""
        return " points" if self.in_points else f" {self.unit}".rstrip()

    @property
    def room(self) -> str:
        """The margin in words."""
        text = f"{100 * self.margin if self.in_points else self.margin:g}{self.noun}"
        return text.removesuffix("s") if text == "1 points" else text

    def signed(self, number: float) -> str:
        """A difference with its sign."""
        if self.in_points:
            return f"{100 * number:+.1f}"
        return f"{number:+.2f}" if self.unit else f"{number:+.3f}"


def sentence(arm: Arm, baseline: Arm, labels: str, gap: Difference, verdict: Verdict, measure: Measure) -> str:
    """What a paired difference says, for a person who reads nothing else.

    Args:
        arm: With TPP.
        baseline: What it is compared to.
        labels: How many labels, or "all".
        gap: TPP minus baseline.
        verdict: Of `judge`.
        measure: What is compared.
    """
    tuner, ours = arm.tuner, f"TPP by {arm.pretext}" if arm.pretext else "TPP"
    if beside := arm.is_method_beside(baseline):
        ours = f"{tuner} with {ours}"
    where = f"{tuner}, {'all labels' if labels == 'all' else f'{labels} labels'}"
    against = BASELINES[baseline.tuner if baseline.is_reference and baseline.tuner != tuner else baseline.init]
    estimate, seeds, title, unit = gap.estimate, len(gap.by_seed), measure.title, measure.noun
    if verdict == "undefined" or estimate.value is None or estimate.low is None or estimate.high is None:
        return f"{where}: the difference between {ours} and {against} is undefined."
    value, low, high = map(measure.signed, (estimate.value, estimate.low, estimate.high))
    interval = f"[{low}, {high}], {seeds} seeds"
    if verdict in ("helps", "hurts", "better", "worse"):
        small = f", by less than the margin of {measure.room}" if abs(estimate.value) < measure.margin else ""
        size = f"{title} is {value.lstrip('+-')}{unit} {'higher' if estimate.value > 0 else 'lower'}"
        if beside:
            return f"{where}: {ours} is {verdict} than {against}{small}: {size} ({interval})."
        return f"{where}: {ours} {verdict}{small}: {size} than with {against} ({interval})."
    if verdict == "equivalent":
        return f"{where}: {ours} and {against} are equivalent within {measure.room} of {title} ({value} {interval})."
    if verdict == "too few seeds":
        few = f"{seeds} seeds are" if seeds > 1 else "one seed is"
        return f"{where}: {few} too few to tell {ours} from {against} ({value}{unit}); take {FEWEST_SEEDS} or more."
    return (
        f"{where}: no difference seen between {ours} and {against}: {value}{unit} of {title} ({interval}). "
        f"That is not equivalence, for which the interval would have to lie within {measure.room}."
    )

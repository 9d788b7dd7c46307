"""Sentences made from the numbers of a comparison."""

from __future__ import annotations

from medtpp.evaluation.paired import FEWEST_SEEDS, Difference, Verdict
from medtpp.workflow.compare.plan import Arm

_BASELINES = {
    "standard": "no TPP",
    "longer": "fine-tuning for as long",
    "linear": "a head on frozen features",
    "full": "full fine-tuning",
}


def sentence(
    tuner: str,
    baseline: Arm,
    labels: str,
    gap: Difference,
    verdict: Verdict,
    metric: str,
    title: str,
    margin: float,
) -> str:
    """What a paired difference says, for a person who reads nothing else.

    Args:
        tuner: Of the arm with TPP.
        baseline: What it is compared to.
        labels: How many labels, or "all".
        gap: TPP minus baseline.
        verdict: Of `judge`.
        metric: Its name.
        title: Its name for readers.
        margin: Of equivalence.
    """
    where = f"{tuner}, {'all labels' if labels == 'all' else f'{labels} labels'}"
    against = _BASELINES[baseline.tuner if baseline.is_reference and baseline.tuner != tuner else baseline.init]
    estimate, seeds = gap.estimate, len(gap.by_seed)
    if verdict == "undefined" or estimate.value is None or estimate.low is None or estimate.high is None:
        return f"{where}: the difference between TPP and {against} is undefined."
    points = metric != "log_loss"  # the others lie between 0 and 1
    value, low, high = (_signed(number, points) for number in (estimate.value, estimate.low, estimate.high))
    unit, room = (" points", f"{100 * margin:g} points") if points else ("", f"{margin:g}")
    interval = f"[{low}, {high}], {seeds} seeds"
    if verdict in ("helps", "hurts"):
        small = f", by less than the margin of {room}" if abs(estimate.value) < margin else ""
        direction = "higher" if estimate.value > 0 else "lower"
        return (
            f"{where}: TPP {verdict}{small}: {title} is {value.lstrip('+-')}{unit} {direction} than with {against} "
            f"({interval})."
        )
    if verdict == "equivalent":
        return f"{where}: TPP and {against} are equivalent within {room} of {title} ({value} {interval})."
    if verdict == "too few seeds":
        few = f"{seeds} seeds are" if seeds > 1 else "one seed is"
        return f"{where}: {few} too few to tell TPP from {against} ({value}{unit}); take {FEWEST_SEEDS} or more."
    return (
        f"{where}: no difference seen between TPP and {against}: {value}{unit} of {title} ({interval}). "
        f"That is not equivalence, for which the interval would have to lie within {room}."
    )


def _signed(number: float, points: bool) -> str:
    return f"{100 * number:+.1f}" if points else f"{number:+.3f}"

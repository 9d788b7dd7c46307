"""Sentences made from the numbers of a comparison."""

from __future__ import annotations

from medtpp.evaluation.paired import FEWEST_SEEDS, Difference, Verdict
from medtpp.workflow.compare.plan import Arm

_BASELINES = {
    "standard": "the same without TPP",
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
        return f"{where}: the difference to {against} is undefined."
    unit, scale = ("", 1.0) if metric == "log_loss" else (" points", 100.0)  # the others lie between 0 and 1
    low, high = (f"{value * scale:+.1f}" if scale > 1 else f"{value:+.3f}" for value in (estimate.low, estimate.high))
    value = abs(estimate.value) * scale
    amount = f"{value:.1f}" if scale > 1 else f"{value:.3f}"
    signed = ("+" if estimate.value >= 0 else "-") + amount
    room = f"{margin * scale:g}{unit}"
    interval = f"[{low}, {high}], {seeds} seeds"
    if verdict == "helps":
        return f"{where}: TPP helps, by {amount}{unit} of {title} over {against} ({interval})."
    if verdict == "hurts":
        return f"{where}: TPP hurts, by {amount}{unit} of {title} under {against} ({interval})."
    if verdict == "equivalent":
        return f"{where}: TPP and {against} are equivalent within {room} of {title} ({signed} {interval})."
    if verdict == "too few seeds":
        few = f"{seeds} seeds are" if seeds > 1 else "one seed is"
        return f"{where}: {few} too few to tell TPP from {against} ({signed}{unit}); take {FEWEST_SEEDS} or more."
    return (
        f"{where}: no difference seen between TPP and {against}: {signed}{unit} of {title} ({interval}). "
        f"That is not equivalence, for which the interval would have to lie within {room}."
    )

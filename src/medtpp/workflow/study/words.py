"""Sentences made from the numbers of a study: differences over data sets, ranks, labels that TPP saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medtpp.evaluation.across import FEWEST_JUDGED, Pooled
from medtpp.evaluation.paired import FEWEST_SEEDS, Verdict
from medtpp.report.schema_study import Beyond, LevelFile, PooledFile, RankFile, Scope, SetFile, Unit
from medtpp.workflow.compare.plan import REFERENCES
from medtpp.workflow.compare.words import BASELINES, Measure

_RANKS = ("lowest", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_SEVERAL = {
    "helps": "TPP helped in {}",
    "hurts": "TPP did harm in {}",
    "equivalent": "TPP made no difference that matters in {}",
    "no difference seen": "no difference was seen in {}, which is not the same as none",
    "too few seeds": "there were too few seeds to say in {}",
    "undefined": "the difference is undefined in {}",
}


@dataclass(frozen=True)
class Pair:
    """TPP and what it is compared with.

    Attributes:
        arm, baseline: Names of arms.
        kind: Of baseline: its start, or the reference that it is.
        tuner: Of the arm.
    """

    arm: str
    baseline: str
    kind: str
    tuner: str

    @property
    def beside(self) -> bool:
        """Whether the arms differ in more than how they start and how long they train."""
        return self.kind in (*REFERENCES, "scratch")

    @property
    def who(self) -> str:
        """The tuner, in sentences; the arm where its start is not plainly TPP."""
        return self.tuner if self.arm == f"{self.tuner} tpp" else self.arm


def measure_of(unit: Unit, margin: float) -> Measure:
    """How gains of a unit are told."""
    metric = {"points": "auc", "log_loss": "log_loss"}.get(unit, "hd95")
    return Measure(metric, "the score", unit if unit in ("mm", "px") else "", margin)


def rank_name(index: int) -> str:
    """Of a label count within its data set, from the lowest on."""
    return _RANKS[index] if index < len(_RANKS) else f"{index + 1}th"


def span(counts: Sequence[int]) -> str:
    """Counts from the least to the greatest."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def level_title(name: str, counts: Sequence[int], *, ranked: bool) -> str:
    """A level of labels."""
    if name == "all":
        return f"all labels ({span(counts)})"
    return f"{name} label count ({span(counts)})" if ranked else f"{span(counts)} labels"


def pooled_sentence(
    pair: Pair,
    where: str,
    pooled: Pooled,
    verdict: Verdict,
    scope: Scope,
    p_holm: float | None,
    single: Mapping[Verdict, int],
    measure: Measure,
) -> str:
    """What a mean gain over data sets says.

    Args:
        pair: TPP and its baseline.
        where: The level of labels.
        pooled: The mean with its intervals.
        verdict: What may be said.
        scope: Of which data sets.
        p_holm: Of the scope, adjusted.
        single: Verdicts on the single sets, with their numbers.
        measure: How gains are told.
    """
    against, estimate, sets = BASELINES.get(pair.kind, pair.kind), pooled.these.estimate, pooled.sets
    like_these = pooled.like_these
    over = f"{sets} data sets" if sets > 1 else "one data set"
    start, unit = f"{pair.who}, {where}", measure.noun
    ours = "TPP" if not pair.beside else f"{pair.tuner} with TPP" if pair.who == pair.tuner else pair.arm
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return f"{start}: the difference between {ours} and {against} is undefined."
    parts = []
    if like_these is not None and like_these.estimate.low is not None and like_these.estimate.high is not None:
        low, high = map(measure.signed, (like_these.estimate.low, like_these.estimate.high))
        parts.append(f"[{low}, {high}] for data sets like these")
    low, high = map(measure.signed, (estimate.low, estimate.high))
    parts.append(f"[{low}, {high}] for {'these' if sets > 1 else 'this one'}")
    value, interval = measure.signed(estimate.value), "; ".join(parts)
    each, average = "", "on average " if sets > 1 else ""
    if sets > 1:
        better, worse = single["helps"] + single["better"], single["hurts"] + single["worse"]
        told = ("is better", "worse") if pair.beside else ("helps", "hurts")
        each = f" Taken alone, {ours} {told[0]} on {better}, {told[1]} on {worse} of them."
    few = "" if scope == "like these" else f" {FEWEST_JUDGED} data sets or more would be needed to speak of others."
    place = "" if scope == "like these" else " on these" if sets > 1 else " on this one"
    if verdict in ("helps", "hurts", "better", "worse"):
        small = f", by less than the margin of {measure.room}" if abs(estimate.value) < measure.margin else ""
        direction = "better" if estimate.value > 0 else "worse"
        if pair.beside:
            return (
                f"{start}: {ours} is {verdict} than {against}{place}{small}: over {over} by "
                f"{value.lstrip('+-')}{unit} {average}({interval}).{each}{few}"
            )
        return (
            f"{start}: TPP {verdict}{place}{small}: over {over} it is {value.lstrip('+-')}{unit} {direction} "
            f"{average}than {against} ({interval}).{each}{few}"
        )
    if verdict == "equivalent":
        return (
            f"{start}: over {over}, {ours} and {against} are equivalent within {measure.room} ({value} {interval})."
            f"{each}{few}"
        )
    if verdict == "too few seeds":
        return (
            f"{start}: over {over}, {value}{unit} against {against}; some have fewer than {FEWEST_SEEDS} seeds, and "
            f"{FEWEST_JUDGED} data sets or {FEWEST_SEEDS} seeds on each are needed to say more.{each}"
        )
    judged = like_these.estimate if like_these is not None and scope == "like these" else estimate
    adjusted = ""
    if judged.low is not None and judged.high is not None and p_holm is not None and judged.low * judged.high > 0:
        adjusted = f"The interval leaves out zero, but p is {p_holm:.2f} when adjusted for all that was compared. "
    return (
        f"{start}: no difference seen between {ours} and {against} over {over}: {value}{unit} {average}({interval}). "
        f"{adjusted}That is not equivalence, for which the interval would have to lie within {measure.room}.{each}{few}"
    )


def answer(main: Sequence[PooledFile], sets: int) -> str:
    """How TPP against the tuners' own starts came out, in a few words."""
    question = (
        "Does it help to pre-train the target parameters without labels (TPP), instead of fine-tuning from the tuner's "
        "own start?"
    )
    if not main:
        return f"{question} No pair of arms differs in TPP alone, so this study does not say."
    counts = Counter(one.verdict for one in main)
    parts = [text.format(counts[verdict]) for verdict, text in _SEVERAL.items() if counts[verdict]]  # type: ignore[index]
    if len(main) == 1:
        parts = [text.replace(" in {}", "") for verdict, text in _SEVERAL.items() if verdict == main[0].verdict]
        result = f"{parts[0][0].upper()}{parts[0][1:]}"
    else:
        result = f"Of {len(main)} averages over data sets, {'; '.join(parts)}"
    gains: dict[Unit, list[float]] = {}
    for one in main:
        if one.these.value is not None:
            gains.setdefault(one.unit, []).append(one.these.value)
    spans = [_gain_span(values, measure_of(unit, 0.0)) for unit, values in gains.items()]
    told = f" Mean gains: {'; '.join(spans)}." if spans else ""
    some = any(one.scope == "these" for one in main)
    caution = " So few data sets say nothing of others." if some else ""
    return f"{question} {result}.{told} Measured on {sets} data set{'s' if sets != 1 else ''}.{caution}"


def _gain_span(values: Sequence[float], measure: Measure) -> str:
    low, high = measure.signed(min(values)), measure.signed(max(values))
    return f"{low}{measure.noun}" if low == high else f"{low} to {high}{measure.noun}"


def ranks_sentence(ranking: RankFile) -> str:
    """Which arm ranks best, and which are not told apart from it."""
    first = next((group for group in ranking.groups if 0 in group), (0,))
    others = [ranking.arms[index] for index in first if index]
    found = f"{ranking.arms[0]} has the best mean rank, {ranking.ranks[0]:.2f} among {len(ranking.arms)} arms."
    if others:
        verb = "is" if len(others) == 1 else "are"
        found += f" {', '.join(others)} {verb} not told apart from it."
    else:
        found += " All others rank worse by more than the critical difference."
    if ranking.p is not None and ranking.p >= 0.05:
        found += (
            f" Friedman's test does not tell the arms apart at all (p {ranking.p:.2f}), so take no order from this."
        )
    return found


def equal_sentence(dataset: str, who: str, labels: float, value: float, beyond: Beyond, low: str, high: str) -> str:
    """TPP with n labels equals standard with m."""
    start = f"{dataset}, {who}: TPP with {labels:,.0f} labels"
    if beyond == "above":
        return f"{start} is better than the standard start with the most that were tried ({value:,.0f})."
    if beyond == "below":
        return f"{start} is worse than the standard start with the fewest that were tried ({value:,.0f})."
    around = f" ({low} to {high})" if low and high else ""
    return f"{start} equals the standard start with {value:,.0f}{around}."


def notes_of(sets: Sequence[SetFile], levels: Sequence[LevelFile], pooled: Sequence[PooledFile]) -> list[str]:
    """What is to be known when the numbers are read."""
    notes = []
    titles: dict[str, list[str]] = {}
    for one in sets:
        titles.setdefault(one.metric_title, []).append(one.name)
    units = {one.unit for one in sets}
    if len(titles) > 1:
        told = "; ".join(f"{title} on {', '.join(names)}" for title, names in titles.items())
        apart = " Gains in different units are never averaged." if len(units) > 1 else ""
        notes.append(f"The data sets have different metrics ({told}): a gain is in its own set's metric.{apart}")
    if not all(one.higher_is_better for one in sets):
        notes.append("Where less is better, as of HD95, signs are turned: above zero TPP is better.")
    if any(level.name == rank_name(0) for level in levels):
        notes.append(
            "The data sets have different label counts, which are aligned by their rank within each set: the lowest "
            "with the lowest, and so on. The counts are in the tables."
        )
    fewest = [one for one in pooled if one.scope == "these"]
    if fewest:
        notes.append(
            f"Fewer than {FEWEST_JUDGED} data sets: what is said holds for these and says little of others. The "
            "interval for sets like these shows how little."
        )
    few = [one.name for one in sets if one.seeds < FEWEST_SEEDS]
    if few:
        notes.append(
            f"Fewer than {FEWEST_SEEDS} seeds on {', '.join(few)}: how seeds scatter is hardly known there, and not at "
            "all from one seed, whose interval is one over patients."
        )
    gaps = {(one.arm, one.level): one.left_out for one in pooled if one.kind == "standard" and one.left_out}
    for (arm, level), names in gaps.items():
        notes.append(f"{arm} at {level}: no pair on {', '.join(names)}, which is left out of the mean.")
    return notes

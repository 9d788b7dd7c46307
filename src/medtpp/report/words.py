"""What a run's numbers say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from medtpp.evaluation.evaluate import metric_title
from medtpp.report.curves import ClassCurve
from medtpp.report.page import number, percent, plural, whole
from medtpp.report.schema import EvaluationFile, MetricFile, SegmentationFile, StageFile, TPPFile

# Name to meaning, and whether the metric lies between 0 and 1 with 1 the best.
METRICS: dict[str, tuple[str, bool]] = {
    "accuracy": ("share of the predictions that are right", True),
    "balanced_accuracy": ("the same, with every class counting alike", True),
    "auc": ("how often a case with the finding is ranked above one without; 0.5 is guessing", True),
    "average_precision": ("area under the precision-recall curve", True),
    "macro_f1": ("precision and sensitivity in one, averaged over the classes", True),
    "sensitivity": ("share of the cases with the finding that are found, at the threshold", True),
    "specificity": ("share of the cases without it that are cleared, at the threshold", True),
    "ece": ("gap between stated and observed probabilities; 0 is best", False),
    "brier": ("squared error of the probabilities; 0 is best", False),
    "log_loss": ("penalty for confident errors; 0 is best", False),
}
_VIEWS = {
    "masked": "what the network was shown of it, the hidden patches in grey",
    "changed": "what the network was shown of it, changed",
    "restored": "what it restored",
}
_FEW_CASES = 100  # the 95% interval of a share of one half is then about 20 points wide
_STILL = 0.001  # 1 - cosine of features that point within about 2.5 degrees of where they did


def interval(metric: MetricFile, level: float) -> str:
    """An interval in words, or nothing."""
    if metric.low is None or metric.high is None:
        return ""
    return f"{level:.0%} interval {number(metric.low)} to {number(metric.high)}"


def rows_of_preview(views: Sequence[str]) -> str:
    """What the rows of a pretext task's picture are, below the images, by the names of its views.

    A sum of tasks has those of each, with its name before them. Files of older versions name none.
    """
    if not views:
        return "what the network was shown of it; what it restored"
    told = [view.rpartition(" ") for view in views]
    return "; ".join((f"{task}: " if task else "") + _VIEWS.get(view, view) for task, _, view in told)


def answer(evaluation: EvaluationFile, curves: list[ClassCurve], tpp: StageFile | None) -> list[str]:
    """The result in one paragraph, sentence by sentence."""
    unit = f" of {plural(evaluation.n_patients, 'patient')}" if evaluation.bootstrap.unit == "patient" else ""
    where = f"On {plural(evaluation.n_cases, 'test case')}{unit}"
    auc, level = evaluation.metrics["auc"], evaluation.bootstrap.level
    if auc.value is None:
        return [f"{where} the AUC is undefined: see the notes below."]
    around = interval(auc, level)
    title = metric_title("auc", macro=evaluation.positive is None)
    figures = f"{title} of {number(auc.value)}" + (f" ({around})" if around else "")
    positive = next((curve for curve in curves if curve.name == evaluation.positive), None)
    if positive is not None:
        told, pair = f"“{positive.name}” from the rest with an", "one case with it and one without"
    elif evaluation.multilabel:
        told, pair = (
            f"each of {plural(len(curves), 'label')} from its absence with a",
            "a case with a label and one without",
        )
    else:
        many = plural(len(curves), "class", "classes")
        told, pair = f"each of {many} from the rest with a", "a case of a class and one of another"
    found = [
        f"{where}, the model tells {told} {figures}: shown {pair}, it ranks the two rightly {percent(auc.value)} of "
        "the time."
    ]
    if auc.low is not None and auc.low <= 0.5:
        found.append("The interval includes 0.5, the value of guessing.")
    found += [_decisions(positive)] if positive else _per_class(evaluation, curves)
    return [*found, *_caveats(evaluation.n_cases, tpp)]


def _caveats(n_cases: int, tpp: StageFile | None) -> list[str]:
    """What to keep in mind with a run of any task."""
    began = (
        "from the tuner's own start, without target parameter pre-training (TPP)"
        if tpp is None
        else "from target parameters that were pre-trained without labels (TPP)"
    )
    few = ["With so few test cases the intervals say more than the numbers."] if n_cases < _FEW_CASES else []
    return [
        *few,
        f"Fine-tuning began {began}.",
        "One run cannot say whether TPP helps; that takes a comparison over several seeds.",
    ]


def _decisions(curve: ClassCurve) -> str:
    return (
        f"At the threshold that was chosen on the validation cases it finds {curve.found:,} of "
        f"{plural(curve.positives, 'case')} (sensitivity {percent(curve.sensitivity)}) and rightly clears "
        f"{curve.cleared:,} of {curve.negatives:,} others (specificity {percent(curve.specificity)})."
    )


def _per_class(evaluation: EvaluationFile, curves: list[ClassCurve]) -> list[str]:
    found = []
    if not evaluation.multilabel:
        right = sum(row[index] for index, row in enumerate(evaluation.confusion))
        found.append(f"The most probable class is the right one for {right:,} of {evaluation.n_cases:,} cases.")
    known = {curve.name: evaluation.per_class[curve.name]["auc"] for curve in curves}
    values = {name: value for name, value in known.items() if value is not None}
    if len(values) > 1:
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        found.append(
            f"It tells “{best}” apart best (AUC {number(values[best])}) and “{worst}” worst "
            f"(AUC {number(values[worst])})."
        )
    return found


def segmentation_answer(evaluation: SegmentationFile, tpp: StageFile | None) -> list[str]:
    """The result of a segmentation in one paragraph, sentence by sentence."""
    unit = f" of {plural(evaluation.n_patients, 'patient')}" if evaluation.bootstrap.unit == "patient" else ""
    where = f"On {plural(evaluation.n_cases, 'test case')}{unit}"
    dice, hd95, nsd = (evaluation.metrics[name] for name in ("dice", "hd95", "nsd"))
    if dice.value is None:
        return [f"{where} there is nothing to outline, and nothing was predicted: the metrics are undefined."]
    around = interval(dice, evaluation.bootstrap.level)
    named = list(evaluation.structures)
    what = f"“{named[0]}”" if len(named) == 1 else f"{len(named)} structures, each counting alike,"
    found = [
        f"{where}, the predicted masks of {what} agree with the true ones with a mean Dice of {number(dice.value)}"
        + (f" ({around})." if around else "."),
        f"Nineteen in twenty points of an outline lie within {number(hd95.value, 1)} {evaluation.unit} of the other "
        f"outline (mean HD95), and {percent(nsd.value)} of the outlines within {evaluation.tolerance:g} "
        f"{evaluation.unit} (NSD).",
    ]
    known = {name: one.metrics["dice"].value for name, one in evaluation.structures.items()}
    values = {name: value for name, value in known.items() if value is not None}
    if len(values) > 1:
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        found.append(
            f"“{best}” is outlined best (Dice {number(values[best])}), “{worst}” worst (Dice {number(values[worst])})."
        )
    missed = sum(one.missed for one in evaluation.structures.values())
    if missed:
        found.append(f"A structure that is there is missed altogether {plural(missed, 'time')}.")
    return [*found, *_caveats(evaluation.n_cases, tpp)]


def effect(tpp: StageFile) -> list[str]:
    """What TPP changed, in sentences; nothing where the run did not record it."""
    on, off, drift = tpp.pretext_loss_on, tpp.pretext_loss_off, tpp.feature_drift
    if on is None or off is None or drift is None:
        return []
    change = (on - off) / off if off else 0.0
    direction = "lower" if change < 0 else "higher"
    found = [
        f"On 32 of the training images the pretext loss is {number(on, 4)} with the pre-trained target parameters and "
        f"{number(off, 4)} without them: {percent(abs(change))} {direction}.",
        f"The features drifted by {number(drift, 4)} (1 − cosine of the mean patch token: 0 means unmoved, 1 unrelated "
        "to what they were).",
    ]
    if drift < _STILL:
        found.append(
            "Hardly anything moved: fine-tuning began almost where it would have begun without TPP, so this run "
            "does not test TPP."
        )
    elif change >= 0:
        found.append("The pretext task is not done better than before: TPP moved the features without learning it.")
    return found


def monitored(seen: TPPFile | None) -> list[str]:
    """What labels had to do with the pretext stage, in sentences; nothing where they had no part in it."""
    monitor = seen.monitor if seen else None
    if monitor is None:
        return []
    tried = ", ".join(f"{name} {number(score)}" for name, score in monitor.candidates.items())
    return [
        f"Labels chose the step: of {monitor.scores} that were scored, step {whole(monitor.step)} was kept, at which a "
        f"linear probe of the features was best on {plural(monitor.cases, 'labelled training case')}, each scored "
        "without its patient.",
        f"Its AUC was {number(monitor.score)} at that step, and is {number(monitor.without)} without the target "
        "parameters. The best of several scores flatters; validation and test cases had no part in it.",
        *([f"Labels chose the pretext task, too, by the best AUC of each: {tried}."] if tried else []),
    ]

"""Metrics and thresholds, against scikit-learn and by hand-made cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from sklearn import metrics as sk

from medtpp.errors import ConfigError
from medtpp.evaluation import (
    Thresholds,
    choose_thresholds,
    evaluate,
    positive_class,
)
from medtpp.evaluation import metrics as ours
from prediction_tables import NAMES, binary, halves, make, random_multiclass, scored_cases

# Metrics against scikit-learn


@given(scored_cases())
@settings(max_examples=75, deadline=None)
def test_one_vs_rest_metrics_equal_sklearn_with_and_without_weights(cases):
    scores, truth, weights = cases
    rows = np.stack([np.ones_like(weights), weights])
    decided = scores >= 0.5
    got = {
        "auc": ours.roc_auc(scores, truth, rows),
        "ap": ours.average_precision(scores, truth, rows),
        "sensitivity": ours.sensitivity(decided, truth, rows),
        "specificity": ours.specificity(decided, truth, rows),
        "f1": ours.f1(decided, truth, rows),
    }
    for row, weight in enumerate(rows):
        expected = {
            "auc": sk.roc_auc_score(truth, scores, sample_weight=weight),
            "ap": sk.average_precision_score(truth, scores, sample_weight=weight),
            "sensitivity": sk.recall_score(truth, decided, sample_weight=weight),
            "specificity": sk.recall_score(~truth, ~decided, sample_weight=weight),
            "f1": sk.f1_score(truth, decided, sample_weight=weight),
        }
        assert {name: value[row] for name, value in got.items()} == pytest.approx(expected, abs=1e-12)


def test_metrics_of_a_class_that_was_not_drawn_are_not_a_number():
    scores, truth = np.array([0.2, 0.8, 0.9]), np.array([False, False, True])
    no_positive, no_negative = np.array([[1.0, 1, 0]]), np.array([[0.0, 0, 2]])
    for metric in (ours.roc_auc, ours.average_precision):
        assert np.isnan([metric(scores, truth, no_positive), metric(scores, truth, no_negative)]).all()
    for metric in (ours.sensitivity, ours.f1):
        assert np.isnan(metric(scores > 0.5, truth, no_positive)).all()
        assert metric(scores > 0.5, truth, no_negative) == [1.0]
    assert np.isnan(ours.specificity(scores > 0.5, truth, no_negative)).all()


@given(scored_cases())
@settings(max_examples=50, deadline=None)
def test_a_weight_is_a_number_of_copies(cases):
    scores, truth, weights = cases
    copies = np.repeat(np.arange(len(scores)), weights.astype(int))
    ones = np.ones((1, len(copies)))
    for metric in (ours.roc_auc, ours.average_precision):
        assert metric(scores, truth, weights[None])[0] == pytest.approx(metric(scores[copies], truth[copies], ones)[0])
    weighted = ours.calibration_error(scores, truth, weights[None])[0]
    assert weighted == pytest.approx(ours.calibration_error(scores[copies], truth[copies], ones)[0])


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_overall_metrics_equal_sklearn(seed):
    predictions, truth = random_multiclass(seed)
    p = predictions.probabilities.astype(np.float64)
    p /= p.sum(axis=1, keepdims=True)
    weight = np.random.default_rng(seed).integers(0, 4, len(p)).astype(float)
    weight[:4] = 1  # every class is drawn
    onehot = np.eye(4, dtype=bool)[truth]
    scored = ours.Scored(onehot, p, np.array([0.2, 0.25, 0.3, 0.35]), None, multilabel=False)
    top = p.argmax(axis=1)
    flagged = p >= scored.thresholds
    for w in (np.ones(len(p)), weight):
        got = {name: value[0] for name, value in ours.overall(scored, w[None]).items() if name != "ece"}
        columns = range(4)
        assert got == pytest.approx(
            {
                "accuracy": sk.accuracy_score(truth, top, sample_weight=w),
                "balanced_accuracy": sk.balanced_accuracy_score(truth, top, sample_weight=w),
                "auc": np.mean([sk.roc_auc_score(onehot[:, j], p[:, j], sample_weight=w) for j in columns]),
                "average_precision": sk.average_precision_score(onehot, p, average="macro", sample_weight=w),
                "macro_f1": sk.f1_score(truth, top, average="macro", sample_weight=w),
                "sensitivity": sk.recall_score(onehot, flagged, average="macro", sample_weight=w),
                "specificity": sk.recall_score(~onehot, ~flagged, average="macro", sample_weight=w),
                "brier": np.average(((p - onehot) ** 2).sum(axis=1), weights=w),
                "log_loss": sk.log_loss(truth, p, sample_weight=w),
            },
            abs=1e-9,
        )
    assert np.mean([sk.roc_auc_score(onehot[:, j], p[:, j]) for j in columns]) == pytest.approx(
        sk.roc_auc_score(truth, p, multi_class="ovr")
    )
    result = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=2)
    assert result.confusion == sk.confusion_matrix(truth, top).tolist()


def test_binary_summaries_are_those_of_the_positive_class():
    rng = np.random.default_rng(3)
    truth = rng.random(80) < 0.3
    scores = np.clip(0.3 * truth + 0.7 * rng.random(80), 0, 1).astype(np.float32).astype(float)
    result = evaluate(binary(scores, truth), thresholds={"negative": 0.5, "positive": 0.4}, seed=0, resamples=10)
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert result.positive == "positive"
    assert values["auc"] == pytest.approx(sk.roc_auc_score(truth, scores))
    assert values["average_precision"] == pytest.approx(sk.average_precision_score(truth, scores))
    assert values["sensitivity"] == pytest.approx(sk.recall_score(truth, scores >= 0.4))
    assert values["specificity"] == pytest.approx(sk.recall_score(~truth, scores < 0.4))
    assert values["brier"] == pytest.approx(sk.brier_score_loss(truth, scores))
    assert values["macro_f1"] == pytest.approx(sk.f1_score(truth, scores > 0.5, average="macro"))

    other = evaluate(
        binary(scores, truth), thresholds={"negative": 0.5, "positive": 0.4}, positive="negative", seed=0, resamples=10
    )
    assert other.positive == "negative"
    assert other.metrics["average_precision"].value == pytest.approx(sk.average_precision_score(~truth, 1 - scores))


def test_multilabel_metrics():
    rng = np.random.default_rng(5)
    truth = rng.random((50, 3)) < 0.4
    truth[:, 2] = False  # never occurs
    p = np.clip(0.3 * truth + 0.7 * rng.random((50, 3)), 0, 1).astype(np.float32).astype(float)
    labels = [tuple(name for name, t in zip(NAMES, row, strict=False) if t) for row in truth]
    predictions = make(p, labels, NAMES[:3], multilabel=True)
    thresholds = {"adenosis": 0.4, "benign": 0.5, "carcinoma": 0.6}
    result = evaluate(predictions, thresholds=thresholds, seed=0, resamples=20)
    decided = p >= [0.4, 0.5, 0.6]
    value = {name: estimate.value for name, estimate in result.metrics.items()}
    assert value["accuracy"] == pytest.approx((decided == truth).mean())
    assert value["auc"] == pytest.approx(sk.roc_auc_score(truth[:, :2], p[:, :2]))
    assert value["macro_f1"] == pytest.approx(sk.f1_score(truth[:, :2], decided[:, :2], average="macro"))
    assert value["brier"] == pytest.approx(((p - truth) ** 2).mean())
    assert result.confusion == sk.multilabel_confusion_matrix(truth, decided).tolist()
    assert result.per_class["carcinoma"]["auc"] is None
    assert any("carcinoma" in note for note in result.notes)
    with pytest.raises(ConfigError, match="two classes"):
        evaluate(predictions, thresholds=thresholds, positive="benign", seed=0)


# Calibration


def test_calibration_error_by_hand():
    ones = np.ones((1, 4))
    # One bin: confidence 0.9 and half of them right.
    got = ours.calibration_error(np.full(4, 0.9), np.array([True, True, False, False]), ones)
    assert got[0] == pytest.approx(0.4)
    # Two bins of two cases: gaps 0.2 and 0.5, with opposite signs, do not cancel.
    confidence = np.array([0.8, 0.8, 0.5, 0.5])
    assert ours.calibration_error(confidence, np.array([True, True, False, False]), ones)[0] == pytest.approx(0.35)
    # Within a bin they do: (0.61 + 0.65) / 2 against one of two right.
    pair = ours.calibration_error(np.array([0.61, 0.65]), np.array([True, False]), np.ones((1, 2)))
    assert pair[0] == pytest.approx(0.13)
    # Weights: the first bin alone.
    only = ours.calibration_error(confidence, np.array([True, True, False, False]), np.array([[1.0, 1, 0, 0]]))
    assert only[0] == pytest.approx(0.2)
    # Bins are closed above: 3/15 falls with 0.19, not with 0.21.
    edge = np.array([0.19, 3 / 15, 0.21])
    apart = ours.calibration_error(edge, np.array([True, False, False]), np.ones((1, 3)))
    assert apart[0] == pytest.approx((abs(0.81 - 0.2) + 0.21) / 3)
    assert ours.calibration_error(np.array([0.0, 1.0]), np.array([False, True]), np.ones((1, 2)))[0] == 0


# Thresholds


def test_threshold_is_midway_and_ties_go_to_the_more_sensitive():
    chosen = choose_thresholds(binary([0.125, 0.25, 0.5, 0.75], [0, 0, 1, 1], split="val"))
    assert chosen.values == {"negative": 0.625, "positive": 0.375}
    assert chosen.notes == ()
    # 0.1875 (all positives, half of the negatives) and 0.625 (half, all) are equally good.
    tied = choose_thresholds(binary([0.125, 0.25, 0.5, 0.75], [0, 1, 0, 1]))
    assert tied.values["positive"] == 0.1875


@given(scored_cases())
@settings(max_examples=60, deadline=None)
def test_no_threshold_has_a_greater_youden_index(cases):
    scores, truth, _ = cases

    def youden(threshold):
        return (scores >= threshold)[truth].mean() - (scores >= threshold)[~truth].mean()

    best = max(youden(threshold) for threshold in np.unique(scores))
    chosen = choose_thresholds(binary(scores, truth))
    if best > 1e-12:
        assert youden(chosen.values["positive"]) == pytest.approx(best)
    else:
        assert chosen.values["positive"] == 0.5
        assert "'positive'" in " ".join(chosen.notes)


@pytest.mark.parametrize(("truth", "why"), [([0, 0, 0], "no case has"), ([1, 1, 1], "every case has")])
def test_threshold_of_an_absent_or_lone_class_is_one_half(truth, why):
    chosen = choose_thresholds(binary([0.1, 0.4, 0.8], truth))
    assert chosen.values["positive"] == 0.5
    assert any(why in note and "'positive'" in note for note in chosen.notes)


def test_notes_of_thresholds_reach_the_evaluation_and_classes_must_fit():
    test = binary([0.1, 0.9], [0, 1])
    thresholds = Thresholds(halves(test), ("The threshold of 'positive' is 0.5: because.",))
    assert thresholds.notes[0] in evaluate(test, thresholds=thresholds, seed=0, resamples=5).notes
    with pytest.raises(ConfigError, match="same model"):
        evaluate(test, thresholds={"positive": 0.5}, seed=0)


def test_positive_class():
    reverse = make([[0.5, 0.5]], [None], ("tumour", "normal"))
    assert positive_class(reverse) == "tumour"
    assert positive_class(reverse, "normal") == "normal"
    assert positive_class(random_multiclass(0)[0]) is None
    with pytest.raises(ConfigError, match="none of"):
        positive_class(reverse, "nodule")

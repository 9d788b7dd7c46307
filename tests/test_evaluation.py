"""Intervals, undefined metrics, and what is written."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medtpp.errors import ConfigError, DataError
from medtpp.evaluation import (
    choose_thresholds,
    evaluate,
    write_predictions,
)
from medtpp.evaluation import metrics as ours
from medtpp.evaluation.bootstrap import draw_weights, group_by_patient
from prediction_tables import NAMES, binary, halves, make, random_multiclass

# Intervals


def test_interval_covers_the_true_auc():
    rng = np.random.default_rng(0)
    auc = 0.8144  # P(N(0, 1) < N(1.265, 1)) = Phi(1.265 / sqrt(2))
    covered = 0
    for repeat in range(120):
        truth = np.arange(80) % 2 == 1
        scores = 1 / (1 + np.exp(-(rng.normal(size=80) + 1.265 * truth)))
        result = evaluate(
            binary(scores, truth), thresholds={"negative": 0.5, "positive": 0.5}, seed=repeat, resamples=200
        )
        covered += result.metrics["auc"].low <= auc <= result.metrics["auc"].high
    assert 105 <= covered <= 120  # 95 % of 120 is 114, with a standard deviation of 2.4


def test_copies_of_a_patients_cases_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    truth = rng.random(60) < 0.5
    scores = np.clip(0.4 * truth + 0.6 * rng.random(60), 0, 1)
    copies = np.repeat(np.arange(60), 4)

    def width(predictions):
        result = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=1000)
        return result.metrics["auc"].high - result.metrics["auc"].low, result

    single, _ = width(binary(scores, truth))
    naive, by_case = width(binary(scores[copies], truth[copies]))
    grouped, by_patient = width(binary(scores[copies], truth[copies], [f"patient{i}" for i in copies]))
    assert grouped == pytest.approx(single)  # the same draws of patients
    assert 1.6 < grouped / naive < 2.5  # four copies: twice as wide
    assert (by_case.bootstrap.unit, by_patient.bootstrap.unit) == ("case", "patient")
    assert (by_patient.n_cases, by_patient.n_patients) == (240, 60)


def test_interval_lies_between_the_percentiles_of_the_resamples():
    predictions, truth = random_multiclass(4)
    right = predictions.probabilities.argmax(axis=1) == truth
    drawn = np.concatenate(list(draw_weights(np.arange(60), 500, seed=6)))
    for level, percentiles in ((0.95, [2.5, 97.5]), (0.8, [10, 90])):
        result = evaluate(predictions, thresholds=halves(predictions), seed=6, resamples=500, level=level)
        estimate = result.metrics["accuracy"]
        assert [estimate.low, estimate.high] == pytest.approx(np.percentile(drawn @ right / 60, percentiles))


def test_cases_without_patient_stand_alone():
    predictions = make(np.full((5, 2), 0.5), [None] * 5, patients=["a", None, "a", None, "case1"])
    assert group_by_patient(predictions).tolist() == [0, 1, 0, 2, 3]


def test_draws_do_not_depend_on_chunks(monkeypatch):
    groups = np.array([0, 0, 1, 2, 2, 3])
    whole = np.concatenate(list(draw_weights(groups, 50, seed=4)))
    monkeypatch.setattr("medtpp.evaluation.bootstrap._CHUNK", 42)
    chunks = list(draw_weights(groups, 50, seed=4))
    assert len(chunks) == 8
    assert np.array_equal(whole, np.concatenate(chunks))
    assert (whole[:, [0, 2, 3, 5]].sum(axis=1) == 4).all()
    assert np.array_equal(whole[:, 0], whole[:, 1])


def test_same_seed_same_result_and_other_seed_other_interval():
    predictions, _ = random_multiclass(2)
    chosen = choose_thresholds(predictions)
    first, again, other = (
        json.dumps(evaluate(predictions, thresholds=chosen, seed=seed, resamples=50).to_json()) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_senseless_bootstrap_is_refused(options):
    predictions = binary([0.1, 0.9], [0, 1])
    with pytest.raises(ConfigError, match="bootstrap"):
        evaluate(predictions, thresholds=halves(predictions), seed=0, **options)


# Undefined metrics


def test_one_class_only_is_undefined_not_a_crash():
    predictions = binary([0.1, 0.9, 0.7], [1, 1, 1])
    result = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=20)
    for name in ("auc", "average_precision", "balanced_accuracy", "macro_f1", "specificity"):
        assert result.metrics[name].value is None
        assert result.metrics[name].low is None
        assert result.metrics[name].undefined_share == 1
    assert result.metrics["sensitivity"].value == pytest.approx(2 / 3)
    assert result.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert any("Every case has the class 'positive'" in note for note in result.notes)
    json.dumps(result.to_json(), allow_nan=False)


def test_absent_class_is_left_out_of_macro_averages():
    full, truth = random_multiclass(7)
    without = full.take([row for row in range(len(full)) if truth[row] != 2])
    result = evaluate(without, thresholds=halves(without), seed=0, resamples=20)
    rest = [name for name in NAMES if name != "carcinoma"]
    assert result.per_class["carcinoma"]["auc"] is None
    assert result.per_class["carcinoma"]["specificity"] is not None
    assert result.metrics["auc"].value == pytest.approx(np.mean([result.per_class[name]["auc"] for name in rest]))
    assert any("leave out: carcinoma" in note for note in result.notes)


def test_resamples_without_a_class_are_left_out_and_counted():
    predictions = binary([0.2, 0.3, 0.1, 0.9, 0.4, 0.6], [0, 0, 0, 1, 0, 0])
    result = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=3000)
    assert result.metrics["auc"].undefined_share == pytest.approx((5 / 6) ** 6 + (1 / 6) ** 6, abs=0.03)
    assert result.metrics["auc"].low == 1.0
    assert result.metrics["accuracy"].undefined_share == 0


def test_one_patient_gives_values_without_intervals():
    predictions = binary([0.2, 0.8], [0, 1], ["p", "p"])
    result = evaluate(predictions, thresholds=halves(predictions), seed=0)
    assert (result.metrics["auc"].value, result.metrics["auc"].low) == (1.0, None)
    assert any("one patient" in note for note in result.notes)


def test_unlabelled_cases_are_left_out_with_a_note():
    labels = [("adenosis",), None, ("benign",)]
    predictions = make([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], labels)
    result = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=5)
    assert result.n_cases == 2
    assert any("1 of 3 cases" in note for note in result.notes)
    with pytest.raises(DataError, match="has a label"):
        evaluate(predictions.take([1]), thresholds=halves(predictions), seed=0)


# What is written


def test_evaluation_file(tmp_path):
    predictions, _ = random_multiclass(0)
    result = evaluate(predictions, thresholds=choose_thresholds(predictions), seed=9, resamples=100, level=0.9)
    result.save(tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored == result.to_json()
    assert stored["schema"] == 1
    assert tuple(stored["metrics"]) == ours.OVERALL
    assert set(stored["metrics"]["auc"]) == {"value", "low", "high", "undefined_share"}
    assert set(stored["per_class"]["benign"]) == {"auc", "average_precision", "sensitivity", "specificity", "f1", "n"}
    assert sum(stored["classes"].values()) == stored["n_cases"] == 60
    assert stored["bootstrap"] == {"resamples": 100, "level": 0.9, "seed": 9, "unit": "case"}
    for estimate in stored["metrics"].values():
        assert 0 <= estimate["low"] <= estimate["high"]


def test_documented_code_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    truth = np.arange(40) % 2
    split = ("val",) * 20 + ("test",) * 20
    write_predictions(tmp_path / "run" / "predictions.csv", replace(binary(0.3 + 0.4 * truth, truth), split=split))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["thresholds"]["positive"] == pytest.approx(
        0.5
    )
    assert "AUC, positive" in capsys.readouterr().out


def test_table_fits_80_columns():
    long = "a class with a name that is much too long for the table of a terminal"
    predictions = make([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [("a",), (long,), ("a",)], ("a", long))
    rows = evaluate(predictions, thresholds=halves(predictions), seed=0, resamples=200).table()
    widest = max(len(title) for title, _ in rows)
    assert all(widest + 2 + len(value) <= 80 for _, value in rows)
    assert dict(rows)["accuracy"].startswith("0.667  [")

"""What `check` finds, and what it leaves in peace."""

import time
from pathlib import Path

import numpy as np
import pytest

from medtpp.data.case import Case, Dataset, ImageRecord, Problem
from medtpp.data.check import check, describe, raise_errors
from medtpp.data.giveaways import predictability
from medtpp.data.sources import class_names
from medtpp.errors import DataError


def make(*cases: Case, **options) -> Dataset:
    return Dataset(Path("data"), "manifest", cases, class_names(cases), **options)


def case(name: str, *labels: str, **facts) -> Case:
    return Case(name, Path(name), labels, labelled=facts.pop("labelled", bool(labels)), **facts)


def plenty(*classes: str, **facts) -> list[Case]:
    return [case(f"{name}{i}", name, **facts) for name in classes for i in range(12)]


def found(dataset: Dataset, records: dict[str, ImageRecord] | None = None) -> dict[str, Problem]:
    return {problem.code: problem for problem in check(dataset, records or {})}


def records(pixels: dict[str, str]) -> dict[str, ImageRecord]:
    return {name: ImageRecord(name, 8, 8, fingerprint=fingerprint) for name, fingerprint in pixels.items()}


def test_a_sound_data_set_has_no_problems():
    assert found(make(*plenty("a", "b")), records({c.id: c.id for c in plenty("a", "b")})) == {}


def test_problems_of_the_source_come_along_and_errors_come_first():
    cases = plenty("a")
    warning = Problem("warning", "idle-exclude", "idle")
    assert [problem.code for problem in check(make(*cases, problems=(warning,)), {})] == ["one-class", "idle-exclude"]


def test_unreadable_images():
    cases = [*plenty("a", "b"), case("bad.png", "a")]
    problem = found(make(*cases), {"bad.png": ImageRecord("bad.png", error="truncated")})["unreadable-image"]
    assert problem.severity == "error"
    assert problem.cases == ("bad.png",)
    assert "bad.png (truncated)" in problem.message
    assert """--set 'data.exclude=["bad.png"]'""" in problem.message


def test_same_pixels_under_two_labels():
    dataset = make(*plenty("a", "b"))
    problem = found(dataset, records({"a1": "same", "b7": "same", "a2": "other"}))["same-pixels-two-labels"]
    assert problem.severity == "error"
    assert "a1 (a) = b7 (b)" in problem.message
    assert """--set 'data.exclude=["a1", "b7"]'""" in problem.message


def test_same_pixels_in_two_splits_or_in_one():
    cases = plenty("a", "b", split="train") + [case(f"t{i}", "ab"[i % 2], split="test") for i in range(4)]
    problems = found(make(*cases), records({"a1": "x", "t0": "x", "a2": "y", "a3": "y", "a4": "y"}))
    assert problems["same-pixels-in-two-splits"].severity == "error"
    assert "a1 (a, train) = t0 (a, test)" in problems["same-pixels-in-two-splits"].message
    assert problems["duplicates"].severity == "warning"
    assert problems["duplicates"].cases == ("a2", "a3", "a4")
    assert "Exact copies of other images: 2 " in problems["duplicates"].message


def test_a_patient_in_two_splits():
    cases = [*plenty("a", "b", split="train", patient="p1"), case("t", "a", split="test", patient="p1")]
    problem = found(make(*cases))["patient-in-two-splits"]
    assert problem.severity == "error"
    assert "p1 (" in problem.message
    assert "t" in problem.cases
    unlabelled = [*plenty("a", "b", split="train", patient="p1"), case("t", split="test", patient="p1")]
    assert "patient-in-two-splits" not in found(make(*unlabelled))


def test_prescribed_splits_are_complete():
    assert "no test" in found(make(*plenty("a", "b", split="train")))["split-missing"].message.replace("labelled ", "")
    cases = [*plenty("a", "b", split="train"), case("t", "b", split="test"), case("u", "c", split="test")]
    problem = found(make(*cases))["class-not-in-split"]
    assert problem.severity == "warning"
    messages = [p.message for p in check(make(*cases), {}) if p.code == "class-not-in-split"]
    assert messages[0].startswith("No case of c is in train")
    assert messages[1].startswith("No case of a is in test")


def test_classes():
    assert found(make(*plenty("a")))["one-class"].severity == "error"
    assert "b (2)" in found(make(*plenty("a"), case("x", "b"), case("y", "b")))["few-cases"].message
    assert "'Benign' / 'benign '" in found(make(*plenty("Benign", "benign ")))["classes-look-alike"].message
    assert found(make(case("x"), case("y")))["no-labels"].severity == "warning"
    multilabel = make(*plenty("a"), *(case(f"n{i}", labelled=True) for i in range(12)), multilabel=True)
    assert found(multilabel) == {}


def test_patients_known_in_part():
    assert found(make(*plenty("a", patient="p"), *plenty("b")))["patient-missing"].cases == tuple(
        f"b{i}" for i in range(12)
    )


def test_a_format_that_gives_the_label_away_is_noticed():
    rng = np.random.default_rng(0)
    cases = [case(f"{name}{i}", name) for name in "ab" for i in range(60)]
    leaky = {c.id: ImageRecord(c.id, int(rng.integers(300, 400)) + 90 * (c.labels[0] == "a"), 300) for c in cases}
    assert "balanced accuracy of" in found(make(*cases), leaky)["shape-predicts-label"].message


def test_a_site_that_gives_the_label_away_is_noticed():
    tied = [case(f"{name}{i}", name, site=f"{name}{i % 2}") for name in "ab" for i in range(30)]
    assert "site-predicts-label" in found(make(*tied))
    mixed = [case(f"{name}{i}", name, site=f"s{i % 2}") for name in "ab" for i in range(30)]
    assert "site-predicts-label" not in found(make(*mixed))


@pytest.mark.parametrize("size", [24, 60, 200])
def test_no_false_alarm_on_small_sets(size):
    alarms = 0
    for seed in range(25):
        rng = np.random.default_rng([size, seed])
        sizes = rng.integers(200, 260, (size, 2)).tolist()
        alarms += predictability(sizes, rng.choice(["a", "b", "c"], size).tolist(), depth=3) is not None
    assert alarms <= 1


def test_raise_errors_lists_errors_alone():
    dataset = make(*plenty("a"), case("x", "b"), case("y", "c"))
    raise_errors(dataset, check(dataset, {}))  # warnings pass
    bad = make(*plenty("a"), problems=(Problem("error", "missing-file", "gone"), Problem("warning", "w", "hm")))
    with pytest.raises(DataError) as caught:
        raise_errors(bad, check(bad, {}))
    assert [text.split()[0] for text in caught.value.problems] == ["gone", "All"]


def test_describe():
    cases = [
        case("1", "a", split="train", patient="p", site="s"),
        case("2", "a", "b", split="train", patient="p"),
        case("3", labelled=True, split="test", patient="q"),
        case("4"),
    ]
    seen = {
        "1": ImageRecord("1", 10, 7, colour=True, fingerprint="x"),
        "2": ImageRecord("2", 20, 9, bits=16, fingerprint="y"),
        "3": ImageRecord("3", 40, 8, fingerprint="z"),
        "4": ImageRecord("4", error="broken"),
    }
    summary = describe(make(*cases, multilabel=True), seen)
    assert (summary.cases, summary.labelled, summary.classes) == (4, 3, {"a": 2, "b": 1})
    assert (summary.width, summary.height) == ((10, 20.0, 40), (7, 8.0, 9))
    assert (summary.bits, summary.colour, summary.patients, summary.sites) == ({8: 2, 16: 1}, 1, 2, {"s": 1})
    assert summary.splits == {"train": {"a": 2, "b": 1}, "test": {"a": 0, "b": 0}}
    assert describe(make(*cases), {}).width is None


def test_many_cases_are_checked_quickly_and_shortly():
    cases = [
        case(f"{i}", "ab"[i % 2], patient=f"p{i // 4}", split=("train", "test")[i % 3 == 0]) for i in range(40_000)
    ]
    seen = {c.id: ImageRecord(c.id, 200 + int(c.id) % 7, 200, fingerprint=str(int(c.id) // 3)) for c in cases}
    start = time.perf_counter()
    problems = check(make(*cases), seen)
    assert time.perf_counter() - start < 10
    assert {"patient-in-two-splits", "same-pixels-in-two-splits", "same-pixels-two-labels"} <= {
        p.code for p in problems
    }
    assert max(len(problem.message) for problem in problems) < 900

"""The numbers and words of reports."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtpp.evaluation import Predictions, choose_thresholds, evaluate
from medtpp.evaluation.metrics import calibration_error
from medtpp.report.curves import class_curves, reliability
from medtpp.report.page import duration, number, plural, scale_over, signed
from medtpp.report.plots import Series
from medtpp.report.read import last_part, without_folders


@st.composite
def predictions(draw):
    count = draw(st.integers(4, 40))
    classes = ("a", "b", "c")[: draw(st.integers(2, 3))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    multilabel = draw(st.booleans())
    probabilities = rng.integers(1, 9, (count, len(classes))).astype(float)
    probabilities = probabilities / 9 if multilabel else probabilities / probabilities.sum(axis=1, keepdims=True)
    labels = tuple(
        tuple(name for name in classes if rng.random() < 0.5) if multilabel else (str(rng.choice(classes)),)
        for _ in range(count)
    )
    nobody = (None,) * count
    cases = tuple(f"{index}.png" for index in range(count))
    return Predictions(cases, ("test",) * count, nobody, nobody, labels, classes, probabilities, multilabel)


@given(predictions())
def test_operating_points_are_those_of_the_evaluation(table):
    evaluation = evaluate(table, thresholds=choose_thresholds(table), seed=0, resamples=1)
    curves = {curve.name: curve for curve in class_curves(table, evaluation.thresholds, table.classes)}
    defined = [name for name in table.classes if evaluation.per_class[name]["auc"] is not None]
    assert list(curves) == defined
    for name, curve in curves.items():
        wanted = evaluation.per_class[name]
        assert (curve.sensitivity, curve.specificity) == pytest.approx((wanted["sensitivity"], wanted["specificity"]))
        area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
        assert area == pytest.approx(wanted["auc"])


@given(predictions())
def test_the_reliability_plot_has_the_calibration_error(table):
    bins = reliability(table)
    assert bins["count"].sum() == len(table) * (len(table.classes) if table.multilabel else 1)
    if not table.multilabel:
        top = table.probabilities.astype(np.float64)
        right = np.array([table.classes[row.argmax()] in labels for row, labels in zip(top, table.labels, strict=True)])
        wanted = calibration_error(top.max(axis=1), right, np.ones((1, len(table))))[0]
        found = (bins["count"] * (bins.observed - bins.stated).abs()).sum() / len(table)
        assert found == pytest.approx(wanted)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5))
def test_a_scale_holds_its_values(values):
    scale = scale_over([0.0, *values])
    places = [float(scale.at(value)[:-1]) for value in sorted(values)]
    assert places == sorted(places)
    assert all(2.4 < place < 97.6 for place in places)
    assert len(scale.ticks) <= 8


# Words


def test_numbers_in_words():
    assert (number(None), number(-0.5), signed(0.02), signed(-0.02)) == ("–", "−0.500", "+0.020", "−0.020")
    assert [duration(seconds) for seconds in (None, 5, 600, 7200)] == ["–", "5.0 s", "10.0 min", "2.0 h"]
    assert [plural(count, "class", "classes") for count in (1, 1200)] == ["1 class", "1,200 classes"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Cannot read /home/jörg/a b/x.png: broken", "Cannot read …/a b/x.png: broken"),
        (r"C:\Users\jo\x.png is odd", "…/x.png is odd"),
        ("'/srv/scans/x.png' and/or sensitivity / specificity", "'…/x.png' and/or sensitivity / specificity"),
        ("images/7/x.png", "images/7/x.png"),
    ],
)
def test_messages_lose_folders(text, shown):
    assert without_folders(text) == shown


@given(st.lists(st.from_regex(r"[A-Za-zä][\w .-]{0,8}[a-z]", fullmatch=True), min_size=1, max_size=4))
def test_absolute_paths_lose_their_folders(parts):
    assert last_part("/" + "/".join(parts)) == f"…/{parts[-1]}"
    assert last_part("C:\\" + "\\".join(parts)) == f"…/{parts[-1]}"
    assert last_part("/".join(parts)) == "/".join(parts)


def test_lines_differ_by_more_than_colour():
    looks = [Series(number, "") for number in range(32)]
    assert len({(look.colour, look.dashes) for look in looks}) == 32
    assert all(len({look.dashes for look in looks[start : start + 4]}) == 4 for start in range(0, 32, 8))

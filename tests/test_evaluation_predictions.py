"""The table of predictions: exact round trips, and malformed files named by line and column."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.errors import DataError
from medtpp.evaluation import (
    Predictions,
    read_predictions,
    write_predictions,
)
from prediction_tables import binary, make

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_text = text.filter(bool)


@st.composite
def any_predictions(draw):
    multilabel = draw(st.booleans())
    names = some_text.filter(lambda name: ";" not in name) if multilabel else some_text
    classes = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    cases = draw(st.lists(some_text, min_size=1, max_size=5, unique=True))
    n, k = len(cases), len(classes)
    raw = draw(st.lists(st.floats(0, 1, width=32), min_size=n * k, max_size=n * k))
    p = np.array(raw, dtype=np.float64).reshape(n, k)
    if not multilabel:
        p = (p + 1e-3) / (p + 1e-3).sum(axis=1, keepdims=True)
    one = st.sampled_from(classes).map(lambda name: (name,))
    many = st.lists(st.sampled_from(classes), unique=True).map(tuple)
    column = st.lists(st.none() | some_text, min_size=n, max_size=n)
    return Predictions(
        cases=tuple(cases),
        split=tuple(draw(st.lists(st.sampled_from(["train", "val", "test", ""]), min_size=n, max_size=n))),
        patients=tuple(draw(column)),
        sites=tuple(draw(column)),
        labels=tuple(draw(st.lists(st.none() | (many if multilabel else one), min_size=n, max_size=n))),
        classes=tuple(classes),
        probabilities=p,
        multilabel=multilabel,
    )


@given(predictions=any_predictions())
@settings(max_examples=100, deadline=None)
def test_round_trip_is_exact(tmp_path_factory, predictions):
    path = tmp_path_factory.mktemp("predictions") / "predictions.csv"
    write_predictions(path, predictions)
    again = read_predictions(path)
    assert np.array_equal(again.probabilities, predictions.probabilities)
    for name in ("cases", "split", "patients", "sites", "labels", "classes", "multilabel"):
        assert getattr(again, name) == getattr(predictions, name)


def test_file_is_what_the_documentation_says(tmp_path):
    path = tmp_path / "predictions.csv"
    write_predictions(path, binary([0.25, 0.5], [0, 1], ["007", None]))
    assert path.read_bytes() == (
        b"case,split,patient,site,label,p_negative,p_positive\n"
        b"case0,test,007,,negative,0.75,0.25\n"
        b"case1,test,,,positive,0.5,0.5\n"
    )
    multilabel = make([[0.1, 0.9]] * 4, [(), None, ("adenosis", "benign"), ("benign",)], multilabel=True)
    write_predictions(path, multilabel)
    lines = path.read_text().splitlines()
    assert lines[0] == "case,split,patient,site,labels,p_adenosis,p_benign"
    assert [line.split(",")[4] for line in lines[1:]] == [";", "", "adenosis;benign", "benign"]


GOOD = "case,split,patient,site,label,p_a,p_b\nx.png,test,1,,a,0.75,0.25\ny.png,test,2,,b,0.25,0.75\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("0.25,0.75\n", "0.25,high\n", "line 3, column p_b: 'high' is not a number"),
        ("0.25,0.75\n", "0.25,nan\n", "line 3, column p_b: nan is not a probability"),
        ("0.25,0.75\n", "-0.25,1.25\n", "line 3, column p_a: -0.25 is not a probability"),
        ("0.25,0.75\n", "0.25,inf\n", "line 3, column p_b: inf is not"),
        ("0.75,0.25\n", "0.75,0.5\n", "line 2, column p_*: the probabilities sum to 1.25"),
        (",b,0.25", ",c,0.25", "line 3, column label: 'c' has no column p_c"),
        ("y.png", "x.png", "line 3, column case: 'x.png' appears twice"),
        ("y.png", "", "line 3, column case: it is empty"),
        ("0.25,0.75\n", "0.25\n", "line 3, column p_b: 6 cells instead of 7"),
        ("0.25,0.75\n", "0.25,0.75,1\n", "line 3, column 8: 8 cells instead of 7"),
        ("y.png", '"y\n1.png"', None),  # a line break inside quotes is no new row
        (",site,", ",place,", "line 1, column site: it is missing"),
        (",site,", ",place,", "line 1, column place: unknown"),
        (",label,", ",labels,", None),  # multi-label: sums are free
        ("p_b", "p_a", "line 1, column p_a: it appears 2 times"),
        ("p_a,p_b", "a,b", "column p_<class>: there is no column of probabilities"),
        (GOOD, "", "line 1, column case: it is missing"),
        (GOOD, GOOD.splitlines()[0] + "\n", "it has no rows"),
        ("x.png", '"x.png', "unexpected end of data"),
    ],
)
def test_malformed_files_are_named_by_line_and_column(tmp_path, old, new, expected):
    path = tmp_path / "predictions.csv"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    if expected is None:
        assert len(read_predictions(path)) == 2
        return
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_problems_of_a_file_are_reported_together_with_right_lines(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text(GOOD.replace("x.png", '"x\n\n.png"').replace("0.75,0.25", "0.75,2").replace(",b,", ",c,"))
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "line 5, column label",
        "line 2, column p_b",
    ]


def test_spreadsheet_exports_are_read(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_predictions(path).cases == ("x.png", "y.png")
    path.write_bytes(GOOD.replace("x.png", "é.png").encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_predictions(path)
    with pytest.raises(DataError, match="Cannot read"):
        read_predictions(tmp_path / "none.csv")


def test_predictions_that_do_not_fit_together_are_refused():
    good = binary([0.1, 0.9], [0, 1])
    with pytest.raises(DataError, match="shape"):
        replace(good, probabilities=good.probabilities[:, :1])
    with pytest.raises(DataError, match="patients, labels"):
        replace(good, patients=(), labels=())
    with pytest.raises(DataError, match="0 labels; need one, or None"):
        replace(good, labels=((), ("negative",)))
    with pytest.raises(DataError, match="case 'case1', column p_positive"):
        replace(good, probabilities=np.array([[0.5, 0.5], [0.5, np.nan]]))
    with pytest.raises(DataError, match="without ';'"):
        replace(good, classes=("a;b", "c"), labels=(None, None), multilabel=True)


def test_select_names_the_splits_there_are():
    predictions = replace(binary([0.1, 0.9], [0, 1]), split=("val", "test"))
    assert predictions.select("val").cases == ("case0",)
    with pytest.raises(DataError, match=r"'train'.*'test', 'val'"):
        predictions.select("train")


def test_import_is_cheap():
    heavy = "torch, pandas, scipy, sklearn"
    code = f"import sys, medtpp.evaluation; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"

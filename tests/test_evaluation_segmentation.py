"""The table of segmentations, its means and intervals, and runs compared in pairs."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.data.case import Case
from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.bootstrap import Bootstrap, draw_weights, group_by_patient
from medtpp.evaluation.paired import SegmentationRun, difference, judge, resample
from medtpp.evaluation.segmentation import evaluate_segmentation
from medtpp.evaluation.segmentation_table import (
    Segmentations,
    as_segmentations,
    read_segmentations,
    write_segmentations,
)
from medtpp.evaluation.surfaces import compare_masks

STRUCTURES = ("left, lung", 'right "lung"')


def segmentations(dice, *, patients=None, volume_true=None, hd95=None, structures=STRUCTURES, **others):
    """A table of (n, k) Dice coefficients; not-a-number: neither there nor predicted."""
    dice = np.array(dice, dtype=float)
    n = len(dice)
    absent = np.isnan(dice)
    return Segmentations(
        cases=tuple(f"case{i}" for i in range(n)),
        split=("test",) * n,
        patients=tuple(patients or (None,) * n),
        sites=("Bath", None) * (n // 2) + ("Bath",) * (n % 2),
        structures=structures[: dice.shape[1]],
        dice=dice,
        hd95=10 * (1 - dice) if hd95 is None else hd95,
        nsd=dice**2,
        volume=np.where(absent, 0.0, 1.5),
        volume_true=np.where(absent, 0.0, 2.5) if volume_true is None else volume_true,
        **others,
    )


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, seed, n, k):
    rng = np.random.default_rng(seed)
    dice = rng.random((n, k))
    dice[rng.random((n, k)) < 0.2] = np.nan
    path = tmp_path_factory.mktemp("table") / "segmentation.csv"
    table = segmentations(dice, patients=[f"p\n{i % 3}" for i in range(n)], unit="px", tolerance=1 / 3)
    write_segmentations(path, table)
    assert "nan" not in path.read_text(encoding="utf-8").lower()
    read = read_segmentations(path)
    for name in ("cases", "split", "patients", "sites", "structures", "unit", "tolerance"):
        assert getattr(read, name) == getattr(table, name)
    for name, values in table.numbers.items():
        np.testing.assert_array_equal(read.numbers[name], values)


def test_agreements_become_a_table():
    empty, some = np.zeros((2, 8, 8), dtype=bool)
    some[2:5, 2:6] = True
    cases = [Case("a.png", None, patient="p1", site="s"), Case("b.png", None)]
    agreements = [
        [compare_masks(some, some), compare_masks(empty, empty)],
        [compare_masks(some, empty), compare_masks(some, some)],
    ]
    table = as_segmentations(cases, ("val", "test"), agreements, STRUCTURES, unit="px")
    np.testing.assert_array_equal(table.dice, [[1, np.nan], [0, 1]])
    assert table.hd95[1, 0] == pytest.approx(math.hypot(8, 8))
    assert (table.patients, table.sites) == (("p1", None), ("s", None))
    assert table.select("test").cases == ("b.png",)
    with pytest.raises(DataError, match="no segmentations for the split 'train'"):
        table.select("train")


def lines_of(tmp_path, change=lambda text: text):
    path = tmp_path / "segmentation.csv"
    write_segmentations(path, segmentations([[0.5, 0.25], [0.75, np.nan]], patients=["p1", "p2"]))
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.75", "1.5", "line 4, column dice: 1.5 is not from 0 to 1"),
        ("0.75", "high", "line 4, column dice: 'high' is not a finite number"),
        ("0.75", "nan", "line 4, column dice: 'nan' is not a finite number"),
        ("0.75", "", "line 4, column dice: it is empty"),
        (",,,,0.0,0.0", ",0.5,,,0.0,0.0", "line 5, column dice: must be empty: the structure is neither there"),
        ("7.5", "-1", "line 3, column hd95: -1 is not"),
        (
            'case1,test,p2,,"right',
            'case1,test,p3,,"right',
            "line 5, column patient: 'p3', but 'p2' elsewhere in the case",
        ),
        ('right ""lung""",0.25', 'left, lung",0.25', "line 3, column structure: 'left, lung' of 'case0' appears twice"),
        ("2.5,mm,2.0", "2.5,cm,2.0", "line 2, column unit: 'cm' is neither mm nor px"),
        ("0.0,mm,2.0", "0.0,px,2.0", "line 5, column unit: 'px', but 'mm' elsewhere in the file"),
        ("nsd,", "nds,", "line 1, column nsd: it is missing"),
        ("nsd,", "dice,", "line 1, column dice: it appears 2 times"),
        ("0.75,", "0.75,,", "line 4, column 13: 13 cells instead of 12"),
    ],
)
def test_a_broken_table_is_refused_by_line_and_column(tmp_path, old, new, message):
    path = lines_of(tmp_path, lambda text: text.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        read_segmentations(path)
    assert message in str(error.value)


def test_a_missing_row_or_file_is_told(tmp_path):
    with pytest.raises(DataError, match="Cannot read the segmentations"):
        read_segmentations(tmp_path / "none.csv")
    path = lines_of(tmp_path, lambda text: "\n".join(text.splitlines()[:-1]))
    with pytest.raises(DataError, match="case 'case1': no row for right"):
        read_segmentations(path)


def test_rows_and_columns_may_come_in_any_order(tmp_path):
    path = lines_of(tmp_path)
    table = read_segmentations(path)
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([header, rows[0], rows[3], rows[1], rows[2]]), encoding="utf-8")
    np.testing.assert_array_equal(read_segmentations(path).dice, table.dice)


def test_a_table_that_does_not_fit_is_refused():
    good = segmentations([[0.5, 0.25]])
    with pytest.raises(DataError, match="must be empty"):
        segmentations([[0.5, 0.25]], volume_true=[[1.0, 0.0]]).__class__(
            **{**vars(good), "volume": np.zeros((1, 2)), "volume_true": np.zeros((1, 2))}
        )
    for change in ({"dice": np.zeros((2, 2))}, {"patients": ()}, {"structures": ("a", "a")}, {"unit": "cm"}):
        with pytest.raises(DataError, match="not valid"):
            Segmentations(**{**vars(good), **change})


TABLE = [[0.8, 0.4], [0.6, np.nan], [1.0, 0.0], [0.2, np.nan], [0.4, 0.5]]


def test_means_by_hand():
    found = evaluate_segmentation(segmentations(TABLE, patients=list("aabcd")), resamples=200, seed=1)
    left, right = found.structures.values()
    assert left.metrics["dice"].value == pytest.approx(0.6)
    assert right.metrics["dice"].value == pytest.approx(0.3)
    assert right.metrics["hd95"].value == pytest.approx(7)
    assert found.metrics["dice"].value == pytest.approx(0.45)
    assert found.metrics["nsd"].value == pytest.approx((2.2 / 5 + 0.41 / 3) / 2)
    assert (right.n, right.absent, found.n_patients) == (3, 2, 4)
    assert any("neither there nor predicted in 2 of 5" in note for note in found.notes)


def test_the_interval_is_that_of_patients_drawn_one_by_one():
    table = segmentations(TABLE, patients=list("aabcd"))
    found = evaluate_segmentation(table, resamples=300, seed=1, level=0.8)
    weights = np.concatenate(list(draw_weights(group_by_patient(table), 300, 1)))
    means = []
    for drawn in weights.astype(int):
        rows = np.repeat(np.arange(5), drawn)
        column = table.dice[rows, 1]
        means.append(np.nan if np.isnan(column).all() else np.nanmean(column))
    expected = found.structures[STRUCTURES[1]].metrics["dice"]
    low, high = np.nanquantile(means, [0.1, 0.9])
    assert (expected.low, expected.high) == (pytest.approx(low), pytest.approx(high))
    assert expected.undefined_share == pytest.approx(np.isnan(means).mean()) != 0


def test_missed_and_invented_structures_are_counted():
    good = segmentations([[0.9], [0.0], [0.0], [0.0], [0.9], [0.9]])
    shown, predicted = np.array([[1.0, 1, 1, 0, 1, 1], [1.0, 0, 0, 1, 1, 1]])[..., None]
    table = Segmentations(**{**vars(good), "volume": predicted, "volume_true": shown})
    result = evaluate_segmentation(table, resamples=20, seed=0)
    counts = result.structures[STRUCTURES[0]]
    assert (counts.n, counts.absent, counts.missed, counts.invented) == (6, 0, 2, 1)
    assert any("missed altogether in 2 of 6 cases, and predicted in 1" in note for note in result.notes)


def test_a_structure_that_is_nowhere_is_left_out(tmp_path):
    nowhere = [[0.8, np.nan], [0.6, np.nan]]
    found = evaluate_segmentation(segmentations(nowhere), resamples=50, seed=0)
    assert found.metrics["dice"].value == pytest.approx(0.7)
    assert found.structures[STRUCTURES[1]].metrics["dice"].value is None
    found.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert saved["task"] == "segmentation"
    assert saved["structures"][STRUCTURES[1]]["metrics"]["hd95"]["value"] is None
    nothing = evaluate_segmentation(segmentations([[np.nan], [np.nan]]), resamples=50, seed=0)
    assert nothing.metrics["dice"].value is None


def test_one_patient_has_no_interval():
    found = evaluate_segmentation(segmentations(TABLE, patients="aaaaa"), seed=0)
    assert (found.metrics["dice"].low, found.bootstrap.unit) == (None, "patient")
    assert any("one patient" in note for note in found.notes)


def test_the_printed_table_fits_80_columns():
    names = ("a structure with a very long name", "another structure with a long name")
    rng = np.random.default_rng(0)
    table = segmentations(rng.random((30, 2)), structures=names, hd95=rng.uniform(100, 1000, (30, 2)))
    rows = evaluate_segmentation(table, resamples=50, seed=0).table()
    assert len(rows) == 1 + 3 + 6
    assert all(len(f"{title:38}  {value}") <= 80 for title, value in rows)
    assert rows[1][0] == "Dice"
    assert rows[2][0] == "HD95 (mm)"
    assert rows[-1][0] == "NSD (2 mm), another structure…"


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="no case has a mask"):
        evaluate_segmentation(segmentations(TABLE).take([]), seed=0)
    with pytest.raises(ConfigError, match="resample"):
        evaluate_segmentation(segmentations(TABLE), seed=0, resamples=0)


BOOTSTRAP = Bootstrap(resamples=400, level=0.95, seed=3, unit="case")


def runs(quality, seeds=range(6)):
    """Runs over the same 40 cases, of which some are harder, and lack a structure."""
    hard = np.random.default_rng(0).uniform(0, 0.3, (40, 2))
    hard[np.random.default_rng(1).random((40, 2)) < 0.2] = np.nan
    noise = {seed: np.random.default_rng([seed, 5]).normal(0, 0.02, (40, 2)) for seed in seeds}
    return {seed: SegmentationRun(segmentations(np.clip(quality - hard + noise[seed], 0, 1))) for seed in seeds}


@pytest.mark.parametrize("metric", ["dice", "hd95", "nsd"])
def test_runs_are_compared_in_pairs(metric):
    better, worse = resample(runs(0.9), metric, BOOTSTRAP), resample(runs(0.85), metric, BOOTSTRAP)
    expected = [np.nanmean(run.table.numbers[metric], axis=0).mean() for run in runs(0.9).values()]
    np.testing.assert_allclose(better.values, expected)
    gap = difference(better, worse)
    assert (gap.estimate.value < 0) == (metric == "hd95")
    assert judge(gap, gap.p, metric=metric, margin=0.001) == "helps"
    assert judge(difference(worse, better), gap.p, metric=metric, margin=0.001) == "hurts"
    mean, paired = better.mean(), gap.estimate
    assert paired.high - paired.low < mean.high - mean.low
    few = resample({0: runs(0.99, seeds=[0])[0], 1: runs(0.5, seeds=[1])[1]}, metric, BOOTSTRAP).mean()
    assert few.low == 0.0
    assert few.high > 1.0 if metric == "hd95" else few.high == 1.0


def test_runs_have_the_interval_of_the_evaluation():
    run = runs(0.8, seeds=[0])[0]
    evaluated = evaluate_segmentation(run.table, resamples=400, seed=3).metrics["hd95"]
    compared = resample({0: run}, "hd95", BOOTSTRAP).mean()
    assert (compared.value, compared.low, compared.high) == (evaluated.value, evaluated.low, evaluated.high)


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match=r"no metric 'auc'\. There are: dice, hd95, nsd"):
        resample(runs(0.9), "auc", BOOTSTRAP)
    fewer = {**runs(0.9), 0: SegmentationRun(segmentations(TABLE))}
    with pytest.raises(DataError, match="different cases"):
        resample(fewer, "dice", BOOTSTRAP)

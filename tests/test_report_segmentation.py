"""Reports of segmentations, from files that are made up."""

import re
import shutil
from pathlib import PurePosixPath

import numpy as np
import pytest

from comparisons import write_comparison
from medtpp.errors import DataError
from medtpp.files import read_json, write_json
from medtpp.report import write_report
from reports import NASTY, Page
from segmented import evaluate_into, table_of, write_segmented_run


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return write_segmented_run(tmp_path / "run")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """Names of structures and cases that try to break out of the page."""
    table = table_of(structures=NASTY)
    object.__setattr__(table, "cases", (NASTY[0], *table.cases[1:]))
    return page(write_segmented_run(tmp_path_factory.mktemp("nasty") / "run", table))


def test_the_numbers_of_a_run(run):
    found = page(run)
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    for metrics in (evaluation["metrics"], *(one["metrics"] for one in evaluation["structures"].values())):
        assert (
            f"{metrics['dice']['value']:.3f} {metrics['dice']['low']:.3f} – {metrics['dice']['high']:.3f}" in found.text
        )
        assert f"{metrics['hd95']['value']:.2f} {metrics['hd95']['low']:.2f}" in found.text
        assert f"{metrics['nsd']['value']:.3f}" in found.text
    assert {"metrics", "cases", "overlays", "data", "learning", "tpp", "cost", "setup"} <= set(found.ids)
    assert not {"curves", "confusion", "calibration", "mistakes"} & set(found.ids)
    assert "36 × 56 × 40 voxels, spacing 1 × 1 × 1 mm" in found.text
    assert "1,000 target parameters and 7 of the decoder and head" in found.text
    assert "step 20, where it was highest (0.810)" in found.text
    assert "No patient is in more than one part." in found.text


def test_a_page_is_sound(nasty):
    assert sorted(nasty.ids) == sorted(set(nasty.ids))
    links = [value for _, given in nasty.elements for name, value in given.items() if name in ("src", "href")]
    assert [link[:40] for link in links if not link.startswith(("data:", "#"))] == []
    assert {given["href"][1:] for given in nasty.all("a")} <= set(nasty.ids)
    sections = [given["id"] for given in nasty.all("section")]
    assert [given["href"][1:] for given in nasty.all("a") if given["href"][1:] in sections] == sections
    assert all(given["alt"] for given in nasty.all("img"))
    assert len(nasty.all("script")) == 1
    assert all(nasty.text.count(name) >= 2 for name in NASTY)


def test_every_case_is_a_mark_that_tells_its_name(run):
    text = write_report(run).read_text(encoding="utf-8")
    table = table_of()
    marks = re.findall(r"<title>(scans/\d+\.nii\.gz), (organ|lesion): Dice (\d\.\d+)</title>", text)
    assert {(case, name) for case, name, _ in marks} == {
        (case, name)
        for row, case in enumerate(table.cases)
        for column, name in enumerate(table.structures)
        if not np.isnan(table.dice[row, column])
    }
    means = dict(zip(table.cases, np.nanmean(table.dice, axis=1), strict=True))
    order = [means[case] for case, *_ in marks]
    assert order == sorted(order)


def test_overlays(run):
    found = page(run)
    pictures = [given["alt"] for given in found.all("img") if "case," in given["alt"]]
    assert len(pictures) == 9
    assert pictures[0].startswith("Best case, axial slice of scans/")
    assert "The patient’s right is on the left" in found.text
    shutil.rmtree(run / "evaluation" / "overlays")
    assert "overlays" not in page(run).ids


def test_one_structure_in_few_cases(tmp_path):
    found = page(write_segmented_run(tmp_path / "run", table_of(1, structures=("lung",), patients=False)))
    assert "of “lung” agree" in found.text
    assert "mean over structures" not in found.text
    assert "patients unknown" in found.text
    assert len([given for given in found.all("img") if "Best case" in given["alt"]]) == 3


def test_nothing_there_and_nothing_predicted(tmp_path):
    table = table_of(2, structures=("lesion",))
    empty = {name: np.full((2, 1), np.nan) for name in ("dice", "hd95", "nsd")}
    for name, values in (empty | {"volume": np.zeros((2, 1)), "volume_true": np.zeros((2, 1))}).items():
        object.__setattr__(table, name, values)
    found = page(write_segmented_run(tmp_path / "run", table))
    assert "the metrics are undefined" in found.text
    assert "cases" not in found.ids


def test_more_cases_than_can_be_drawn(run):
    evaluate_into(run, table_of(900, structures=("organ",)))
    found = page(run)
    assert "400 of 900 cases are drawn" in found.text
    assert (run / "report.html").stat().st_size < 3_000_000


NEEDED = ("evaluation/evaluation.json", "evaluation/segmentation.csv", "evaluation/overlays/overlays.json")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'[{"kind": "best"}]', b"a,b\n1,2\n"])
def test_a_broken_file_is_named(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(PurePosixPath(name).name)):
        write_report(run)


def test_files_of_two_evaluations(run):
    before = read_json(run / "evaluation" / "evaluation.json")
    evaluate_into(run, table_of(5))
    write_json(run / "evaluation" / "evaluation.json", before)
    with pytest.raises(DataError, match="different evaluations"):
        write_report(run)


@pytest.mark.parametrize("image", ["../../../tpp/preview.png", "/etc/hostname", "none.png"])
def test_a_picture_is_in_its_folder(run, image):
    path = run / "evaluation" / "overlays" / "overlays.json"
    entries = read_json(path)
    entries[0]["pictures"][0]["image"] = image
    write_json(path, entries)
    with pytest.raises(DataError, match=r"outside its folder|cannot be read"):
        write_report(run)


def test_a_comparison_in_millimetres(tmp_path):
    changes = {"metric": "hd95", "metric_title": "HD95", "metric_unit": "mm", "higher_is_better": False, "margin": 0.5}
    found = page(write_comparison(tmp_path, labels=(5, "all"), **changes))
    assert "HD95 (mm), averaged over seeds" in found.text
    assert "±0.5 mm" in found.text
    assert "Lower is better" in found.text
    assert "cases with masks" in found.text

"""Recipes whose masks or images are converted: contours on the grid of their scan, HDF5."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

import downloads
from dicoms import SECRETS
from medtpp.data.case import Case
from medtpp.data.geometry import Geometry, same_grid
from medtpp.data.recipes._contours import fill_contours
from medtpp.data.volumes import read_mask, read_volume
from medtpp.errors import DataError
from runs import done, refused
from test_recipes import checked, prepared, table

H5PY = importlib.util.find_spec("h5py") is not None
EXPECTED = np.zeros((10, 12, 14), np.uint8)
EXPECTED[3:5, 3:7, 4:10] = 1


def masks(out):
    """Scan and mask of each case, read as a run reads them."""
    for row in table(out):
        volume = read_volume(Case("case", out / row["image"]))
        yield row, volume, read_mask(out / row["mask"], volume.geometry)


@pytest.mark.parametrize("rtstruct", [False, True])
def test_contours_are_filled_on_the_grid_of_the_t1_scan(tmp_path, rtstruct):
    source = downloads.vs(tmp_path / "download", rtstruct=rtstruct, names=("Cochlea", "TV", "tv"))
    for file in (source / "contours").rglob("*.json"):
        assert file.is_file()
    prepared("vs", source, tmp_path / "out")
    moved = np.roll(EXPECTED, (1, 1), (1, 2))  # TV is the second structure, drawn a pixel further on
    for row, volume, mask in masks(tmp_path / "out"):
        assert "5.000000-A-1" in row["image"]
        assert volume.array.shape[1:] == mask.shape
        np.testing.assert_array_equal(mask, moved)
    checked("vs", tmp_path / "out")


def test_the_layout_of_the_data_sets_own_code(tmp_path):
    """Folders vs_gk_1_t1 with scan, contours and radiotherapy files together."""
    source = downloads.vs(tmp_path / "download")
    for number in range(1, 7):
        study = next((source / "Vestibular-Schwannoma-SEG" / f"VS-SEG-{number:03}").iterdir())
        for place, kind in (("5.000000-A-1", "t1"), ("3.000000-B-2", "t2")):
            target = source / "contours" / f"vs_gk_{number}_{kind}"
            target.mkdir(exist_ok=True)
            for index, file in enumerate(sorted((study / place).iterdir())):
                file.rename(target / f"IMG{index:010}.dcm")
    (source / "contours").rename(tmp_path / "merged")
    prepared("vs", tmp_path / "merged", tmp_path / "out")
    rows = [*masks(tmp_path / "out")]
    assert [row["patient"] for row, *_ in rows] == [f"VS-SEG-{number:03}" for number in range(1, 7)]
    assert all((mask == EXPECTED).all() for *_, mask in rows)


def test_contours_that_cannot_be_used_are_told(tmp_path):
    source = downloads.vs(tmp_path / "download")
    first, second, third = (source / "contours" / f"vs_gk_{number}_t1" / "contours.json" for number in (1, 2, 3))
    first.write_text('[{"structure_name": "Cochlea", "LPS_contour_points": [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]}]')
    second.write_text('[{"structure_name": "TV", "LPS_contour_points": [[[900, 0, 30], [905, 0, 30], [905, 9, 30]]]}]')
    third.write_text("{}")
    said = refused("data", "prepare", "vs", "--source", source, "--out", tmp_path / "out")
    # What is known to be missing comes first; conversion follows once that is allowed.
    assert "found 6 of 242 patients; missing: VS-SEG-007" in said
    text = done("data", "prepare", "vs", "--source", source, "--out", tmp_path / "out", "--allow-incomplete").text
    assert "none of its 1 structures is a tumour" in text
    assert "a contour lies outside the scan" in text
    assert "vs_gk_3_t1" in text
    assert len(table(tmp_path / "out")) == 3
    assert not any(secret in text for secret in SECRETS)


def test_a_contour_across_slices_is_refused():
    geometry = Geometry((4, 6, 6), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((0, 0, 1), (0, 1, 0), (1, 0, 0)))
    triangle = np.array([[1.0, 1, 0], [4, 1, 0], [4, 4, 0]])
    assert fill_contours([triangle], geometry)[0].sum() > 0
    assert fill_contours([triangle[:2]], geometry).sum() == 0
    with pytest.raises(DataError, match="across slices"):
        fill_contours([triangle + np.array([[0, 0, 0], [0, 0, 2], [0, 0, 4]])], geometry)
    outside = triangle - [0, 0, 20]
    with pytest.raises(DataError, match="outside the scan"):
        fill_contours([outside], geometry)


def test_a_contour_on_an_oblique_scan():
    rotation = np.array([[0, 0, 1.0], [0.8, 0.6, 0], [-0.6, 0.8, 0]])
    geometry = Geometry((5, 9, 8), (3.0, 0.5, 2.0), (4.0, -7.0, 1.0), tuple(map(tuple, rotation.tolist())))
    corners = np.array([[2, 1.5, 2.5], [2, 5.5, 2.5], [2, 5.5, 6.5], [2, 1.5, 6.5]])
    points = geometry.origin + (corners * geometry.spacing) @ rotation
    expected = np.zeros(geometry.shape, np.uint8)
    expected[2, 2:6, 3:7] = 1
    np.testing.assert_array_equal(fill_contours([points], geometry), expected)


class Arrays(dict):
    """What stands in for an HDF5 file where h5py is not installed: an archive of NumPy arrays of the same names."""

    def __init__(self, path, mode):
        try:
            with np.load(path) as content:
                super().__init__({name: {(): content[name]} for name in content})
        except ValueError as error:
            raise OSError("no HDF5") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def write_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not H5PY:
        with path.open("wb") as stream:
            np.savez(stream, **arrays)
        return
    with importlib.import_module("h5py").File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip")


@pytest.fixture
def h5(monkeypatch):
    if not H5PY:
        monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=Arrays))


def cropped(folder, cases=5):
    """The copies in wide use: x, y, z, standardised, with lists of the split beside them."""
    for number in range(cases):
        values = np.random.default_rng(number).normal(size=(14, 12, 8)).astype(np.float32)
        atrium = downloads.square(1, values.shape)
        write_h5(folder / "2018LA_Seg_Training Set" / f"LA{number}" / "mri_norm2.h5", image=values, label=atrium)
    (folder / "train.list").write_text("LA4\nLA0\nLA2\nLA1\n")
    (folder / "test.list").write_text("LA3\n")
    return folder


def test_hdf5_becomes_nifti_on_one_grid(tmp_path, h5):
    prepared("la2018", cropped(tmp_path / "download"), tmp_path / "out")
    assert {row["patient"]: row["split"] for row in table(tmp_path / "out")} == {
        **dict.fromkeys(("LA0", "LA1", "LA2", "LA4"), "train"),
        "LA3": "test",
    }
    for number, (_, volume, mask) in enumerate(masks(tmp_path / "out")):
        values = np.random.default_rng(number).normal(size=(14, 12, 8)).astype(np.float32)
        np.testing.assert_array_equal(volume.array[0], values.T)
        np.testing.assert_array_equal(mask, 255 * downloads.square(1, values.shape).T)
        assert volume.geometry.spacing == (0.625,) * 3
    checked("la2018", tmp_path / "out")


def test_hdf5_that_cannot_be_used_is_told(tmp_path, h5):
    source = cropped(tmp_path / "download")
    root = source / "2018LA_Seg_Training Set"
    (root / "LA0" / "mri_norm2.h5").write_bytes(b"nothing")
    write_h5(root / "LA1" / "mri_norm2.h5", image=np.zeros((4, 4, 4), np.float32))
    write_h5(root / "LA2" / "mri_norm2.h5", image=np.zeros((4, 4, 4)), label=np.zeros((4, 4, 5)))
    (source / "train.list").write_text("LA0 LA1 LA2")
    text = prepared("la2018", source, tmp_path / "out").text
    assert text.count("has no arrays image and label") == 2
    assert "(4, 4, 4) and (4, 4, 5)" in text
    assert "it is in neither train.list nor test.list" in text
    assert [row["patient"] for row in table(tmp_path / "out")] == ["LA3"]


def test_without_h5py_it_says_what_to_install(tmp_path, monkeypatch):
    source = cropped(tmp_path / "download")
    monkeypatch.setitem(sys.modules, "h5py", None)
    said = refused("data", "prepare", "la2018", "--source", source, "--out", tmp_path / "out")
    assert "pip install 'medtpp[h5]'" in said


def test_converted_grids_are_those_of_the_scans(tmp_path):
    prepared("vs", downloads.vs(tmp_path / "download"), tmp_path / "out")
    for row, volume, _ in masks(tmp_path / "out"):
        written = read_volume(Case("mask", tmp_path / "out" / row["mask"]))
        assert same_grid(written.geometry, volume.geometry)

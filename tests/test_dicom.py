"""DICOM series: any order, name and nesting; what fills no grid is refused, without a word of the headers."""

import shutil

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dicoms import SECRETS, SHAPE, VALUES, dataset, faults, read, read_one, save, slices
from medtpp.data.case import Case
from medtpp.data.volumes import find_series, read_volume
from medtpp.errors import DataError


@settings(max_examples=15, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    order=st.permutations(range(len(VALUES))),
    step=st.floats(0.2, 9),
)
def test_slices_are_ordered_in_space(tmp_path_factory, angles, order, step):
    folder = tmp_path_factory.mktemp("series")
    rotation = Rotation.from_euler("xyz", angles, degrees=True)
    names = [f"{'abc'[index % 3]}/{index}" for index in order]
    save(folder, slices(rotation=rotation, step=step), names)
    (series,) = find_series(folder)
    assert series.size == SHAPE
    assert series.stacked
    assert not series.problems
    volume = read([folder / name for name in sorted(names)])
    assert np.array_equal(volume.array[0], VALUES.astype(np.int32) - 1024)
    assert volume.array.dtype == np.int16
    assert volume.units == "HU"
    axes = rotation.as_matrix().T
    geometry = volume.geometry
    np.testing.assert_allclose(geometry.spacing, (step, 0.8, 0.6), rtol=1e-4)
    np.testing.assert_allclose(geometry.directions, axes[::-1], atol=1e-6)  # normal, from row to row, column to column
    np.testing.assert_allclose(geometry.origin, (-100, -50, 30))
    assert [path.relative_to(folder).as_posix() for path in series.files] == names


def test_geometry_is_that_of_itk(tmp_path):
    import SimpleITK as sitk  # noqa: N813

    paths = save(tmp_path, slices(rotation=Rotation.from_euler("xyz", [20, -35, 50], degrees=True)))
    volume = read(paths)
    itk = sitk.ReadImage([str(path) for path in find_series(tmp_path)[0].files])
    assert np.array_equal(sitk.GetArrayFromImage(itk), volume.array[0])
    np.testing.assert_allclose(volume.geometry.spacing[::-1], itk.GetSpacing(), atol=1e-5)
    np.testing.assert_allclose(volume.geometry.origin, itk.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(np.array(volume.geometry.directions)[::-1].T.ravel(), itk.GetDirection(), atol=1e-6)


def test_missing_slices_are_placed(tmp_path):
    images = slices(np.tile(VALUES, (2, 1, 1)))
    save(tmp_path, [image for index, image in enumerate(images) if index not in (3, 6, 7)], [f"s{i}" for i in range(7)])
    found = faults(tmp_path)
    assert list(found) == ["slices-missing"]
    assert "About 3 slices are missing (slices are 2.5 mm apart)" in found["slices-missing"]
    assert "s2 at 35.00 mm and s3 at 40.00 mm" in found["slices-missing"]
    assert "s4 at 42.50 mm and s5 at 50.00 mm" in found["slices-missing"]


@pytest.mark.parametrize("first", [False, True])
def test_slices_that_are_not_parallel_are_placed(tmp_path, first):
    """Along the normal of the others, also where the odd slice is the first file."""
    images = slices(np.tile(VALUES, (2, 1, 1)))
    turned = Rotation.from_euler("x", 20, degrees=True).as_matrix().T
    odd = (0, 6) if first else (3, 6)
    for index in odd:
        images[index].ImageOrientationPatient = [*map(float, turned[0]), *map(float, turned[1])]
    save(tmp_path, images, [f"s{index}" for index in range(10)])
    text = faults(tmp_path)["slices-not-parallel"]
    places = {f"s{index} at {30 + 2.5 * index:.2f} mm" for index in odd}
    assert text.startswith("2 of 10 slices are not parallel to the others: ")
    assert set(text.split(": ")[1].split(". A volume")[0].split(", ")) == places
    assert "take out the odd ones" in text


def test_doubled_slices_are_named(tmp_path):
    images = slices()
    save(tmp_path, [*images, images[2]], ["a", "b", "c", "d", "e", "copy/c"])
    found = faults(tmp_path)
    assert list(found) == ["slices-doubled"]
    assert "c at 35.00 mm and copy/c at 35.00 mm" in found["slices-doubled"] or (
        "copy/c at 35.00 mm and c at 35.00 mm" in found["slices-doubled"]
    )


def test_uneven_slices(tmp_path):
    images = slices()
    images[4].ImagePositionPatient = [-100.0, -50.0, 40.6]  # 10.0 would be even
    save(tmp_path, images)
    found = faults(tmp_path)
    assert list(found) == ["slices-uneven"]
    assert "2.5 mm mostly, 3.1 to 3.1 mm" in found["slices-uneven"]


def test_a_tilted_gantry_and_a_moved_table(tmp_path):
    tilted = slices(step=5.0)
    for index, image in enumerate(tilted):  # the slices stay parallel and are shifted along y
        image.ImagePositionPatient[1] = float(-50 + index * 5 * np.tan(np.radians(12)))
    save(tmp_path / "tilt", tilted)
    found = faults(tmp_path / "tilt")
    assert list(found) == ["slices-sheared"]
    assert "12.0 degrees" in found["slices-sheared"]
    moved = slices()
    for image in moved[3:]:
        image.ImagePositionPatient[0] = -80.0
    save(tmp_path / "move", moved, list("abcde"))
    found = faults(tmp_path / "move")
    assert list(found) == ["slices-shifted"]
    assert "between c and d at 37.50 mm" in found["slices-shifted"]


def test_slices_that_differ(tmp_path):
    images = slices()
    images[1] = slices(np.zeros((5, 4, 4), np.uint16))[1]
    images[3].PixelSpacing = [0.8, 0.7]
    turned = Rotation.from_euler("x", 3, degrees=True).as_matrix().T
    images[4].ImageOrientationPatient = [*map(float, turned[0]), *map(float, turned[1])]
    save(tmp_path, images, list("abcde"))
    found = faults(tmp_path)
    assert set(found) == {"slices-of-different-size", "slices-of-different-spacing", "slices-not-parallel"}
    assert (
        "4 of 6 x 8 (a, c, d, e); 1 of 4 x 4 (b)".replace(", e)", " and 1 more)") in found["slices-of-different-size"]
    )
    assert "1 of 0.8 x 0.7 mm (d)" in found["slices-of-different-spacing"]
    assert "1 of 5 slices is not parallel to the others: e at 40.00 mm." in found["slices-not-parallel"]


def test_stacks_of_one_series(tmp_path):
    """Views and acquisitions are told apart; numbers that change with each slice are not taken for acquisitions."""
    scout = slices(VALUES[:1], rotation=Rotation.from_euler("x", 90, degrees=True), ImageType=["ORIGINAL", "LOCALIZER"])
    phases = [image for number in (1, 2) for image in slices(AcquisitionNumber=str(number))]
    save(tmp_path, [*scout, *phases], [f"{index:02}" for index in range(11)])
    found = find_series(tmp_path)
    assert sorted(len(series.files) for series in found) == [1, 5, 5]
    assert [problem.code for series in found for problem in series.problems] == ["localizer"]
    assert {tuple(path.name for path in series.files) for series in found if len(series.files) == 5} == {
        ("01", "02", "03", "04", "05"),
        ("06", "07", "08", "09", "10"),
    }
    told = [series.summary() for series in found]
    assert sorted(told) == ["CT, 1 slice of 6 x 8", "CT, 5 slices of 6 x 8", "CT, 5 slices of 6 x 8"]
    numbered = [*slices(), slices()[2]]
    for index, image in enumerate(numbered):
        image.AcquisitionNumber = str(index)
    save(tmp_path / "numbered", numbered, list("abcdef"))
    assert list(faults(tmp_path / "numbered")) == ["slices-doubled"]


def test_mixed_folders(tmp_path):
    """Nesting, no suffixes, DICOMDIR, reports, other files, two patients, radiographs in one series."""
    save(tmp_path / "P1/ST0/SE0", slices(), [f"IM{index}" for index in range(5)])
    other = slices(SeriesInstanceUID="1.2.5", PatientID="PAT-4712", Modality="MR")
    save(tmp_path / "P2", other, [f"{index}.ima" for index in range(5)])
    views = [dataset(VALUES[0], Modality="DX"), dataset(VALUES[1], Modality="DX")]
    save(tmp_path / "xr", views, ["pa.dcm", "lateral.dcm"])
    report = dataset(VALUES[0], Modality="SR")
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    save(tmp_path, [report], ["report.dcm"])
    directory = dataset(VALUES[0])
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    del directory.SOPClassUID
    pydicom.dcmwrite(tmp_path / "DICOMDIR", directory)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "LICENSE").write_text("nor this")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "P2/0.ima").read_bytes()[:150])
    found = find_series(tmp_path)
    names = [(series.image.relative_to(tmp_path).as_posix(), series.summary(), series.stacked) for series in found]
    assert names == [
        ("P1/ST0/SE0/IM0", "CT, 5 slices of 6 x 8", True),
        ("P2/0.ima", "MR, 5 slices of 6 x 8", True),
        ("cut.dcm", "unreadable (cut.dcm)", False),
        ("xr/lateral.dcm", "DX, 6 x 8", False),
        ("xr/pa.dcm", "DX, 6 x 8", False),
    ]
    assert found[0].patient == found[3].patient != found[1].patient
    assert [problem.code for series in found for problem in series.problems] == ["unreadable-dicom"]
    assert not any(secret in repr(found) for secret in SECRETS)
    assert read_volume(Case("case", tmp_path / "P1")).geometry.shape == SHAPE
    with pytest.raises(DataError, match="holds 5 series") as caught:
        read_volume(Case("case", tmp_path))
    assert "P2/0.ima: MR, 5 slices of 6 x 8" in str(caught.value)
    with pytest.raises(DataError, match="of 2 series"):
        read([tmp_path / "P1/ST0/SE0/IM0", tmp_path / "P2/0.ima"])
    with pytest.raises(DataError, match="without an image"):
        read_one(tmp_path / "report.dcm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM images"):
        read_volume(Case("case", tmp_path / "empty"))


def test_broken_slices_are_all_named(tmp_path):
    paths = save(tmp_path, slices(), list("abcde"))
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-20])  # its header is whole, its pixels are not
    paths[3].write_bytes(paths[3].read_bytes()[: -12 - VALUES[0].nbytes])
    with pytest.raises(DataError) as caught:
        read(paths)
    assert "2 of 5 slices cannot be read" in str(caught.value)
    assert "b has pixels that cannot be decoded (Explicit VR Little Endian)" in str(caught.value)
    assert "  - d " in str(caught.value)
    paths[0].write_bytes(b"")
    paths[2].write_bytes(b"x" * 500)
    paths[4].unlink()
    with pytest.raises(DataError) as caught:
        read(paths)
    for line in ("a is empty (0 bytes)", "c is no DICOM file", "e cannot be opened"):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ImagePositionPatient", ["1", "2", "Doe^Jane"]),
        ("ImageOrientationPatient", list("100100")),
        ("PixelSpacing", ["0", "1"]),
        ("PixelSpacing", "1"),
        ("RescaleSlope", "0"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_broken_headers_are_told_without_their_text(tmp_path, name, value, caplog, capfd):
    images = slices()
    with pydicom.config.disable_value_validation():
        element = pydicom.DataElement(name, "LO", value)  # as another value representation, so that any text passes
        images[2][name] = element
        paths = save(tmp_path, images, list("abcde"))
        with pytest.raises(DataError, match="broken DICOM header") as caught:
            read(paths)
    find_series(tmp_path)
    said = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert " - c " in str(caught.value)
    assert not any(secret in said for secret in SECRETS)


def test_ct_without_position_is_not_stacked(tmp_path):
    save(tmp_path, [*slices(), dataset(VALUES[0])], list("abcdef"))
    found = find_series(tmp_path)
    assert [series.summary() for series in found] == ["CT, 5 slices of 6 x 8", "CT, 6 x 8"]
    assert [problem.code for series in found for problem in series.problems] == ["no-position"]
    with pytest.raises(DataError, match="f tells no position"):
        read([tmp_path / name for name in "abcdef"])


def test_a_copied_study_is_doubled(tmp_path):
    save(tmp_path / "a", slices())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert list(faults(tmp_path)) == ["slices-doubled"]

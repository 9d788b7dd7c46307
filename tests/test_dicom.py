"""DICOM: series in any order, name and nesting; what fills no grid is refused; values, compression; no header text."""

import io
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from medtpp.data.case import Case
from medtpp.data.volumes import find_series, read_mask, read_volume, several_series, volume_fingerprint
from medtpp.errors import DataError

SECRETS = ("Doe^Jane", "PAT-4711", "19491231", "Thorax mit Befund", "Mustermann", "987654")
SHAPE = (5, 6, 8)
VALUES = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.uint16)


def dataset(pixels, **elements):
    """A CT slice of random numbers, with a header full of names and dates."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.PatientName, image.PatientID, image.PatientBirthDate = SECRETS[:3]
    image.StudyDate, image.AccessionNumber = SECRETS[2], SECRETS[5]
    image.SeriesDescription, image.ReferringPhysicianName = SECRETS[3], SECRETS[4]
    image.Modality = "CT"
    image.SeriesInstanceUID = image.StudyInstanceUID = "1.2.3.987654.1"
    image.SamplesPerPixel = pixels.shape[-1] if pixels.ndim == 3 and pixels.shape[-1] == 3 else 1
    image.PhotometricInterpretation = "RGB" if image.SamplesPerPixel == 3 else "MONOCHROME2"
    if image.SamplesPerPixel == 3:
        image.PlanarConfiguration = 0
    image.Rows, image.Columns = pixels.shape[-3:-1] if image.SamplesPerPixel == 3 else pixels.shape[-2:]
    image.BitsAllocated = image.BitsStored = 8 * pixels.dtype.itemsize
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(image, name, value)
        if value is None:
            delattr(image, name)
    return image


def slices(values=VALUES, *, step=2.5, rotation=None, spacing=(0.8, 0.6), origin=(-100.0, -50.0, 30.0), **elements):
    """One dataset per slice, in order, placed by a rotation of the usual axial orientation."""
    axes = np.eye(3) if rotation is None else rotation.as_matrix().T  # rows, columns, normal
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, **elements}
    return [
        dataset(
            pixels,
            ImagePositionPatient=[float(round(value, 6)) for value in origin + index * step * axes[2]],
            ImageOrientationPatient=[float(round(value, 8)) for value in (*axes[0], *axes[1])],
            PixelSpacing=list(spacing),
            SliceThickness=1,
            InstanceNumber=str(len(values) - index),
            **elements,
        )
        for index, pixels in enumerate(values)
    ]


def save(folder, images, names=None):
    """Write datasets under names whose order is not that of space."""
    names = names or [f"{(index * 7) % 11:02}.dcm" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(folder / name, image, enforce_file_format=True)
    return [folder / name for name in names]


def read(paths):
    return read_volume(Case("case", paths[0], files=tuple(paths)))


def read_one(path, image=None):
    if image is not None:
        save(path.parent, [image], [path.name])
    return read_volume(Case("case", path))


def faults(folder):
    """The problems of the only series in a folder, which reading reports as well."""
    (series,) = find_series(folder)
    errors = [problem for problem in series.problems if problem.severity == "error"]
    with pytest.raises(DataError) as caught:
        read(list(series.files))
    for problem in errors:
        assert problem.message in str(caught.value)
    assert not any(secret in str(caught.value) + repr(series) for secret in SECRETS)
    return {problem.code: problem.message for problem in errors}


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
    assert "1 of 5 slices are not parallel to the others: e." in found["slices-not-parallel"]


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
    (warning,) = several_series(tmp_path, found)
    assert "holds 3 series: CT, 1 slice of 6 x 8, CT, 5 slices of 6 x 8, CT, 5 slices of 6 x 8" in warning.message
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
    assert several_series(tmp_path, found) == []
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
    for line in ("a the file is empty", "c is no DICOM file", "e cannot be opened"):
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


def test_rescale_by_slice(tmp_path):
    images = slices(Modality="PT")
    for index, image in enumerate(images):
        image.RescaleSlope, image.RescaleIntercept = 0.5 + index, 0
    volume = read(save(tmp_path, images))
    assert volume.array.dtype == np.float32
    assert volume.units == "none"
    assert np.allclose(volume.array[0], VALUES * (0.5 + np.arange(5)).reshape(5, 1, 1))


def test_values_beyond_16_bits_become_float(tmp_path):
    values = VALUES.copy()
    values[3, 0, 0] = 65000
    volume = read(save(tmp_path, slices(values)))
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array[0], values.astype(np.float32) - 1024)


def test_padding_is_air_in_ct(tmp_path):
    values = VALUES.astype(np.int16)
    values[:, 0] = -2000
    images = slices(values)
    for image in images:
        image.add_new("PixelPaddingValue", "US", 65536 - 2000)  # the unsigned number of the same bits
    array = read(save(tmp_path, images)).array[0]
    assert (array[:, 0] == -1024).all()
    assert np.array_equal(array[:, 1:], values[:, 1:] - 1024)


def test_padding_of_unsigned_values_without_an_intercept(tmp_path):
    image = slices(VALUES[:1] + np.uint16(1), RescaleIntercept=0)[0]
    image.add_new("PixelPaddingValue", "US", int(VALUES[0, 2, 3]) + 1)
    assert read_one(tmp_path / "a.dcm", image).array[0, 2, 3] == -1024


def test_padding_is_no_signal_in_other_scans(tmp_path):
    values = VALUES.astype(np.int16) + 5
    values[:, 0] = -32768
    images = slices(values, Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    for image in images:
        image.add_new("PixelPaddingValue", "SS", -32768)
    array = read(save(tmp_path, images)).array[0]
    assert (array[:, 0] == 0).all()
    assert np.array_equal(array[:, 1:], values[:, 1:])


JPEG_LOSSLESS_BY_GDCM = """
import gdcm, sys
for path in sys.argv[1:]:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(path)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(path)
    assert writer.Write()
"""


def compress(images, syntax):
    for image, pixels in zip(images, VALUES, strict=True):
        if syntax == JPEG2000Lossless:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
            image.PixelData = encapsulate([stream.getvalue()])
            image["PixelData"].is_undefined_length = True
            image.file_meta.TransferSyntaxUID = syntax
        elif syntax != JPEGLosslessSV1:
            image.compress(syntax)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, RLELossless, JPEGLSLossless])
def test_compressed_series(tmp_path, syntax):
    images = slices()
    compress(images, syntax)
    paths = save(tmp_path, images)
    if (
        syntax == JPEGLosslessSV1
    ):  # which only GDCM writes; in a process of its own, as its bindings are not safe to mix
        subprocess.run([sys.executable, "-c", JPEG_LOSSLESS_BY_GDCM, *map(str, paths)], check=True)
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(read(paths).array[0], VALUES.astype(np.int32) - 1024)
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[:-40])
    with pytest.raises(DataError, match=paths[2].name):
        read(paths)


def test_multi_frame_scans(tmp_path):
    def group(position, **shared):
        frame = Dataset()
        frame.PlanePositionSequence = Sequence([Dataset()])
        frame.PlanePositionSequence[0].ImagePositionPatient = position
        frame.PixelValueTransformationSequence = Sequence([Dataset()])
        frame.PixelValueTransformationSequence[0].RescaleSlope = 1
        frame.PixelValueTransformationSequence[0].RescaleIntercept = -1000
        frame.PixelValueTransformationSequence[0].RescaleType = "HU"
        return frame

    order = [3, 0, 4, 1, 2]
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([Dataset()]), Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.6]
    image = dataset(VALUES[order], NumberOfFrames=5)
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    image.PerFrameFunctionalGroupsSequence = Sequence([group([0, 0, 3.0 * index]) for index in order])
    volume = read_one(tmp_path / "enhanced.dcm", image)
    assert np.array_equal(volume.array[0], VALUES.astype(np.int32) - 1000)
    assert volume.geometry.spacing == (3, 0.8, 0.6)
    assert volume.units == "HU"
    (series,) = find_series(tmp_path)
    assert (series.size, series.stacked, series.problems) == (SHAPE, False, ())
    image.compress(RLELossless)
    again = read_one(tmp_path / "enhanced.dcm", image)
    assert volume_fingerprint(again) == volume_fingerprint(volume)
    image.PerFrameFunctionalGroupsSequence[0] = group([0, 0, 3.0])
    with pytest.raises(DataError, match=r"slices lie where another one lies: enhanced\.dcm \(frame 1\)"):
        read_one(tmp_path / "enhanced.dcm", image)


def test_films_are_refused(tmp_path):
    image = dataset(VALUES.astype(np.uint8), Modality="US", NumberOfFrames=5)
    with pytest.raises(DataError, match="5 frames without positions"):
        read_one(tmp_path / "loop.dcm", image)
    assert [problem.code for problem in find_series(tmp_path)[0].problems] == ["film"]


def test_radiographs(tmp_path):
    pixels = (VALUES[0] % 1024).astype(np.uint16)
    image = dataset(pixels, Modality="DX", BitsStored=12, HighBit=11, ImagerPixelSpacing=[0.2, 0.1])
    plain = read_one(tmp_path / "x.dcm", image)
    assert np.array_equal(plain.array, pixels[None])
    assert plain.geometry.spacing == (0.2, 0.1)
    assert plain.units == "none"
    image.PhotometricInterpretation = "MONOCHROME1"
    inverted = read_one(tmp_path / "x.dcm", image)
    assert np.array_equal(inverted.array, 4095 - pixels[None].astype(int))
    image.WindowCenter, image.WindowWidth = 500, 200
    windowed = read_one(tmp_path / "x.dcm", image).array[0]
    assert (windowed[pixels > 600] == 0).all()
    assert (windowed[pixels < 400] == 4095).all()
    image.add_new("PixelPaddingValue", "US", int(pixels[2, 3]))
    assert read_one(tmp_path / "x.dcm", image).array[0, 2, 3] == windowed.min()


def test_windows_and_monochrome1_do_not_touch_measured_values(tmp_path):
    images = slices(WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read(save(tmp_path, images)).array[0], VALUES.astype(np.int32) - 1024)


def test_colour_and_palette(tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    volume = read_one(tmp_path / "c.dcm", dataset(colour, Modality="US"))
    assert np.array_equal(volume.array, np.moveaxis(colour, -1, 0))
    assert volume.units == "levels"
    grey = np.repeat(colour[..., :1], 3, axis=-1)
    assert np.array_equal(read_one(tmp_path / "c.dcm", dataset(grey, Modality="US")).array, colour[None, ..., 0])
    image = dataset((VALUES[0] % 4).astype(np.uint8), Modality="US", PhotometricInterpretation="PALETTE COLOR")
    tables = np.array([[0, 80, 160, 240], [1, 81, 161, 241], [2, 82, 162, 242]], np.uint8)
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(image, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 8])
        setattr(image, f"{name}PaletteColorLookupTableData", table.tobytes())
    assert np.array_equal(read_one(tmp_path / "p.dcm", image).array, tables[:, VALUES[0] % 4])


def test_single_files(tmp_path):
    """A slice on its own is an image; a series of one slice is a volume; old files have no preamble."""
    (image,) = slices(VALUES[:1])
    paths = save(tmp_path, [image], ["one"])
    assert read_one(paths[0]).array.shape == (1, 6, 8)
    assert read_one(paths[0]).units == "HU"
    volume = read(paths)
    assert volume.array.shape == (1, 1, 6, 8)
    assert volume.geometry.spacing == (1, 0.8, 0.6)  # the thickness stands for the distance
    image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "old", image, implicit_vr=True, little_endian=True)
    (tmp_path / "old").write_bytes(image_without_preamble(tmp_path / "old"))
    assert np.array_equal(read_one(tmp_path / "old").array, volume.array[0])
    with pytest.raises(DataError, match="no DICOM segmentation"):
        read_mask(paths[0], volume.geometry)


def segmentation(images, labels, kind="BINARY"):
    """A SEG object by highdicom of labels (D, H, W) or, overlapping, (D, H, W, segments)."""
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.sr.coding import CodedConcept

    organ = CodedConcept("123037004", "SCT", "Anatomical structure")
    algorithm = AlgorithmIdentificationSequence("a", CodedConcept("113076", "DCM", "Segmentation"), "1")
    count = labels.shape[-1] if labels.ndim == 4 else int(labels.max())
    return Segmentation(
        source_images=images,
        pixel_array=labels,
        segmentation_type=kind,
        segment_descriptions=[
            SegmentDescription(number, f"s{number}", organ, organ, "AUTOMATIC", algorithm)
            for number in range(1, count + 1)
        ],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    )


def test_dicom_segmentations(tmp_path):
    """Empty frames are left out of the file; the image may run the other way."""
    whole = np.zeros(SHAPE, np.uint8)
    whole[1, 2:4, 3:6], whole[3, 0, 0] = 1, 2
    tilt = Rotation.from_euler("xyz", [10, 20, 30], degrees=True)
    elements = {"FrameOfReferenceUID": "1.2.9", "StudyID": "", "StudyTime": "", "AccessionNumber": "", "PatientSex": ""}
    images = slices(rotation=tilt, **elements)
    volume = read(save(tmp_path / "ct", images))
    for kind in ("BINARY", "LABELMAP"):
        path = tmp_path / "seg.dcm"
        segmentation(images, whole, kind).save_as(path)
        mask = read_mask(path, volume.geometry)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, whole)
        assert find_series(tmp_path)[0].summary() == "CT, 5 slices of 6 x 8"
        assert len(find_series(tmp_path)) == 1
    flipped = volume.geometry
    last = np.array(flipped.origin) + 4 * flipped.spacing[0] * np.array(flipped.directions[0])
    down, *others = flipped.directions
    other_way = replace(flipped, origin=tuple(last), directions=(tuple(-value for value in down), *others))
    assert np.array_equal(read_mask(path, other_way), whole[::-1])
    with pytest.raises(DataError, match="off the grid"):
        read_mask(path, replace(flipped, origin=(0.0, 0.0, 0.0)))
    overlap = np.stack([whole == 1, whole > 0], axis=-1)
    segmentation(images, overlap).save_as(path)
    with pytest.raises(DataError, match="segments that overlap"):
        read_mask(path, volume.geometry)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated or broken"):
        read_mask(path, volume.geometry)


def image_without_preamble(path):
    data = path.read_bytes()
    return data[data.index(b"\x08\x00\x05\x00") if b"\x08\x00\x05\x00" in data else data.index(b"\x08\x00\x16\x00") :]


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

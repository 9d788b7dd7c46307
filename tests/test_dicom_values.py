"""DICOM: values, padding, compression, multi-frame scans, radiographs and segmentations."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from dicoms import SHAPE, VALUES, dataset, read, read_one, save, slices
from medtpp.data.volumes import find_series, read_mask, volume_fingerprint
from medtpp.errors import DataError


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
    with pytest.raises(DataError, match=r"1 slice lies where another one lies: enhanced\.dcm \(frame 1\)"):
        read_one(tmp_path / "enhanced.dcm", image)
    del shared.PixelMeasuresSequence
    with pytest.raises(DataError, match="holds 5 frames and tells no pixel spacing"):
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


def table(entries, first=0, bits=12):
    """A VOI LUT."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return Sequence([item])


RESCALED = {
    "quarter": (0.25, 0),
    "unit": (1 / 4095, 0),
    "half": (0.5, -100.5),
    "offset": (1, -0.5),
    "turned": (-0.25, 1023.75),
    "turned whole": (-1, 4095),
    "distant": (1 / 4095, 1000),
    "too large": (40, 0),
}


@pytest.mark.parametrize("shown", ["plain", "window", "sigmoid", "LUT"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("scale", RESCALED)
def test_a_rescaled_radiograph_keeps_its_grey_levels(tmp_path, scale, photometric, shown):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    slope, intercept = RESCALED[scale]
    ends = sorted((intercept, 4095 * slope + intercept))
    image = dataset(stored, Modality="DX", BitsStored=12, HighBit=11, PhotometricInterpretation=photometric)
    image.RescaleSlope, image.RescaleIntercept = f"{slope:.9g}", intercept
    if shown in ("window", "sigmoid"):
        image.WindowCenter, image.WindowWidth = f"{sum(ends) / 2:.9g}", f"{ends[1] - ends[0]:.9g}"
        image.VOILUTFunction = "SIGMOID" if shown == "sigmoid" else "LINEAR"
    elif shown == "LUT":
        if scale == "too large":
            pytest.skip("a table has 2**16 entries at most")
        first, last = np.floor(ends[0]), np.ceil(ends[1])
        image.VOILUTSequence = table(np.linspace(0, 65535, int(last - first) + 1), int(first), 16)
    array = read_one(tmp_path / "x.dcm", image).array[0].ravel().astype(int)
    steps = np.diff(array) * (1 if slope > 0 else -1) * (1 if photometric == "MONOCHROME2" else -1)
    assert (steps >= 0).all()  # the order of the stored values, or the other way round
    if shown == "sigmoid":  # flat at the ends
        assert (steps > 0).mean() > 0.3
        assert (steps[1024:3072] > 0).mean() > 0.6
    else:
        assert len(np.unique(array)) >= 4095
    if shown == "plain":
        levels = stored.ravel() if (slope > 0) == (photometric == "MONOCHROME2") else 4095 - stored.ravel()
        assert np.array_equal(array, levels)


@pytest.mark.parametrize("scale", [(1, 0), (2, 0), (1, -1000)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_radiographs_of_whole_numbers_are_as_pydicom_shows_them(tmp_path, scale, signed, windowed):
    stored = np.arange(-2048, 2048).astype(np.int16) if signed else np.arange(4096).astype(np.uint16)
    image = dataset(stored.reshape(64, 64), Modality="CR", BitsStored=12, HighBit=11)
    image.RescaleSlope, image.RescaleIntercept = scale
    if windowed:
        image.WindowCenter, image.WindowWidth = [700, 3], [900, 2]
    expected = apply_voi_lut(stored.astype(int) * scale[0] + scale[1], image)
    expected = np.rint(expected - min(expected.min(), 0))
    assert np.array_equal(read_one(tmp_path / "x.dcm", image).array.ravel(), expected)


def test_padding_of_a_rescaled_radiograph(tmp_path):
    stored = np.arange(1, 4097, dtype=np.uint16).reshape(64, 64) % 4096
    image = dataset(stored, Modality="DX", BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")
    image.RescaleSlope, image.RescaleIntercept = 0.25, 0
    image.add_new("PixelPaddingValue", "US", 0)  # white in MONOCHROME1
    array = read_one(tmp_path / "x.dcm", image).array[0]
    assert array[-1, -1] == 0
    assert np.array_equal(array.ravel()[:-1], 4095 - stored.ravel()[:-1])


def test_inverted_values_of_other_modalities_keep_their_fractions(tmp_path):
    image = dataset(VALUES[0], Modality="OT", PhotometricInterpretation="MONOCHROME1")
    image.RescaleSlope, image.RescaleIntercept = 0.25, 0.25
    array = read_one(tmp_path / "x.dcm", image).array[0]
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, 0.25 + (65535 - VALUES[0].astype(float)) / 4)


@pytest.mark.parametrize("packed", [None, np.uint16, np.uint8])
def test_a_table_of_eight_bits_may_be_long(tmp_path, packed):
    entries = np.linspace(0, 255, 4096).astype(int)
    image = dataset(np.arange(4096, dtype=np.uint16).reshape(64, 64), Modality="CR", BitsStored=12, HighBit=11)
    image.VOILUTSequence = table(entries, bits=8)
    if packed:
        image.VOILUTSequence[0].add_new("LUTData", "OW", entries.astype(packed).tobytes())
    assert np.array_equal(read_one(tmp_path / "x.dcm", image).array.ravel(), entries)
    image.VOILUTSequence[0].LUTDescriptor = [5000, 0, 8]
    if packed is None:
        with pytest.raises(DataError, match="VOI LUT that is too short"):
            read_one(tmp_path / "x.dcm", image)


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

"""Masks and probabilities as files: what is read back is what was written, in the geometry of the scan."""

from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

from medtpp.config import Window
from medtpp.data.case import Case, Structure
from medtpp.data.geometry import plain_geometry, same_grid
from medtpp.data.restore import Restore
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.data.volumes import read_mask, read_volume
from medtpp.errors import DataError, OutputError
from medtpp.inference.write import (
    SUFFIXES,
    structure_path,
    write_dicom_seg,
    write_mask,
    write_overlapping,
    write_probability,
)
from volume_files import save_nifti, seen_by_others
from volumes import STRUCTURES, blobs, geometry

VOLUME_SUFFIXES = [suffix for suffix in SUFFIXES if suffix != ".png"]
SECRETS = ("Doe^Jane", "PAT-4711", "19491231", "987654")


def case(path):
    return Case("case", path)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.05, 20)] * 3),
    seed=st.integers(0, 1000),
    suffix=st.sampled_from(VOLUME_SUFFIXES),
)
def test_masks_come_back_with_their_geometry(tmp_path_factory, shape, spacing, seed, suffix):
    where = geometry(shape, spacing, seed)
    labels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path_factory.mktemp("masks") / f"mask{suffix}"
    write_mask(path, labels, where)
    volume = read_volume(case(path))
    assert volume.geometry.known
    assert same_grid(volume.geometry, where, tolerance=1e-5)
    assert volume.array.dtype == np.uint8
    assert np.array_equal(volume.array[0], labels)
    assert np.array_equal(read_mask(path, where), labels)
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_other_readers_place_masks_alike(tmp_path, suffix):
    """ITK reads NIfTI by code of its own, nibabel does not read the others."""
    where = geometry((3, 4, 5), (2.5, 0.7, 0.6), 7)
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, labels[::-1, :, ::-1], where)  # views that are not contiguous
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), labels[::-1, :, ::-1])
    np.testing.assert_allclose(image.GetSpacing(), where.spacing[::-1], rtol=1e-6)
    corner = np.array(where.origin) + sum(
        index * step * np.array(axis)
        for index, step, axis in zip((2, 3, 4), where.spacing, where.directions, strict=True)
    )
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((4, 3, 2)), corner, atol=1e-4)
    if ".nii" in suffix:
        header = nibabel.load(path).header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_images_and_scans_of_unknown_place(tmp_path, suffix):
    rows = np.random.default_rng(0).integers(0, 4, (5, 7)).astype(np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, rows, plain_geometry(rows.shape))
    assert np.array_equal(read_mask(path, plain_geometry(rows.shape)), rows)
    if suffix == ".png":
        with pytest.raises(OutputError, match="a PNG holds no volume"):
            write_mask(path, rows[None], plain_geometry((1, 5, 7)))
        return
    spaced = replace(plain_geometry(rows.shape), spacing=(0.3, 0.2), known=True)
    write_mask(path, rows, spaced)
    np.testing.assert_allclose(read_volume(case(path)).geometry.spacing, (0.3, 0.2), rtol=1e-6)
    volume = rows[None].repeat(3, axis=0)
    write_mask(path, volume, plain_geometry(volume.shape))
    back = read_volume(case(path))
    assert np.array_equal(back.array[0], volume)
    if ".nii" in suffix:
        assert back.geometry == plain_geometry(volume.shape)


@pytest.mark.parametrize("code", ["scanner", "aligned"])
@pytest.mark.parametrize("unit", ["mm", "micron"])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_masks_of_images_in_nifti_lie_where_their_image_lies(tmp_path, suffix, shape, unit, code):
    """A plane anywhere in the patient, whose third axis says where the next slice would be."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=3).as_matrix() * (0.4, -0.5, 3.0)
    affine[:3, 3] = (-90, 126, -72)
    scan = nibabel.Nifti1Image(np.arange(35, dtype=np.int16).reshape(shape), affine)
    scan.set_qform(affine, code)
    scan.set_sform(affine, code)
    scan.header.set_xyzt_units(unit)
    nibabel.save(scan, tmp_path / f"scan{suffix}")
    volume = read_volume(case(tmp_path / f"scan{suffix}"))
    preprocessing = VolumePreprocessing(
        patch=(4,) * volume.geometry.dims, windows=(Window(kind="fixed", low=0, high=35),)
    )
    restore = Restore.model_validate_json(preprocessing.apply(volume)[1].model_dump_json())
    labels = (volume.array[0] % 3).astype(np.uint8)
    for path, write in ((tmp_path / f"mask{suffix}", write_mask), (tmp_path / f"map{suffix}", write_probability)):
        write(path, labels, restore.geometry)
        assert nibabel.load(path).shape == shape
        np.testing.assert_equal(seen_by_others(path), seen_by_others(tmp_path / f"scan{suffix}"))
        assert same_grid(read_volume(case(path)).geometry, volume.geometry)
    assert np.array_equal(read_mask(tmp_path / f"mask{suffix}", volume.geometry), labels)


@pytest.mark.parametrize("seed", range(40))
def test_masks_take_over_both_transforms_of_their_scan(tmp_path, seed):
    """Written by nibabel: what the two say, their codes and the unit are drawn each on its own."""
    rng = np.random.default_rng(seed)

    def transform():
        affine = np.eye(4)
        affine[:3, :3] = Rotation.random(random_state=rng.integers(1000)).as_matrix() * rng.uniform(0.5, 3, 3)
        affine[:3, 3] = rng.uniform(-200, 200, 3)
        return affine

    qform, sform = transform(), transform()
    codes = tuple(rng.permutation([0, 1, 2, 3, 4])[:2].tolist())  # one space is placed by one transform
    if rng.random() < 0.4 and all(codes):
        sform[:3, :3] = sform[:3, :3] @ (np.eye(3) + np.triu(rng.uniform(0.1, 0.5, (3, 3)), 1))
    shape = tuple(rng.integers(1, 9, 3).tolist())
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    scan, mask = tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"
    save_nifti(scan, labels, sform, codes, qform, xyzt_units=rng.integers(4))
    volume = read_volume(case(scan))
    prepare = VolumePreprocessing(patch=(4, 4, 4), windows=(Window(kind="fixed", low=0, high=2),))
    array, restore = prepare.apply(volume)
    found = np.rint(restore.labels(array[0]) * 2).astype(np.uint8)
    write_mask(mask, found, Restore.model_validate_json(restore.model_dump_json()).geometry)
    assert np.array_equal(np.asarray(nibabel.load(mask).dataobj).T, labels)
    np.testing.assert_equal(seen_by_others(mask), seen_by_others(scan))
    assert same_grid(read_volume(case(mask)).geometry, volume.geometry, tolerance=0)


def test_what_places_nothing_may_be_anything(tmp_path):
    scan = save_nifti(tmp_path / "scan.nii", codes=(1, 0), qoffset_x=np.nan, quatern_b=np.inf)
    geometry = read_volume(case(scan)).geometry
    assert np.isfinite([*geometry.nifti["qoffset_x"], *geometry.nifti["quatern_b"]]).all()  # JSON knows no others
    write_mask(tmp_path / "mask.nii", np.ones(geometry.shape, np.uint8), geometry)
    np.testing.assert_equal(seen_by_others(tmp_path / "mask.nii"), seen_by_others(scan))


def test_an_image_in_nifti_without_a_third_direction_is_read(tmp_path):
    affine = np.diag([0.5, 0.4, 0.0, 1.0])
    scan = nibabel.Nifti1Image(np.zeros((7, 5), np.uint8), None)
    scan.header.set_zooms((0.5, 0.4))
    scan.header.set_sform(affine, 1)
    nibabel.save(scan, tmp_path / "scan.nii")
    geometry = read_volume(case(tmp_path / "scan.nii")).geometry
    np.testing.assert_allclose(geometry.spacing, (0.4, 0.5))
    write_mask(tmp_path / "mask.nii", np.ones((5, 7), np.uint8), geometry)
    assert read_mask(tmp_path / "mask.nii", geometry).all()


def test_files_are_compressed_whole_and_the_same_every_time(tmp_path):
    labels = blobs((40, 64, 64), 1, scale=6)
    where = geometry(labels.shape)
    for suffix in VOLUME_SUFFIXES:
        path = tmp_path / f"mask{suffix}"
        write_mask(path, labels, where)
        first = path.read_bytes()
        assert len(first) < labels.size / 5 or suffix == ".nii"
        write_mask(path, labels, where)
        assert path.read_bytes() == first
        with pytest.raises(ValueError, match="not on a grid"):
            write_mask(path, labels[1:], where)
        assert path.read_bytes() == first
    for name in ("mask.mhd", "mask.jpg", "mask"):
        with pytest.raises(OutputError, match=r"Choose one of \.nii\.gz"):
            write_mask(tmp_path / name, labels, where)
    (tmp_path / "file").touch()
    for suffix in VOLUME_SUFFIXES:
        with pytest.raises(OutputError, match="Cannot write"):
            write_mask(tmp_path / "file" / f"mask{suffix}", labels, where)
    assert {path.name for path in tmp_path.iterdir()} == {"file", *(f"mask{suffix}" for suffix in VOLUME_SUFFIXES)}


def test_probabilities_are_read_as_such(tmp_path):
    where = geometry((4, 5, 6), (3.0, 1.0, 1.0), 3)
    values = np.random.default_rng(0).random(where.shape).astype(np.float32)
    values[0, 0, :2] = 0, 1
    path = tmp_path / "one.nii.gz"
    write_probability(path, values, where)
    back = read_volume(case(path))
    assert same_grid(back.geometry, where)
    assert back.array.dtype == np.float32
    np.testing.assert_allclose(back.array[0], values, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(nibabel.load(path).get_fdata().T, back.array[0], atol=1e-6)
    np.testing.assert_allclose(back.array[0, 0, 0, :2], (0, 1), atol=1e-6)
    with pytest.raises(OutputError, match=r"Choose \.nii\.gz"):
        write_probability(tmp_path / "one.nrrd", values, where)


def test_structures_that_overlap_are_files_of_their_own(tmp_path):
    structures = (Structure("whole tumour", (1, 2)), Structure("../core", (2,)), Structure("..", (2,)))
    where = geometry((3, 4, 5))
    bits = np.random.default_rng(0).integers(0, 8, where.shape).astype(np.uint8)
    paths = write_overlapping(tmp_path / "case", bits, structures, where, ".nii.gz")
    assert [path.name for path in paths] == ["1_whole_tumour.nii.gz", "2_core.nii.gz", "3_.nii.gz"]
    assert {path.parent for path in paths} == {tmp_path / "case"}
    for bit, path in enumerate(paths):
        assert np.array_equal(read_mask(path, where), bits >> bit & 1)
    assert structure_path(tmp_path, 1, Structure("Größe", (1,)), ".png").name == "1_Größe.png"


def slices(shape, rotation, **elements):
    """A CT series, one dataset per slice in the order of space, by a camera that turned."""
    axes = rotation.as_matrix().T
    series = generate_uid()
    for index in range(shape[0]):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.PatientName, image.PatientID, image.PatientBirthDate = SECRETS[:3]
        image.StudyDate, image.AccessionNumber = SECRETS[2:]
        image.Modality = "CT"
        image.StudyInstanceUID = image.SeriesInstanceUID = series
        image.FrameOfReferenceUID = "1.2.3.4"
        image.ImagePositionPatient = [float(round(v, 6)) for v in np.array([-9.0, 5.0, 30.0]) + index * 2.5 * axes[2]]
        image.ImageOrientationPatient = [float(round(v, 8)) for v in (*axes[0], *axes[1])]
        image.PixelSpacing, image.SliceThickness = [0.8, 0.6], 2.5
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Rows, image.Columns = shape[1:]
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.PixelData = np.full(shape[1:], index, np.uint16).tobytes()
        for name, value in elements.items():
            setattr(image, name, value)
        yield image


def save(folder, images):
    """Under names whose order is not that of space."""
    folder.mkdir()
    paths = [folder / f"{(index * 7) % 11:02}.dcm" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        pydicom.dcmwrite(path, image, enforce_file_format=True)
    return sorted(paths)


@pytest.mark.parametrize("seed", range(3))
def test_dicom_segmentations_come_back_on_their_source(tmp_path, seed):
    shape = (6, 9, 11)
    paths = save(tmp_path / "ct", list(slices(shape, Rotation.random(random_state=seed))))
    volume = read_volume(Case("case", paths[0], files=tuple(paths)))
    labels = blobs(shape, seed, scale=1.5)
    labels[2] = 0  # a slice without any structure
    path = tmp_path / "out" / "seg.dcm"
    write_dicom_seg(path, labels, STRUCTURES, paths)
    assert np.array_equal(read_mask(path, volume.geometry), labels)
    written = pydicom.dcmread(path)
    assert written.Modality == "SEG"
    assert written.FrameOfReferenceUID == "1.2.3.4"
    assert written.PatientID == SECRETS[1]
    assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["organ", "lesion"]
    assert written.StudyInstanceUID == pydicom.dcmread(paths[0]).StudyInstanceUID
    assert written.SeriesInstanceUID != pydicom.dcmread(paths[0]).SeriesInstanceUID


def test_overlapping_segments_share_an_object(tmp_path):
    from highdicom.seg import segread

    shape = (3, 5, 7)
    paths = save(tmp_path / "ct", list(slices(shape, Rotation.identity())))
    bits = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, bits, STRUCTURES, paths, overlapping=True)
    volume = read_volume(Case("case", paths[0], files=tuple(paths)))
    with pytest.raises(DataError, match="segments that overlap"):
        read_mask(path, volume.geometry)
    found = segread(path).get_volume(combine_segments=False).array  # (D, H, W, segments) from the first slice or last
    expected = np.stack([bits & 1, bits >> 1 & 1], axis=-1)
    assert np.array_equal(found, expected) or np.array_equal(found, expected[::-1])


def multi_frame(shape, order):
    """One file whose frames are in another order than space."""
    (image, *_) = slices((1, *shape[1:]), Rotation.identity())
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([Dataset()]), Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.6]
    shared.PixelMeasuresSequence[0].SliceThickness = 3.0
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for place in order:
        group = Dataset()
        group.PlanePositionSequence = Sequence([Dataset()])
        group.PlanePositionSequence[0].ImagePositionPatient = [0.0, 0.0, 3.0 * place]
        groups.append(group)
    image.PerFrameFunctionalGroupsSequence = Sequence(groups)
    image.NumberOfFrames = len(order)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(image, name)
    image.PixelData = np.stack([np.full(shape[1:], place, np.uint16) for place in order]).tobytes()
    return image


def test_frames_of_one_file_in_any_order(tmp_path):
    shape = (5, 6, 7)
    paths = save(tmp_path / "ct", [multi_frame(shape, [3, 0, 4, 1, 2])])
    volume = read_volume(Case("case", paths[0]))
    assert volume.array[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]
    labels = blobs(shape, 2, scale=1.0)
    write_dicom_seg(tmp_path / "seg.dcm", labels, STRUCTURES, paths)
    assert np.array_equal(read_mask(tmp_path / "seg.dcm", volume.geometry), labels)


def test_sources_that_a_segmentation_cannot_refer_to(tmp_path, caplog, capfd):
    shape = (3, 4, 5)
    labels, said = np.ones(shape, np.uint8), []
    images = list(slices(shape, Rotation.identity()))

    def refused(files, message):
        with pytest.raises(DataError, match=message) as caught:
            write_dicom_seg(tmp_path / "none.dcm", labels, STRUCTURES, files)
        assert str(caught.value).startswith(f"{files[0]}: ")
        said.append(str(caught.value))

    for image in images:
        del image.PatientName, image.AccessionNumber  # as a de-identification may
    whole = save(tmp_path / "whole", images)
    write_dicom_seg(tmp_path / "seg.dcm", labels, STRUCTURES, whole)
    with pytest.raises(ValueError, match="2 slices of labels"):
        write_dicom_seg(tmp_path / "none.dcm", labels[:2], STRUCTURES, whole)
    for image in images:
        image.FrameOfReferenceUID = generate_uid()  # one each
    refused(save(tmp_path / "mixed", images), "no DICOM segmentation can be made")
    for image in images:
        del image.FrameOfReferenceUID
    refused(save(tmp_path / "without", images), r"FrameOfReferenceUID, which the header of 00\.dcm lacks")
    for image in images:
        del image.ImagePositionPatient
    refused(save(tmp_path / "flat", images), "no slices with a position")
    assert not (tmp_path / "none.dcm").exists()
    shown = "".join([*said, caplog.text, *capfd.readouterr()])
    assert not any(secret in shown for secret in SECRETS)


def test_a_scan_without_any_structure(tmp_path):
    shape = (3, 4, 5)
    paths = save(tmp_path / "ct", list(slices(shape, Rotation.identity())))
    volume = read_volume(Case("case", paths[0], files=tuple(paths)))
    write_dicom_seg(tmp_path / "seg.dcm", np.zeros(shape, np.uint8), STRUCTURES, paths)
    assert not read_mask(tmp_path / "seg.dcm", volume.geometry).any()

"""Volumes and DICOM as cases: class folders, manifests, image and mask folders, and unlabelled pools of them."""

import os

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicoms import VALUES, save, slices
from folders import read, touch
from medtpp.data.case import Structure
from medtpp.data.listing import list_images, split_suffix, stem_of
from medtpp.data.sources import find_images
from medtpp.data.volumes import read_mask, read_volume
from medtpp.errors import DataError
from medtpp.inference.write import write_dicom_seg

SECRET = "Mustermann"


def write_slice(path, series, position, patient="p", modality="CT"):
    """One slice of 4 x 4 pixels at a height in mm."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.Modality = series, modality
    dataset.PatientName, dataset.PatientID, dataset.SeriesDescription = SECRET, f"{SECRET}-{patient}", SECRET
    dataset.Rows = dataset.Columns = 4
    dataset.PixelSpacing = [1, 1]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [0, 0, position]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = np.zeros((4, 4), np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def write_series(folder, positions=(0, 2, 4), patient="p", start=0, ending=".dcm"):
    """Slices named in another order than they lie in space."""
    series = generate_uid()
    for number, position in enumerate(reversed(positions), start):
        write_slice(folder / f"IM{number}{ending}", series, position, patient)


def problems(dataset):
    return {problem.code: problem for problem in dataset.problems}


# Volumes of one file


def test_suffixes():
    assert split_suffix("a/b.1.NII.GZ") == ("a/b.1", ".nii.gz")
    assert split_suffix("a.d/b.Mha") == ("a.d/b", ".mha")
    assert split_suffix("a.gz") == ("a", ".gz")
    assert split_suffix("a.d/b") == ("a.d/b", "")


def test_class_folders_of_volumes(tmp_path):
    touch(
        tmp_path, "train/a/1.nii.gz", "train/b/2.NRRD", "test/a/3.mhd", "test/a/3.raw", "test/b/4.nii", "test/b/x.raw"
    )
    dataset = read(tmp_path)
    assert {case.id: (case.split, case.labels) for case in dataset.cases} == {
        "train/a/1.nii.gz": ("train", ("a",)),
        "train/b/2.NRRD": ("train", ("b",)),
        "test/a/3.mhd": ("test", ("a",)),
        "test/b/4.nii": ("test", ("b",)),
    }
    assert "1 file is no image: test/b/x.raw" in problems(dataset)["not-an-image"].message
    assert list_images(tmp_path)[0] == sorted(case.id for case in dataset.cases)


def test_detached_headers_and_their_voxels(tmp_path):
    """NRRD with the voxels in a file beside it, plain and compressed."""
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for name, packed in (("images/a.nhdr", False), ("images/b.nhdr", True), ("masks/a.nhdr", True)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / name), useCompression=packed)
    assert (tmp_path / "images" / "b.raw.gz").is_file()
    touch(tmp_path, "images/c.raw", "masks/b.mha")
    dataset = read(tmp_path)
    assert {case.id: case.mask.name for case in dataset.cases} == {"images/a.nhdr": "a.nhdr", "images/b.nhdr": "b.mha"}
    assert "1 file is no image: images/c.raw" in problems(dataset)["not-an-image"].message
    for case in dataset.cases:
        assert np.array_equal(read_volume(case).array[0], values)
    geometry = read_volume(dataset.cases[0]).geometry
    assert np.array_equal(read_mask(dataset.cases[0].mask, geometry), values)


def test_stems():
    names = ("a/b.c.nii.gz", "a/x.DCM", "1.2.840.5", "a/1.2.840.113.nii.gz", "a.nhdr", "p1.2")
    assert [stem_of(name) for name in names] == ["a/b.c", "a/x", "1.2.840.5", "a/1.2.840.113", "a", "p1.2"]


# DICOM


def test_class_folders_of_scans(tmp_path):
    write_series(tmp_path / "benign" / "p1" / "ct", patient="1")
    write_series(tmp_path / "benign" / "p2", patient="2", ending="")
    write_series(tmp_path / "malignant" / "p3", patient="1")
    write_slice(tmp_path / "malignant" / "film.dcm", generate_uid(), 0, modality="CR")
    FileSet().write(tmp_path / "malignant")  # a DICOMDIR
    touch(tmp_path, "malignant/p4.nii.gz", "malignant/notes.txt")
    dataset = read(tmp_path)
    cases = {case.id: case for case in dataset.cases}
    assert {name: case.labels for name, case in cases.items()} == {
        "benign/p1/ct": ("benign",),
        "benign/p2": ("benign",),
        "malignant/film.dcm": ("malignant",),
        "malignant/p3": ("malignant",),
        "malignant/p4.nii.gz": ("malignant",),
    }
    assert [file.name for file in cases["benign/p1/ct"].files] == ["IM2.dcm", "IM1.dcm", "IM0.dcm"]
    assert cases["benign/p1/ct"].image == cases["benign/p1/ct"].files[0]
    assert len(cases["benign/p2"].files) == 3
    assert cases["malignant/film.dcm"].files == ()
    assert cases["benign/p1/ct"].patient == cases["malignant/p3"].patient != cases["benign/p2"].patient
    assert cases["malignant/p4.nii.gz"].patient is None
    assert problems(dataset)["not-an-image"].message.startswith("1 file is no image: malignant/notes.txt")
    assert SECRET not in repr(dataset)


def test_scans_that_lie_in_one_folder_are_numbered_and_told(tmp_path):
    write_series(tmp_path / "a" / "p1")
    write_series(tmp_path / "a" / "p1", positions=(0, 3), start=5)
    write_series(tmp_path / "b" / "p2")
    dataset = read(tmp_path)
    assert [(case.id, len(case.files)) for case in dataset.cases] == [("a/p1#1", 3), ("a/p1#2", 2), ("b/p2", 3)]
    found = problems(dataset)["several-series"]
    assert found.severity == "warning"
    assert "a/p1#1 (CT, 3 slices of 4 x 4) and a/p1#2 (CT, 2 slices of 4 x 4)" in found.message
    assert found.cases == ("a/p1#1", "a/p1#2")
    assert SECRET not in found.message
    assert "several-series" not in problems(read(tmp_path, exclude=["a/p1#2"]))


def test_what_is_wrong_with_scans_is_told_with_their_cases(tmp_path):
    write_series(tmp_path / "a" / "p1", positions=(0, 2, 4, 8))
    write_series(tmp_path / "b" / "p2")
    touch(tmp_path, "b/empty.dcm")
    dataset = read(tmp_path)
    errors = [problem for problem in dataset.problems if problem.severity == "error"]
    assert {problem.cases for problem in errors} == {("a/p1",), ("b/empty.dcm",)}
    assert all(problem.message.startswith("DICOM: ") and problem.cases[0] in problem.message for problem in errors)
    assert SECRET not in repr(errors)
    assert read(tmp_path, exclude=["a/p1", "b/empty.dcm"]).problems == ()


def test_slices_at_the_top_are_one_unlabelled_case(tmp_path):
    write_series(tmp_path / "scan")
    (case,) = read(tmp_path / "scan").cases
    assert (case.id, case.labelled, len(case.files)) == ("scan", False, 3)


def test_scans_and_their_masks(tmp_path):
    write_series(tmp_path / "images" / "p1.2", patient="1")
    write_series(tmp_path / "images" / "p3" / "ct", positions=(0, 1, 5), patient="3")
    touch(tmp_path, "masks/p1.2_seg.nii.gz", "masks/p3/ct.nrrd")
    dataset = read(tmp_path)
    assert {case.id: case.mask.name for case in dataset.cases} == {
        "images/p1.2": "p1.2_seg.nii.gz",
        "images/p3/ct": "ct.nrrd",
    }
    assert all(case.patient and len(case.files) == 3 for case in dataset.cases)
    assert [problem.cases for problem in dataset.problems] == [("images/p3/ct",)]
    assert read(tmp_path, exclude=["images/p3/ct"]).problems == ()


def test_files_that_are_called_by_uids(tmp_path):
    """What follows the last dot is no suffix: such names neither collide nor lose their masks."""
    for number in (5, 6):
        write_slice(tmp_path / "images" / f"1.2.840.{number}", generate_uid(), 0, modality="CR")
        touch(tmp_path, f"masks/1.2.840.{number}{'.png' if number == 5 else '_mask.nii.gz'}")
    dataset = read(tmp_path)
    assert {case.id: case.mask.name for case in dataset.cases} == {
        "images/1.2.840.5": "1.2.840.5.png",
        "images/1.2.840.6": "1.2.840.6_mask.nii.gz",
    }
    assert dataset.problems == ()


def test_masks_that_are_dicom_segmentations(tmp_path):
    """By the name of the series' folder or of the file, whatever the suffix, and not files of other kinds."""
    structures = (Structure("organ", (1,)), Structure("lesion", (2,)))
    labels = np.zeros((3, 6, 8), np.uint8)
    labels[1, 2:4, 3:6], labels[2, 0, 0] = 1, 2
    masks = {}
    for number, (name, mask) in enumerate({"p1": "p1.dcm", "p2/ct": "p2/ct_seg", "1.2.840.5": "1.2.840.5"}.items()):
        elements = {"FrameOfReferenceUID": f"1.2.{number}", "SeriesInstanceUID": f"1.3.{number}"}
        files = save(tmp_path / "images" / name, slices(VALUES[:3], PatientID=name, **elements))
        masks[f"images/{name}"] = mask
        write_dicom_seg(tmp_path / "masks" / mask, labels, structures, files)
    save(tmp_path / "images" / "p3", slices(VALUES[:2], SeriesInstanceUID="1.3.9", PatientID="p3"))
    save(tmp_path / "masks", slices(VALUES[:1]), ["p3.dcm"])  # a slice of a scan
    dataset = read(tmp_path)
    found = {case.id: case.mask for case in dataset.cases if case.mask}
    assert {name: path.relative_to(tmp_path / "masks").as_posix() for name, path in found.items()} == masks
    assert [case.id for case in dataset.cases if not case.mask] == ["images/p3"]
    told = problems(dataset)["mask-no-segmentation"]
    assert told.severity == "warning"
    assert "1 file among the masks is DICOM, but no segmentation (SEG): masks/p3.dcm: ignored." in told.message
    assert set(problems(dataset)) == {"mask-no-segmentation", "image-without-mask"}
    for case in dataset.cases:
        if case.mask:
            assert np.array_equal(read_mask(case.mask, read_volume(case).geometry), labels)
    path = found["images/p1"]
    path.write_bytes(path.read_bytes()[:90])
    assert path in [case.mask for case in read(tmp_path).cases]  # and reading it says that it is broken
    with pytest.raises(DataError, match="masks/p1"):
        read_mask(path, read_volume(dataset.cases[1]).geometry)


def test_scans_in_a_manifest(tmp_path):
    write_series(tmp_path / "p1", patient="1")
    write_series(tmp_path / "p2")
    write_series(tmp_path / "p2", positions=(0, 3), start=5)
    write_series(tmp_path / "p4", positions=(0, 1, 5))
    touch(tmp_path, "p3/readme.txt")
    text = "image,label,patient\np1,x,\np1/IM0.dcm,y,me\np2,x,\np3/,y,\np4,y,\n"
    (tmp_path / "manifest.csv").write_text(text)
    dataset = read(tmp_path)
    cases = {case.id: case for case in dataset.cases}
    assert [file.name for file in cases["p1"].files] == ["IM2.dcm", "IM1.dcm", "IM0.dcm"]
    assert cases["p1"].patient
    assert (cases["p1/IM0.dcm"].files, cases["p1/IM0.dcm"].patient) == ((), "me")
    found = problems(dataset)
    assert "line 4: p2 (p2#1: CT, 3 slices of 4 x 4; p2#2: CT, 2 slices of 4 x 4)" in found["several-series"].message
    assert "line 5: p3" in found["no-series"].message
    assert [problem.code for problem in dataset.problems if problem.cases == ("p4",)]
    assert SECRET not in repr(dataset)
    assert read(tmp_path, exclude=["p2", "p3", "p4"]).problems == ()


def test_series_of_one_folder_in_a_manifest(tmp_path):
    write_series(tmp_path / "é" / "p2")
    write_series(tmp_path / "é" / "p2", positions=(0, 3), start=5)
    write_series(tmp_path / "p3")
    write_series(tmp_path / "p3", positions=(0,), start=5)
    write_series(tmp_path / "p#4")
    write_series(tmp_path / "p5", ending="")
    touch(tmp_path, "p5/IM5")
    cells = ["é/p2#1", "é/p2#2", "é/p2#3", "p3", "p3#1", "p3/IM5.dcm", "p#4", "p#4#1", "p5", "p9#1"]
    (tmp_path / "manifest.csv").write_text("image,label\n" + "".join(f"{cell},x\n" for cell in cells))
    dataset = read(tmp_path)
    sizes = {"é/p2#1": 3, "é/p2#2": 2, "é/p2#3": 0, "p3": 0, "p3#1": 3, "p3/IM5.dcm": 0, "p#4": 3, "p#4#1": 3, "p5": 3}
    assert {case.id: len(case.files) for case in dataset.cases} == sizes
    found = problems(dataset)
    there = "(é/p2#1: CT, 3 slices of 4 x 4; é/p2#2: CT, 2 slices of 4 x 4)"
    assert f"line 4: é/p2#3 {there}" in found["unknown-series"].message
    assert "line 5: p3 (p3#1: CT, 3 slices of 4 x 4; p3/IM5.dcm: CT, 1 slice of" in found["several-series"].message
    assert "line 11: p9#1" in found["missing-file"].message
    assert found["unreadable-dicom"].message.startswith("DICOM: p5/IM5: is empty")


def test_folders_without_dicom_are_not_searched_for_it(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "a/notes", "a/table.csv")
    monkeypatch.setitem(__import__("sys").modules, "medtpp.data.volumes", None)  # importing it would fail
    images, others = find_images(tmp_path)
    assert ([image.name for image in images], others) == (["a/1.png"], ["a/notes", "a/table.csv"])


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_opened(tmp_path):
    touch(tmp_path, "images/1.png", "masks/1.png")
    (tmp_path / "masks").chmod(0)
    with pytest.raises(DataError, match="permissions"):
        read(tmp_path)
    (tmp_path / "masks").chmod(0o700)

"""Miniature copies of official downloads: the folders, names and formats of the data sets, random content."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from dicoms import SECRETS, save, slices

SIDE = 16


def picture(path: Path, seed: int, colour: bool = True, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """A file whose format is that of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3) if colour else size, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def labels(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def square(value: int = 1, size: tuple[int, ...] = (SIDE, SIDE)) -> np.ndarray:
    values = np.zeros(size, np.uint8)
    values[tuple(slice(side // 4, side // 2) for side in size)] = value
    return values


def chestxr(folder: Path) -> Path:
    for number, name in enumerate(("covid", "normal", "pneumonia")):
        for index in range(5):
            picture(folder / "train" / name / f"{name}_{index}.jpg", 100 * number + index)
        for index in range(2):
            picture(folder / "validation" / name / f"{name}_{index}.png", 100 * number + 50 + index, colour=False)
    return folder


def qata_cov19_v2(folder: Path) -> Path:
    """Two images of a patient in train, one of a patient who is in test, too."""
    trained = [
        "covid_1",
        "covid_2",
        "covid_3",
        "sub-S001_ses-E1_run-1",
        "sub-S001_ses-E2_run-1",
        "sub-S002_ses-E3_run-1",
    ]
    for part, names in (("Train Set", trained), ("Test Set", ["covid_9", "sub-S002_ses-E4_run-1"])):
        for index, name in enumerate(names):
            root = folder / "QaTa-COV19-v2" / part
            picture(root / "Images" / f"{name}.png", len(part) * 10 + index, colour=False)
            labels(root / "Ground-truths" / f"mask_{name}.png", square(255))
    return folder


def nct_crc(folder: Path) -> Path:
    for number, name in enumerate(("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")):
        for index in range(5):
            picture(folder / "NCT-CRC-HE-100K" / name / f"{name}-{index:08}.tif", 100 * number + index)
        picture(folder / "CRC-VAL-HE-7K" / name / f"{name}-TCGA-{number:08}.tif", 5000 + number)
    return folder


def glas(folder: Path) -> Path:
    root = folder / "Warwick QU Dataset (Released 2016_07_08)"
    rows = [["name", "patient ID", " grade (GlaS)", " grade (Sirinukunwattana et al. 2015)"]]
    names = [*(f"train_{number}" for number in range(1, 11)), "testA_1", "testA_2", "testB_1"]
    for index, name in enumerate(names):
        picture(root / f"{name}.bmp", index, size=(12, 20))
        glands = square(1, (12, 20))
        glands[-2:, -2:] = 7
        labels(root / f"{name}_anno.bmp", glands)
        rows.append([name, str(index % 3), " benign" if index % 2 else " malignant", " adenomatous"])
    with (root / "Grade.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def lits(folder: Path) -> Path:
    for number in range(6):
        root = folder / f"Training Batch {1 + number // 3}"
        root.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        affine = np.diag([0.8, 0.8, 2.0, 1.0])
        liver = square(1, (10, 12, 8))
        liver[3, 3, 2] = 2
        scan = nibabel.Nifti1Image(rng.integers(-200, 200, liver.shape).astype(np.int16), affine)
        nibabel.save(scan, root / f"volume-{number}.nii")
        nibabel.save(nibabel.Nifti1Image(liver, affine), root / f"segmentation-{number}.nii")
    return folder


def la2018(folder: Path, cases: int = 5) -> Path:
    for number in range(cases + 1):
        part = "Testing Set" if number == cases else "Training Set"
        root = folder / part / f"LA{number}AB"
        root.mkdir(parents=True)
        for name, values in (
            ("lgemri", np.random.default_rng(number).integers(0, 255, (8, 12, 10)).astype(np.uint8)),
            ("laendo", square(255, (8, 12, 10))),
        ):
            image = SimpleITK.GetImageFromArray(values)
            image.SetSpacing((0.625,) * 3)
            SimpleITK.WriteImage(image, str(root / f"{name}.nrrd"))
    return folder


def series(folder: Path, seed: int, depth: int = 10, **elements) -> list[Dataset]:
    """A series of its own, with a header full of names and dates."""
    values = np.random.default_rng(seed).integers(0, 2000, (depth, 12, 14)).astype(np.uint16)
    images = slices(values, SeriesInstanceUID=generate_uid(), **elements)
    save(folder, images, [f"1-{index:03}.dcm" for index in range(depth)])
    return images


def ricord(folder: Path) -> Path:
    """Patients with one series or two, and a scout view."""
    for number in range(8):
        part = "AB"[number % 2]
        name = f"MIDRC-RICORD-1{part}-{('419639', 'SITE2')[number // 4]}-{number:06}"
        root = folder / f"manifest-{part}" / f"MIDRC-RICORD-1{part}" / name / "08-02-2002-NA-CT CHEST-04614"
        series(root / "2.000000-ROUTINE CHEST-97100", number)
        if number < 2:
            series(root / "3.000000-0.625mm bone alg-26970", 100 + number)
        if number == 0:
            series(root / "1.000000-SCOUT-11111", 200, depth=2)
    return folder


def vs(folder: Path, *, rtstruct: bool = False, names: tuple[str, ...] = ("TV", "Cochlea")) -> Path:
    """T1 and T2 of each patient; contours as JSON in a folder of their own, or RTSTRUCT files."""
    for number in range(1, 7):
        study = folder / "Vestibular-Schwannoma-SEG" / f"VS-SEG-{number:03}" / "09-06-1993-NA-MRT-17621"
        t1 = series(study / "5.000000-A-1", number, Modality="MR", SeriesDescription="t1_mpr_sag")
        series(study / "3.000000-B-2", 50 + number, Modality="MR", SeriesDescription="t2_ci3d_tra")
        structures = [
            {"structure_name": name, "LPS_contour_points": [box(t1[level], index) for level in (3, 4)]}
            for index, name in enumerate(names)
        ]
        if rtstruct:
            structure_set(study / "1.000000-RTS-3" / "1-1.dcm", t1[0].SeriesInstanceUID, structures)
        else:
            target = folder / "contours" / f"vs_gk_{number}_t1" / "contours.json"
            target.parent.mkdir(parents=True)
            target.write_text(json.dumps(structures))
    return folder


def box(image: Dataset, shift: int = 0) -> list[list[float]]:
    """A contour in the plane of a slice around the pixels of rows 3 to 6 and columns 4 to 9, moved by `shift`."""
    x, y, z = image.ImagePositionPatient
    down, right = image.PixelSpacing
    corners = [(2.5, 3.5), (2.5, 9.5), (6.5, 9.5), (6.5, 3.5)]
    return [[x + (column + shift) * right, y + (row + shift) * down, z] for row, column in corners]


def structure_set(path: Path, uid: str, structures: list[dict]) -> None:
    plan = Dataset()
    plan.file_meta = pydicom.dataset.FileMetaDataset()
    plan.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    plan.SOPClassUID = plan.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    plan.SOPInstanceUID = plan.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    plan.Modality, plan.PatientName, plan.PatientID = "RTSTRUCT", *SECRETS[:2]
    plan.SeriesInstanceUID = generate_uid()
    inner, study, frame = Dataset(), Dataset(), Dataset()
    inner.SeriesInstanceUID = uid
    study.RTReferencedSeriesSequence = Sequence([inner])
    frame.RTReferencedStudySequence = Sequence([study])
    plan.ReferencedFrameOfReferenceSequence = Sequence([frame])
    rois, drawn = [], []
    for number, structure in enumerate(structures, start=1):
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, structure["structure_name"]
        contours.ReferencedROINumber = number
        items = []
        for points in structure["LPS_contour_points"]:
            item = Dataset()
            item.ContourGeometricType = "CLOSED_PLANAR"
            item.ContourData = [f"{value:.6f}" for point in points for value in point]
            items.append(item)
        contours.ContourSequence = Sequence(items)
        rois.append(roi)
        drawn.append(contours)
    plan.StructureSetROISequence, plan.ROIContourSequence = Sequence(rois), Sequence(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, plan, enforce_file_format=True)

"""Vestibular-Schwannoma-SEG (Shapey et al., Scientific Data 2021): tumours in contrast-enhanced T1 MRI.

Verified against the data set's own code (KCL-BMEIS/VS_Seg: names of folders and series, `contours.json` with
`structure_name` and `LPS_contour_points`, the tumour first in it, the 242 numbers of its split) and another public
reader. Not verified against the files: that contours lie in the planes of the slices, and the RTSTRUCT files, which are
used only where there is no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medtpp.config import RECIPES
from medtpp.data.case import Case
from medtpp.data.recipes._contours import fill_contours
from medtpp.data.recipes._dicom import dicom_folders, only_scan
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, files_in, folders
from medtpp.data.volumes import Series, read_volume
from medtpp.data.volumes.header import discreet, is_dicom, open_dataset
from medtpp.data.volumes.write import write_nifti
from medtpp.errors import DataError
from medtpp.files import read_json

WITHDRAWN = (39, 97, 130, 160, 168, 208, 219, 227)
NAMES = tuple(f"VS-SEG-{number:03d}" for number in range(1, 251) if number not in WITHDRAWN)
_CASE = re.compile(r"(?:VS-SEG-|vs_gk_)(\d+)(?:_t([12]))?")
# Drawn beside the tumour, in public readers of the data set.
_NO_TUMOUR = ("brainstem", "modiolus", "cochlea", "cochlea_c", "cochlea_d", "test", "men")

Contours = list[NDArray[np.float64]]


@RECIPES.register("vs")
class VestibularSchwannoma(Recipe):
    """The T1 series are read in place; contours become NIfTI masks on their grid."""

    title = "Vestibular-Schwannoma-SEG"
    task = "MRI, masks of vestibular schwannoma"
    kind = "segmentation"
    modality = "mri"
    licence = "CC BY 4.0"
    access = "https://doi.org/10.7937/TCIA.9YTJ-5Q73 (open)"
    citation = "Shapey et al., Scientific Data 8, 2021, https://doi.org/10.1038/s41597-021-01064-w"
    layout = (
        "Vestibular-Schwannoma-SEG/VS-SEG-001/STUDY/SERIES/*.dcm (or vs_gk_1_t1/*.dcm)",
        "contours/vs_gk_1_t1/contours.json (a file of its own on the page; without it, RTSTRUCT files are used)",
    )
    parts = (Part("patients", len(NAMES), NAMES, "patients"),)
    shares = {"train": 0.8, "test": 0.2}  # noqa: RUF012
    protocol = "80/20 for train and test, drawn with seed 0; a run takes its validation cases from train"
    structures = {"schwannoma": 1}  # noqa: RUF012

    def survey(self, source: Path, out: Path) -> Survey:
        """See `Recipe.survey`."""
        survey = Survey()
        json = {int(number): file for number, file in _contour_files(source)}
        scans, structures = _series(source, survey.faults)
        if not scans:
            raise self.unknown(source)
        for number, folder in sorted(scans.items()):
            name = f"VS-SEG-{number:03d}"
            survey.found["patients"].append(name)
            scan = only_scan(folder)
            contours = json.get(number) or structures.get(number)
            if not isinstance(scan, Series):
                survey.faults.append(f"{folder}: {scan}")
            elif contours is None:
                survey.faults.append(f"{folder}: {name} has no contours.json (vs_gk_{number}_t1) and no RTSTRUCT.")
            else:
                target = out / "masks" / f"{name}.nii.gz"
                make = partial(_mask, scan, contours, target)
                survey.rows.append(Row(folder, target, patient=name, make=make, sources=()))
        return survey


def _contour_files(source: Path) -> Iterator[tuple[str, Path]]:
    for folder in folders(source):
        match = _CASE.fullmatch(folder.name)
        if match and match[2] == "1" and (folder / "contours.json").is_file():
            yield match[1], folder / "contours.json"


def _series(source: Path, faults: list[str]) -> tuple[dict[int, Path], dict[int, Path]]:
    """For each case the folder of its T1 series, and an RTSTRUCT file drawn on it."""
    scans: dict[int, Path] = {}
    uids: dict[int, str] = {}
    drawn: dict[int, dict[str, Path]] = {}
    for folder in dicom_folders(source):
        found = _CASE.search(folder.relative_to(source).as_posix())
        if found is None:
            continue
        number = int(found[1])
        for file in _one_of_each_kind(folder):
            try:
                kind, description, series = _kind(file)
                if kind == "RTSTRUCT":
                    drawn.setdefault(number, {})[_referenced(file)] = file
            except DataError as error:
                faults.append(f"{file}: {error.message}")
                continue
            if kind == "MR" and (found[2] == "1" or (found[2] is None and description.startswith("t1"))):
                scans[number], uids[number] = folder, series
    structures = {number: files[uids[number]] for number, files in drawn.items() if uids.get(number) in files}
    return scans, structures


def _kind(file: Path) -> tuple[str, str, str]:
    """Modality, description in lower case, and series. Not to be shown."""
    keywords = ("Modality", "SeriesDescription", "SeriesInstanceUID")
    with discreet("has a broken DICOM header. Download it again."):
        header = open_dataset(file, keywords=keywords)
        modality, description, series = (str(header.get(keyword) or "") for keyword in keywords)
        return modality, description.lower(), series


def _one_of_each_kind(folder: Path) -> list[Path]:
    """The first image of a folder, and files that by their names are no images (RTSS.dcm beside IMG*.dcm)."""
    files = [file for file in files_in(folder) if is_dicom(file)]
    return [*files[:1], *(file for file in files[1:] if file.name.upper().startswith("RTSS"))]


def _referenced(file: Path) -> str:
    """The series that an RTSTRUCT was drawn on."""
    with discreet("is a broken RTSTRUCT. Download it again."):
        study = open_dataset(file).ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        return str(study.RTReferencedSeriesSequence[0].SeriesInstanceUID)


def _mask(scan: Series, contours: Path, target: Path) -> None:
    """Write the mask of a case on the grid of its scan."""
    geometry = read_volume(Case(target.name, scan.image, files=scan.files if scan.stacked else ())).geometry
    try:
        labels = fill_contours(_tumour(contours), geometry)
        if not labels.any():
            raise DataError("its contours are smaller than a voxel.")
    except DataError as error:
        raise DataError(f"{contours}: {error.message}") from error
    write_nifti(target, labels, geometry)


def _tumour(file: Path) -> Contours:
    """The contours of the tumour: the first structure that is not known to be another one.

    Raises:
        DataError: There is none, or the file is broken. The reason without the path.
    """
    structures = _from_json(file) if file.suffix == ".json" else _from_rtstruct(file)
    for name, contours in structures:
        if name.strip().lower() not in _NO_TUMOUR and contours:
            return contours
    raise DataError(f"none of its {len(structures)} structures is a tumour.")


def _from_json(file: Path) -> list[tuple[str, Contours]]:
    try:
        return [
            (
                str(structure["structure_name"]),
                [np.array(points, float).reshape(-1, 3) for points in structure["LPS_contour_points"]],
            )
            for structure in read_json(file)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("is no list of structures with LPS_contour_points. Download it again.") from error


def _from_rtstruct(file: Path) -> list[tuple[str, Contours]]:
    with discreet("is a broken RTSTRUCT. Download it again."):
        dataset: Dataset = open_dataset(file)
        names = {int(roi.ROINumber): str(roi.ROIName) for roi in dataset.StructureSetROISequence}
        return [
            (
                names[int(roi.ReferencedROINumber)],
                [np.array(item.ContourData, float).reshape(-1, 3) for item in roi.get("ContourSequence", ())],
            )
            for roi in dataset.ROIContourSequence
        ]

"""RICORD 1A and 1B (Tsai et al., Radiology 2021): chest CT of patients with and without COVID-19.

Verified against the folder names in public code for the two collections of the Cancer Imaging Archive (both ways in
which its retriever names folders) and against MedCoSS's lists of its split, which name series of both collections,
reformatted ones included, and put those of one patient in one split. The numbers of patients (110 and 117) and the
identifiers of the collections (DOI) could be verified neither on the archive's pages nor in the files. The annotations
in JSON are of 1A alone and not needed: a scan is positive in 1A, negative in 1B.
"""

from __future__ import annotations

import re
from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.recipes._dicom import dicom_folders, only_scan
from medtpp.data.recipes.base import Part, Recipe, Row, Survey

LEAST = 10  # slices; less is a scout view, not a chest
LABELS = {"A": "positive", "B": "negative"}
_PATIENT = re.compile(r"MIDRC-RICORD-1([AB])-(\w+)-(\d+)")


@RECIPES.register("ricord")
class RICORD(Recipe):
    """DICOM, read in place; each series is a case, its patient the number after the site in the folder's name."""

    title = "RICORD 1A and 1B (RSNA International COVID-19 Open Radiology Database)"
    task = "CT, 2 classes: COVID-19 positive (1A), negative (1B)"
    kind = "classification"
    modality = "ct"
    licence = "CC BY-NC 4.0"
    access = "https://doi.org/10.7937/VTW4-X588 (1A) and https://doi.org/10.7937/31V8-4A40 (1B), open"
    citation = "Tsai et al., Radiology 299, 2021, https://doi.org/10.1148/radiol.2021203957"
    layout = (
        "MIDRC-RICORD-1A/MIDRC-RICORD-1A-SITE-NUMBER/STUDY/SERIES/*.dcm",
        "MIDRC-RICORD-1B/MIDRC-RICORD-1B-SITE-NUMBER/STUDY/SERIES/*.dcm",
    )
    parts = (Part("1A", 110, what="patients"), Part("1B", 117, what="patients"))
    shares = {"train": 194, "val": 52, "test": 84}  # noqa: RUF012
    protocol = "194/52/84 parts of the scans for train, val and test, drawn, patients apart, classes in proportion"

    def survey(self, source: Path, out: Path) -> Survey:  # noqa: ARG002
        """See `Recipe.survey`."""
        survey = Survey()
        small = 0
        for folder in dicom_folders(source):
            match = _PATIENT.search(folder.relative_to(source).as_posix())
            if match is None:
                continue
            part, site, number = match.groups()
            survey.found[f"1{part}"].append(f"{site}-{number}")
            scan = only_scan(folder)
            if isinstance(scan, str):
                survey.faults.append(f"{folder}: {scan}")
            elif scan is None or len(scan.size) < 3 or scan.size[0] < LEAST:
                small += 1
            else:
                survey.rows.append(Row(folder, label=LABELS[part], patient=f"{site}-{number}", site=site))
        if not survey.found:
            raise self.unknown(source)
        if small:
            survey.notes.append(f"{small} series of fewer than {LEAST} slices, such as scout views, are left out.")
        return survey

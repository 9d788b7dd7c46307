"""LiTS (Bilic et al., Medical Image Analysis 2023): CT of the abdomen with masks of liver and tumours.

Verified against the file names in public code (`volume-0.nii` to `volume-130.nii` with `segmentation-*.nii`, in two
training batches) and the 131 scans of the paper. The 70 test scans have no public masks and are not used.
"""

from __future__ import annotations

import re
from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, files_in, folders


@RECIPES.register("lits")
class LiTS(Recipe):
    """NIfTI; a patient for each scan. The liver is the values 1 and 2, its tumours are 2."""

    title = "LiTS (Liver Tumor Segmentation Benchmark)"
    task = "CT, masks of liver and tumour"
    kind = "segmentation"
    modality = "ct"
    licence = "see the page of the challenge (non-commercial)"
    access = "https://competitions.codalab.org/competitions/17094 (registration)"
    citation = "Bilic et al., Medical Image Analysis 84, 2023, https://doi.org/10.1016/j.media.2022.102680"
    layout = (
        "Training Batch 1/volume-0.nii, Training Batch 1/segmentation-0.nii and so on",
        "Training Batch 2/volume-28.nii, Training Batch 2/segmentation-28.nii and so on, to 130",
    )
    parts = (Part("scans", 131, tuple(f"volume-{number}" for number in range(131)), "scans"),)
    shares = {"train": 104, "test": 27}  # noqa: RUF012
    protocol = "104 scans for train, 27 as test, drawn; a run takes its validation cases from train"
    structures = {"liver": [1, 2], "tumour": 2}  # noqa: RUF012

    def survey(self, source: Path, out: Path) -> Survey:  # noqa: ARG002
        """See `Recipe.survey`."""
        files = [file for folder in folders(source) for file in files_in(folder, ".nii", ".nii.gz")]
        named = {match[0]: file for file in files if (match := re.match(r"(volume|segmentation)-\d+(?=\.)", file.name))}
        survey = Survey()
        for name, image in named.items():
            number = name.removeprefix("volume-")
            if number == name:
                continue
            survey.found["scans"].append(name)
            mask = named.get(f"segmentation-{number}")
            if mask:
                survey.rows.append(Row(image, mask, patient=f"lits-{number}"))
            else:
                survey.faults.append(f"{image}: its mask segmentation-{number} is missing.")
        if not survey.found["scans"]:
            raise self.unknown(source)
        return survey

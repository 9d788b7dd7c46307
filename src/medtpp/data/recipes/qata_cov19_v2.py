"""QaTa-COV19 v2 (Degerli et al., ICIP 2022): radiographs with masks of COVID-19 infection.

Verified against the preparation in MedCoSS's public code and others' (`Train Set/Images`, `Train Set/Ground-truths`,
masks called `mask_` and the image's name, values 0 and 255), and against the paper's 9,258 images, which the lists in
public use divide into 7,145 and 2,113. A part of the names tells the patient (`sub-S09466_...`, from BIMCV); whether
the official split keeps these patients apart could not be verified, so that the recipe sees to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, files_in, locate

TRAIN, TEST = "Train Set", "Test Set"


@RECIPES.register("qata_cov19_v2")
class QaTaCOV19(Recipe):
    """PNG images and masks in an official train and test set."""

    title = "QaTa-COV19 v2"
    task = "X-ray, masks of COVID-19 infection"
    kind = "segmentation"
    modality = "xray"
    licence = "see the page of the data set"
    access = "https://www.kaggle.com/datasets/aysendegerli/qatacov19-dataset (account)"
    citation = "Degerli et al., OSegNet, ICIP 2022, arXiv 2202.10185"
    layout = (
        f"QaTa-COV19-v2/{TRAIN}/Images/*.png, QaTa-COV19-v2/{TRAIN}/Ground-truths/mask_*.png",
        f"QaTa-COV19-v2/{TEST}/Images/*.png, QaTa-COV19-v2/{TEST}/Ground-truths/mask_*.png",
    )
    parts = (Part(TRAIN, 7145), Part(TEST, 2113))
    shares = {"train": 0.8, "val": 0.2}  # noqa: RUF012
    protocol = "train 80/20 for train and val, official test; patients apart where file names tell them (sub-S...)"
    structures = {"infection": 255}  # noqa: RUF012

    def survey(self, source: Path, out: Path) -> Survey:  # noqa: ARG002
        """See `Recipe.survey`."""
        root = locate(source, f"{TRAIN}/Images", f"{TEST}/Images")
        if root is None:
            raise self.unknown(source)
        survey = Survey()
        for part, split in ((TRAIN, ""), (TEST, "test")):
            for image in files_in(root / part / "Images", ".png"):
                mask = root / part / "Ground-truths" / f"mask_{image.name}"
                survey.found[part].append(image.name)
                if mask.is_file():
                    survey.rows.append(Row(image, mask, patient=_patient(image.name), split=split))
                else:
                    survey.faults.append(f"{image}: its mask {mask.name} is missing.")
        return survey


def _patient(name: str) -> str:
    found = re.match(r"sub-(S\d+)_", name)
    return found[1] if found else ""

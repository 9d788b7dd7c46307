"""GlaS (Sirinukunwattana et al., Medical Image Analysis 2017): glands in colorectal tissue.

Verified against the challenge's page (165 images: 37 benign and 48 malignant for training, 37 and 43 as test), the
file names in public code (`train_1.bmp`, `train_1_anno.bmp`, `testA_1.bmp`, `testB_1.bmp`; a number for each gland in
a mask) and the header of `Grade.csv`. By the challenge's paper the images come from 16 slides and
were divided by image, so that train and test share patients; `Grade.csv` itself was not at hand.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np

from medtpp.config import RECIPES
from medtpp.data.geometry import plain_geometry
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, folders, size_of
from medtpp.data.volumes.mask import read_mask
from medtpp.data.volumes.write import write_png
from medtpp.errors import DataError

PARTS = {"train": 85, "testA": 60, "testB": 20}


@RECIPES.register("glas")
class GlaS(Recipe):
    """BMP images. Masks number the glands; they are converted to PNG files of 0 and 1.

    Grade and patient go into columns that medtpp does not read: a split that keeps the patients apart would not be the
    challenge's.
    """

    title = "GlaS (Gland Segmentation in Colon Histology Images)"
    task = "pathology, masks of glands"
    kind = "segmentation"
    modality = "pathology"
    licence = "research only, no commercial use"
    access = "https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/ (open)"
    citation = "Sirinukunwattana et al., Medical Image Analysis 35, 2017, https://doi.org/10.1016/j.media.2016.08.008"
    layout = (
        "Warwick QU Dataset (Released 2016_07_08)/Grade.csv",
        "Warwick QU Dataset (Released 2016_07_08)/train_1.bmp, train_1_anno.bmp, testA_1.bmp, testB_1.bmp and so on",
    )
    parts = tuple(
        Part(part, count, tuple(f"{part}_{number}" for number in range(1, count + 1))) for part, count in PARTS.items()
    )
    shares = {"train": 0.8, "val": 0.2}  # noqa: RUF012
    protocol = "train 80/20 per grade for train and val, official test; images of one patient are in several splits"
    structures = {"gland": 1}  # noqa: RUF012

    def survey(self, source: Path, out: Path) -> Survey:
        """See `Recipe.survey`."""
        root = next((folder for folder in folders(source) if (folder / "Grade.csv").is_file()), None)
        if root is None:
            raise self.unknown(source)
        survey = Survey()
        for line in _grades(root / "Grade.csv"):
            name, patient, grade = line
            part = name.partition("_")[0]
            if part not in PARTS:
                continue
            image, mask = root / f"{name}.bmp", root / f"{name}_anno.bmp"
            if not image.is_file():
                continue
            survey.found[part].append(name)
            if not mask.is_file():
                survey.faults.append(f"{image}: its mask {mask.name} is missing.")
                continue
            target = out / "masks" / f"{name}.png"
            survey.rows.append(
                Row(
                    image,
                    target,
                    split="" if part == "train" else "test",
                    stratum=grade,
                    extra={"grade": grade, "slide": patient},
                    make=partial(_binary, image, mask, target),
                    sources=(image, mask),
                )
            )
        slides = [{row.extra["slide"] for row in survey.rows if row.split == split} for split in ("", "test")]
        shared = len(set.intersection(*slides))
        if shared:
            survey.notes.append(
                f"The official split was drawn by image: {shared} patients (column slide) are in train and in test, "
                "which flatters the result."
            )
        return survey


def _grades(file: Path) -> list[tuple[str, str, str]]:
    """Name, patient and grade of each image."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [[cell.strip() for cell in line] for line in csv.reader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}. Download it again.") from error
    rows = [(line[0], line[1], line[2]) for line in lines if len(line) >= 3 and line[2] in ("benign", "malignant")]
    if not rows:
        raise DataError(f"{file} names no image with a grade (name,patient ID,grade). Download it again.")
    return rows


def _binary(image: Path, mask: Path, target: Path) -> None:
    """Write a mask of 0 and 1 for one that numbers the glands."""
    try:
        width, height = size_of(image)
    except DataError as error:
        raise DataError(f"{image}: {error.message}") from error
    write_png(target, (read_mask(mask, plain_geometry((height, width))) > 0).astype(np.uint8))

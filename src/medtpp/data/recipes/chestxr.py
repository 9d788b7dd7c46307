"""ChestXR (Chest XR COVID-19 detection, 2021): radiographs with COVID-19, another pneumonia, or neither.

Verified against the challenge's page of the data set (17,955 images for training, 3,430 for validation, no patients)
and against the loader and the folder names in MedCoSS's and UniMiSS's public code. Counts by class and the suffixes of
single files could not be verified; the test images of the challenge have no labels and are not used.
"""

from __future__ import annotations

from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.recipes._classes import add_class_folders
from medtpp.data.recipes.base import Part, Recipe, Survey, locate

CLASSES = ("covid", "normal", "pneumonia")


@RECIPES.register("chestxr")
class ChestXR(Recipe):
    """`train` and `validation`, each with a folder for each class; the official validation images are the test."""

    title = "ChestXR (Chest XR COVID-19 detection)"
    task = "X-ray, 3 classes: covid, normal, pneumonia"
    kind = "classification"
    modality = "xray"
    licence = "for the challenge only, by its rules; ask its organisers"
    access = "https://cxr-covid19.grand-challenge.org/Dataset/ (registration)"
    citation = "Akhloufi and Chetoui, Chest XR COVID-19 detection, 2021, https://cxr-covid19.grand-challenge.org"
    layout = (
        "train/covid/*.jpg, train/normal/*.jpg, train/pneumonia/*.jpg",
        "validation/covid/*.png, validation/normal/*.png, validation/pneumonia/*.png",
    )
    parts = (Part("train", 17955), Part("validation", 3430))
    shares = {"train": 0.8, "val": 0.2}  # noqa: RUF012  (read only, as all attributes of recipes)
    protocol = "train 80/20 per class for train and val, the official validation images as test; no patients are known"

    def survey(self, source: Path, out: Path) -> Survey:  # noqa: ARG002
        """See `Recipe.survey`."""
        root = locate(source, "train/covid", "validation/covid")
        if root is None:
            raise self.unknown(source)
        survey = Survey()
        for part, split in (("train", ""), ("validation", "test")):
            add_class_folders(survey, part, root / part, CLASSES, (".jpg", ".jpeg", ".png"), split)
        return survey

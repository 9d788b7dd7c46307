"""NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al., 2018): tiles of colorectal tissue in nine classes.

Verified against the folder and file names in public code for the Zenodo record 1214456 (TIFF, a folder for each class)
and the totals of the record. The counts by class add up to these totals; they were not compared with the files.
"""

from __future__ import annotations

from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.recipes._classes import add_class_folders
from medtpp.data.recipes.base import Part, Recipe, Survey, locate

TRAIN, TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
COUNTS = {
    "ADI": (10407, 1338),
    "BACK": (10566, 847),
    "DEB": (11512, 339),
    "LYM": (11557, 634),
    "MUC": (8896, 1035),
    "MUS": (13536, 592),
    "NORM": (8763, 741),
    "STR": (10446, 421),
    "TUM": (14317, 1233),
}


@RECIPES.register("nct_crc")
class NCTCRC(Recipe):
    """The 100,000 normalised tiles for training and the 7,180 of other patients as test."""

    title = "NCT-CRC-HE-100K and CRC-VAL-HE-7K"
    task = "pathology, 9 classes of tissue"
    kind = "classification"
    modality = "pathology"
    licence = "CC BY 4.0"
    access = "https://zenodo.org/records/1214456 (open)"
    citation = "Kather et al., PLOS Medicine 2019, https://doi.org/10.1371/journal.pmed.1002730"
    layout = (f"{TRAIN}/ADI/*.tif, {TRAIN}/BACK/*.tif and so on", f"{TEST}/ADI/*.tif, {TEST}/BACK/*.tif and so on")
    parts = tuple(
        Part(f"{part}/{name}", counts[column], what="tiles")
        for column, part in enumerate((TRAIN, TEST))
        for name, counts in COUNTS.items()
    )
    shares = {"train": 0.8, "val": 0.2}  # noqa: RUF012
    protocol = f"{TRAIN} 80/20 per class for train and val, {TEST} as test; no patients are known"

    def survey(self, source: Path, out: Path) -> Survey:  # noqa: ARG002
        """See `Recipe.survey`."""
        roots = {part: locate(source, f"{part}/ADI") for part in (TRAIN, TEST)}
        if not any(roots.values()):
            raise self.unknown(source)
        survey = Survey()
        for (part, root), split in zip(roots.items(), ("", "test"), strict=True):
            if root:
                add_class_folders(survey, part, root / part, tuple(COUNTS), (".tif", ".tiff"), split)
        return survey

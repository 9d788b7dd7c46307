"""LA (2018 Atrial Segmentation Challenge; Xiong et al., Medical Image Analysis 2021): left atria in LGE-MRI.

Verified against the challenge's page (100 scans for training of 154, `lgemri.nrrd` and `laendo.nrrd` in a folder for
each patient, masks of 0 and 255, voxels of 0.625 mm) and, for the cropped and standardised copies in wide use, against
the code that makes and reads them (`mri_norm2.h5` with the arrays `image` and `label` in the order x, y, z; lists of 80
and 20 in `train.list` and `test.list`). The protocol uses the 100 training scans alone. Whether two of them are of one
patient, before and after ablation, is not published in these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtpp.config import RECIPES
from medtpp.data.geometry import Geometry
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, folders
from medtpp.data.volumes.write import write_nifti
from medtpp.errors import DataError

SPACING = 0.625  # mm, in all directions
INSIDE = 255  # what official masks have in the atrium
H5 = "mri_norm2.h5"


@RECIPES.register("la2018")
class LA2018(Recipe):
    """NRRD is read in place. HDF5 files become NIfTI, images as well; their place in the patient is lost.

    With `train.list` and `test.list` in the download, as beside the HDF5 files, their split is taken.
    """

    title = "LA (2018 Atrial Segmentation Challenge)"
    task = "MRI, masks of the left atrium"
    kind = "segmentation"
    modality = "mri"
    licence = "see the page of the challenge"
    access = "https://www.cardiacatlas.org/atriaseg2018-challenge/atria-seg-data/ (registration)"
    citation = "Xiong et al., Medical Image Analysis 67, 2021, https://doi.org/10.1016/j.media.2020.101832"
    layout = (
        "Training Set/NAME/lgemri.nrrd, Training Set/NAME/laendo.nrrd",
        f"or 2018LA_Seg_Training Set/NAME/{H5}, with train.list and test.list",
    )
    parts = (Part("scans", 100, what="scans"),)
    shares = {"train": 80, "test": 20}  # noqa: RUF012
    protocol = "80 scans for train, 20 as test, by train.list and test.list or drawn; a run draws validation from train"
    structures = {"left atrium": INSIDE}  # noqa: RUF012

    def survey(self, source: Path, out: Path) -> Survey:
        """See `Recipe.survey`."""
        survey = Survey()
        known = list(folders(source))
        lists = _lists(known)
        for folder in known:
            if any(name.lower().startswith("test") for name in folder.relative_to(source).parts):
                continue  # the challenge's test scans, which the protocol has no use for
            image, mask = folder / "lgemri.nrrd", folder / "laendo.nrrd"
            split = lists.get(folder.name, "")
            if image.is_file():
                survey.found["scans"].append(folder.name)
                if mask.is_file():
                    survey.rows.append(Row(image, mask, patient=folder.name, split=split))
                else:
                    survey.faults.append(f"{image}: its mask {mask.name} is missing.")
            elif (folder / H5).is_file():
                survey.found["scans"].append(folder.name)
                target, labels = (out / part / f"{folder.name}.nii.gz" for part in ("images", "masks"))
                make = partial(_from_h5, folder / H5, target, labels)
                survey.rows.append(Row(target, labels, patient=folder.name, split=split, make=make, sources=()))
        if not survey.rows:
            raise self.unknown(source)
        if any(row.make for row in survey.rows):
            _h5py()
        if any(row.split for row in survey.rows):
            unlisted = [row for row in survey.rows if not row.split]
            survey.faults += [f"{row.image}: it is in neither train.list nor test.list." for row in unlisted]
            survey.rows = [row for row in survey.rows if row.split]
        return survey


def _lists(known: list[Path]) -> Mapping[str, str]:
    """The split by name that lists in the download prescribe; empty without both of them."""
    split: dict[str, str] = {}
    for name in ("train", "test"):
        file = next((folder / f"{name}.list" for folder in known if (folder / f"{name}.list").is_file()), None)
        if file is None:
            return {}
        try:
            split |= dict.fromkeys(file.read_text(encoding="utf-8").split(), name)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}. Download it again.") from error
    return split


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{H5} is read by h5py, which is not installed: pip install 'medtpp[h5]'. The challenge's own download "
            "(lgemri.nrrd) needs nothing."
        ) from error
    return h5py


def _from_h5(file: Path, image: Path, mask: Path) -> None:
    """Write the arrays of an HDF5 file as NIfTI on one grid."""
    try:
        with _h5py().File(file, "r") as content:
            values = np.asarray(content["image"][()], np.float32)
            labels = np.asarray(content["label"][()])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{file} has no arrays image and label that can be read. Download it again.") from error
    if values.ndim != 3 or labels.shape != values.shape:
        raise DataError(f"{file}: image and label have the shapes {values.shape} and {labels.shape}.")
    if not (np.isfinite(values).all() and np.isin(labels, (0, 1)).all()):
        raise DataError(f"{file}: the image is not finite, or the label holds more than 0 and 1.")
    geometry = _geometry(values.T)
    write_nifti(image, values.T, geometry)
    write_nifti(mask, (labels.T > 0).astype(np.uint8) * np.uint8(INSIDE), geometry)


def _geometry(values: NDArray[Any]) -> Geometry:
    """Of (D, H, W) values without a known place."""
    directions = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    return Geometry(values.shape, (SPACING,) * 3, (0.0,) * 3, directions)

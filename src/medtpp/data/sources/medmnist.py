"""MedMNIST (Yang et al., Scientific Data 2023): one `.npz` file with images and labels of train, val and test."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import SPLITS, Case, Dataset
from medtpp.data.npz import NpzArray, npz_arrays, read_npz_array
from medtpp.data.sources import class_names
from medtpp.data.sources._medmnist_classes import CLASSES
from medtpp.errors import DataError


@SOURCES.register("medmnist")
class MedMNIST:
    """Arrays `train_images` and `train_labels`, and the same of val and test; a case for each row.

    The image of a case is the archive, its id the row ("train/00012"): `medtpp.data.npz.read_npz_row` reads it.
    Classes have MedMNIST's names where the file has (`breastmnist_224.npz`), otherwise they are numbers.
    """

    summary: ClassVar[str] = "a MedMNIST .npz file, 2D or 3D: train_images, train_labels, and the same of val and test"

    @staticmethod
    def recognises(path: Path) -> bool:
        """A file that ends in .npz."""
        return path.is_file() and path.suffix.lower() == ".npz"

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:  # noqa: ARG004  (the file says all there is)
        """Read shapes and labels, no image.

        Raises:
            DataError: The file is broken, or its arrays are not MedMNIST's; all that is wrong is reported together.
        """
        arrays = npz_arrays(path)
        splits = [split for split in SPLITS if {f"{split}_images", f"{split}_labels"} & arrays.keys()]
        faults = _faults(arrays, splits)
        labels = {} if faults else {split: read_npz_array(path, f"{split}_labels") for split in splits}
        faults += [fault for split, table in labels.items() for fault in _label_faults(split, table)]
        if faults:
            raise DataError(f"{path} is not as MedMNIST has it:", faults)
        width = max(table.reshape(len(table), -1).shape[1] for table in labels.values())
        largest = max((int(table.max()) for table in labels.values() if table.size), default=0)
        names = _names(path, width if width > 1 else largest + 1)
        cases = tuple(
            Case(f"{split}/{row:05d}", path, _labels(values, names), labelled=True, split=split)
            for split, table in labels.items()
            for row, values in enumerate(table.reshape(len(table), -1))
        )
        return Dataset(path.parent, "medmnist", cases, class_names(cases), multilabel=width > 1)


def _faults(arrays: dict[str, NpzArray], splits: list[str]) -> list[str]:
    if not splits:
        found = ", ".join(sorted(arrays)) or "no arrays"
        return [f"there are no arrays {', '.join(f'{split}_images' for split in SPLITS)}; it holds {found}"]
    faults = []
    for split in splits:
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None:
            faults.append(f"{split}_images is missing, {split}_labels is there")
            continue
        if images.dtype != np.uint8 or len(images.shape) not in (3, 4):
            kind = f"{images.dtype} of shape {images.shape}"
            faults.append(f"{split}_images is {kind}, not uint8 (N, H, W), (N, H, W, 3) or (N, D, H, W)")
        if images.shape[:1] == (0,):
            faults.append(f"{split}_images is empty")
        if labels is None:
            faults.append(f"{split}_labels is missing")
        elif labels.dtype.kind not in "iub" or len(labels.shape) not in (1, 2):
            kind = f"{labels.dtype} of shape {labels.shape}"
            faults.append(f"{split}_labels is {kind}, not whole numbers (N, 1) or (N, K)")
        elif labels.shape[:1] != images.shape[:1]:
            faults.append(f"{split}_labels has {labels.shape[0]} rows, {split}_images has the shape {images.shape}")
    for what in ("images", "labels"):
        shapes = {arrays[f"{split}_{what}"].shape[1:] for split in splits if f"{split}_{what}" in arrays}
        if len(shapes) > 1:
            faults.append(f"{what} have different shapes in the splits: {sorted(shapes)}")
    return faults


def _label_faults(split: str, table: NDArray[np.generic]) -> list[str]:
    numbers = table.astype(np.int64)
    several = numbers.ndim == 2 and numbers.shape[1] > 1
    wrong = (numbers < 0) | (several & (numbers > 1))
    if not wrong.any():
        return []
    row = int(np.argwhere(wrong)[0][0])
    wanted = "0 or 1 for each of several labels" if several else "0 or more"
    return [f"{split}_labels has {int(wrong.sum())} values that are not {wanted}, the first in row {row}"]


def _names(path: Path, count: int) -> tuple[str, ...]:
    """Names of the classes: MedMNIST's where there are enough, else numbers of equal length, so that they sort."""
    known = CLASSES.get(path.stem.casefold().split("_")[0], ())
    return known if len(known) >= count else tuple(f"{label:0{len(str(count - 1))}d}" for label in range(count))


def _labels(values: NDArray[np.generic], names: tuple[str, ...]) -> tuple[str, ...]:
    numbers = values.astype(np.int64)
    if len(numbers) == 1:
        return (names[int(numbers[0])],)
    return tuple(sorted(name for name, present in zip(names, numbers, strict=False) if present))

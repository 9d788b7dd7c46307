"""Class folders: `DATA/benign/1.png`, or `DATA/train/benign/1.png` where the split is prescribed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.sources import IMAGE_SUFFIXES, class_names, first_few, list_images, split_of
from medtpp.errors import DataError

_EXPECTED = """Expected is a folder for each class, optionally inside train, val and test:
    DATA/benign/1.png
    DATA/malignant/2.png
or images alone, without labels:
    DATA/1.png"""


@SOURCES.register("folders")
class Folders:
    """A folder for each class; images nested deeper in it belong to the class.

    Images outside class folders are unlabelled cases. Where the folders at the top are called train, val (valid,
    validation) and test, in any case, they prescribe the split and hold the class folders.
    """

    summary: ClassVar[str] = "a folder for each class, optionally inside train, val and test; or images without labels"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Any folder will do: this layout is tried last."""
        return path.is_dir()

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read the names of all images.

        Raises:
            DataError: There is no image, split folders stand beside class folders, or several labels are asked for.
        """
        if options.multilabel:
            raise DataError(
                f"{path}: class folders give one label to each image. For several labels (data.multilabel=true) "
                "write a manifest.csv with the columns image and label."
            )
        images, others = list_images(path)
        if not images:
            found = f"only other files ({first_few(others, 3)})" if others else "nothing"
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{path} holds no images ({suffixes}), {found}.\n{_EXPECTED}")

        prescribed = _splits_prescribed(path, images)
        cases = tuple(_case(path, name, prescribed) for name in images)
        return Dataset(path, "folders", cases, class_names(cases), problems=tuple(_problems(cases, others)))


def _splits_prescribed(root: Path, images: list[str]) -> bool:
    top = {name.split("/", 1)[0] for name in images if "/" in name}
    splits = {folder for folder in top if split_of(folder)}
    if splits and splits != top:
        raise DataError(
            f"{root} holds split folders ({first_few(sorted(splits))}) beside other folders with images "
            f"({first_few(sorted(top - splits))}), so that it is not clear which are classes. "
            "Move the class folders into the split folders, move other images elsewhere, or write a manifest.csv."
        )
    return bool(splits)


def _case(root: Path, name: str, prescribed: bool) -> Case:
    parts = name.split("/")
    split = split_of(parts[0]) if prescribed and len(parts) > 1 else None
    inside = parts[1:] if split else parts
    labels = (inside[0],) if len(inside) > 1 else ()
    return Case(name, root / name, labels, labelled=bool(labels), split=split)


def _problems(cases: tuple[Case, ...], others: list[str]) -> list[Problem]:
    problems = []
    if others:
        verb = "file is" if len(others) == 1 else "files are"
        problems.append(
            Problem("warning", "not-an-image", f"{len(others)} {verb} not images, for example {others[0]}: ignored.")
        )
    stray = tuple(case.id for case in cases if not case.labelled)
    if 0 < len(stray) < len(cases):
        problems.append(
            Problem(
                "warning",
                "outside-class-folders",
                f"{len(stray)} images lie outside class folders and count as unlabelled: {first_few(stray)}.",
                stray,
            )
        )
    return problems

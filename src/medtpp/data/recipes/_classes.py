"""What recipes of class folders share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medtpp.data.recipes.base import Row, Survey, files_in


def add_class_folders(
    survey: Survey, part: str, folder: Path, classes: Sequence[str], suffixes: tuple[str, ...], split: str
) -> None:
    """Add the images of a folder that has a folder for each class.

    Args:
        survey: To add to.
        part: Which part of the download it is; that of a class is called "part/class".
        folder: Of the part.
        classes: Names of the class folders, which become labels.
        suffixes: Of images.
        split: What the data set prescribes; "" to be drawn.
    """
    for name in classes:
        if not (folder / name).is_dir():
            continue
        for path in files_in(folder / name, *suffixes):
            survey.rows.append(Row(path, label=name, split=split))
            survey.found[part].append(f"{name}/{path.name}")
            survey.found[f"{part}/{name}"].append(path.name)

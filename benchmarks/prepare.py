"""Manifests of the benchmark tasks, with one fixed split each.

    python benchmarks/prepare.py DATA OUT

DATA holds the folders `ultrasound_breast`, `xray_lung`, `mri_hippocampus`, `xray_pneumonia`, `mri_brain_tumor` and
`microscopy_wbc`; tasks whose folder is missing are left out. For each task, OUT/TASK/manifest.csv names the cases with
labels, patients and split. For the development tasks there is OUT/TASK-development/manifest.csv too, without
the test cases, split once more: defaults are chosen there, and no test case is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from medtpp.config import experiment_schema
from medtpp.workflow.prepare import prepare

DEVELOPMENT = ("ultrasound_breast", "xray_lung", "mri_hippocampus")
CONTRADICTIONS = ("benign/benign_(433).jpg", "malignant/malignant_(145).jpg")  # one picture with both labels
Row = dict[str, str]


def class_folders(folder: Path) -> Iterator[Row]:
    """A folder of images for each class; no patient is known."""
    for image in sorted(folder.glob("*/*.*")):
        if image.relative_to(folder).as_posix() not in CONTRADICTIONS:
            yield {"image": str(image), "label": image.parent.name}


def xray_lung(folder: Path) -> Iterator[Row]:
    """The suffix says whether a radiograph shows tuberculosis; the prefix names the hospital."""
    for image in sorted((folder / "images").iterdir()):
        label = {"0": "normal", "1": "tuberculosis"}[image.stem[-1]]
        yield {"image": str(image), "label": label, "patient": image.stem, "site": image.stem.split("_")[0]}


def hippocampus_slices(folder: Path, out: Path) -> Iterator[Row]:
    """Which part of the hippocampus a coronal slice goes through: one slice of each volume, by turns.

    The slice is the one in which the part is largest; volumes are cut to their 1st and 99th percentile.
    """
    import nibabel

    for number, path in enumerate(sorted((folder / "imagesTr").glob("[!.]*.nii.gz"))):
        part, label = ((1, "anterior"), (2, "posterior"))[number % 2]
        volume = nibabel.load(path).get_fdata()
        mask = nibabel.load(folder / "labelsTr" / path.name).get_fdata() == part
        at = int(mask.sum(axis=(0, 2)).argmax())
        low, high = np.percentile(volume, [1, 99])
        levels = ((volume[:, at].clip(low, high) - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
        image = out / f"{path.name.split('.')[0]}.png"
        Image.fromarray(np.rot90(levels)).save(image)
        yield {"image": str(image), "label": label, "patient": path.name.split(".")[0]}


def manifest(folder: Path) -> Iterator[Row]:
    """What the task's own manifest says."""
    table = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    columns = [name for name in ("label", "patient", "split") if name in table]
    for row in table.to_dict("records"):
        if row["label"]:
            yield {"image": str(folder / row["image"]), **{name: row[name] for name in columns}}


def write(rows: Sequence[Mapping[Any, str]], folder: Path) -> Path:
    """Write OUT/TASK/manifest.csv; a split that the task does not prescribe is drawn by medtpp with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.csv"
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False)
    if "split" not in table:
        experiment = experiment_schema().model_validate(
            {"data": {"path": str(path), "image_size": 128}, "tpp": {"enabled": False}, "tuner": {"name": "linear"}}
        )
        prepared = prepare(experiment)
        split = {str(case.image): prepared.whole_split[case.id] for case in prepared.dataset.cases}
        table["split"] = [split[image] for image in table.image]
        table.to_csv(path, index=False)
    return path


def main() -> None:
    """Write the manifests of all tasks that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    readers = {
        "ultrasound_breast": class_folders,
        "xray_lung": xray_lung,
        "mri_hippocampus": lambda folder: hippocampus_slices(folder, out / "mri_hippocampus"),
        "xray_pneumonia": manifest,
        "mri_brain_tumor": class_folders,
        "microscopy_wbc": manifest,
    }
    for task, read in readers.items():
        if not (data / task).is_dir():
            continue
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)  # slices are written there before the manifest
        table = pd.read_csv(write(list(read(data / task)), folder), dtype=str, keep_default_na=False)
        print(f"{task:20} {len(table)} cases, {(table.split == 'test').sum()} for the test")
        if task in DEVELOPMENT:
            kept = table[table.split != "test"].drop(columns="split")
            write(kept.to_dict("records"), out / f"{task}-development")


if __name__ == "__main__":
    main()

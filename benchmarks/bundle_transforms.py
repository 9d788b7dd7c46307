"""How far the preprocessing of an exported MONAI bundle is from medtpp's own, by the spacing of the scan.

    python benchmarks/bundle_transforms.py --out results/bundle_transforms.json

The scan is a smooth random phantom of 40 x 64 x 50 voxels, written as NIfTI and read by both sides; intensities end in
[0, 1].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigParser
from scipy.ndimage import gaussian_filter

from medtpp.config import Window
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.data.volumes.nifti import read_nifti
from medtpp.inference.export.bundle import IMPORTS, preprocessing_transforms

SHAPE = (40, 64, 50)  # slices, rows, columns
SPACINGS = ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.8, 0.8, 0.8), (0.6, 0.5, 0.5), (5.0, 0.8, 0.8))  # mm, in that order


def phantom(spacing: tuple[float, ...], path: Path) -> None:
    """Smoothed noise whose content fills the middle of the field of view."""
    noise = gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 2)
    window = np.hanning(SHAPE[0])[:, None, None] * np.hanning(SHAPE[1])[:, None] * np.hanning(SHAPE[2])
    values = ((noise / noise.std() + 3) * window * 100).astype(np.float32)
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = (-21.5, 13.25, 40.0)  # millimetres
    nibabel.save(nibabel.Nifti1Image(values.T, affine), path)


def difference(spacing: tuple[float, ...], path: Path) -> dict[str, Any]:
    """Mean and largest absolute difference of the prepared scans, over what both have."""
    phantom(spacing, path)
    preprocessing = VolumePreprocessing(
        patch=(8, 16, 16), spacing=(1.0, 1.0, 1.0), windows=(Window(kind="percentiles", low=0.5, high=99.5),)
    )
    ours, _ = preprocessing.apply(read_nifti(path))
    config = {"transforms": preprocessing_transforms(preprocessing), "imports": [f"${line}" for line in IMPORTS]}
    item: Any = {"image": str(path)}
    for step in ConfigParser(config).get_parsed_content("transforms"):
        item = step(item)
    theirs = item["image"].numpy()
    both = tuple(slice(min(sides)) for sides in zip(ours.shape, theirs.shape, strict=True))
    gap = np.abs(ours[both].astype(np.float32) - theirs[both])
    shapes = {"medtpp": list(ours.shape), "bundle": list(theirs.shape)}
    return {"spacing": spacing, "mean": float(gap.mean()), "largest": float(gap.max()), "shapes": shapes}


def main() -> None:
    """Print a line for each spacing; write them with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [difference(spacing, Path(name) / "scan.nii.gz") for spacing in SPACINGS]
    for row in rows:
        print(f"{row['spacing']!s:18} mean {row['mean']:.4f} largest {row['largest']:.4f} {row['shapes']}")
    if options.out:
        options.out.write_text(json.dumps({"shape": SHAPE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Memory and time to segment one large CT: what a hospital's machine must have.

    python benchmarks/large_scan.py --out results/large_scan.json

The scan is a phantom of 300 slices of 512 x 512 pixels, 1 x 0.7 x 0.7 mm, as a compressed NIfTI file. The adapter is
the embedded backbone inflated to patches of 4 x 8 x 8 voxels, LoRA and a UNETR decoder with two structures at --spacing
mm, not trained: time and memory do not depend on the weights, but the mask is noise, which compresses worst. A new
process predicts, and tells its peak of resident memory and the seconds of waiting, predicting and writing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

import medtpp
from medtpp import backbones, tuners
from medtpp.adapter import AdapterCard, BackboneCard, TaskCard, make_task, save_adapter
from medtpp.config import TASKS, TUNERS, BackboneOptions, Window
from medtpp.data.volume_plan import VOXELS, patch_shape
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.seeds import Seeds
from medtpp.training.memory import PeakMemory

SHAPE, SPACING = (300, 512, 512), (1.0, 0.7, 0.7)  # slices, rows, columns; mm
PATCH_SIZE = (4, 8, 8)


def write_scan(path: Path) -> None:
    """A body of soft tissue with noise in air, in HU."""
    rng = np.random.default_rng(0)
    axes = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in SHAPE[1:])]
    body = (axes[0] / 0.6) ** 2 + (axes[1] / 0.85) ** 2 < 1
    values = np.full(SHAPE, -1000, np.int16)
    for plane in values:
        plane[body] = (gaussian_filter(rng.standard_normal(SHAPE[1:]), 3)[body] * 400 + 40).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values.T, np.diag([*SPACING[::-1], 1.0])), path)


def write_adapter(folder: Path, spacing: float) -> tuple[int, ...]:
    """Save an adapter that nobody trained; returns its patch."""
    wanted = (spacing,) * 3
    shape = tuple(round(size * step / spacing) for size, step in zip(SHAPE, SPACING, strict=True))
    preprocessing = VolumePreprocessing(
        patch=patch_shape(shape, wanted, PATCH_SIZE, VOXELS),
        spacing=wanted,
        windows=(Window(kind="fixed", low=-1000, high=400),),
    )
    options = BackboneOptions(name="medtpp_vit_tiny", dims=3, patch_size=PATCH_SIZE)
    seeds, tuner = Seeds(0), TUNERS.get("lora").Options()
    backbone = tuners.attach(backbones.load(options, image_size=preprocessing.patch), tuner, seed=seeds)
    task = TaskCard(
        options=TASKS.get("segmentation").Options().model_dump(mode="json"),
        classes=("organ", "lesion"),
        multilabel=False,
        mask_values=((1,), (2,)),
    )
    spec = backbone.spec
    card = AdapterCard(
        backbone=BackboneCard(
            options=backbone.options, architecture=options.name, image_size=spec.image_size, sha256=spec.sha256
        ),
        tuner=tuner.model_dump(mode="json"),
        preprocessing=preprocessing,
        modality="ct",
        seed=0,
        task=task,
    )
    save_adapter(folder, backbone, card, make_task(task, backbone, seeds))
    return preprocessing.patch


def segment(folder: Path, threads: int) -> dict[str, Any]:
    """Peak memory of this process in MiB, and seconds by what they were spent on."""
    torch.set_num_threads(threads)
    memory = PeakMemory(torch.device("cpu"))
    adapter = medtpp.load_adapter(folder / "adapter")
    began = time.perf_counter()
    done = medtpp.predict(adapter, folder / "scans", folder / "masks")
    return {
        "seconds": {"all": time.perf_counter() - began, **done.seconds},
        "peak_memory_mib": memory.mib(),
        "done": done.done,
    }


def main() -> None:
    """Print the figures; write them with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spacing", type=float, default=1.5, help="mm, in all directions, that the network sees")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scans").mkdir()
        write_scan(folder / "scans" / "ct.nii.gz")
        patch = write_adapter(folder / "adapter", options.spacing)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(segment, folder, threads).result()
    found = {
        "scan": {"shape": SHAPE, "spacing": SPACING},
        "network": {"spacing": options.spacing, "patch": patch},
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": threads,
            "torch": torch.__version__,
        },
        **figures,
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

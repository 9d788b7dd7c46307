"""Augmentation of images with masks, one thread on the CPU: medtpp's whole batches against MONAI's single samples.

python benchmarks/augmentation.py --out augmentation.json

Both sides do the same kinds of things with the same strengths and probabilities. MONAI resamples once for the affine
and once for the elastic map, as `Compose` has it; its samples come through a `DataLoader` without workers. "usual" are
medtpp's defaults for segmentation, each effect with its small probability; "everything" is every effect on every case.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from monai import transforms as mt
from monai.data import DataLoader, Dataset
from monai.utils import set_determinism

from _common import interleaved, ratios, summary
from medtpp.config import AugmentOptions
from medtpp.data.augment import Augmenter, resolve
from medtpp.data.augment.rows import number
from medtpp.seeds import Seeds
from medtpp.training.device import describe_machine

SHAPES = {"32 x 1 x 128 x 128": (32, 1, 128, 128), "8 x 1 x 64 x 64 x 64": (8, 1, 64, 64, 64)}
PROBABILITIES = [
    f"{effect}_probability" for effect in ("affine", "elastic", "blur", "low_resolution", "noise", "intensity")
]
CASES = {"usual": AugmentOptions(), "everything": AugmentOptions(**dict.fromkeys(PROBABILITIES, 1.0))}
PACKAGES = ("medtpp", "monai", "torch", "numpy", "scipy")
KEYS = ["image", "mask"]
MODES = ["bilinear", "nearest"]


def monai_transforms(options: AugmentOptions, spatial: tuple[int, ...]) -> Any:
    """The same effects from MONAI."""
    dims = len(spatial)
    angle, amount = math.radians(number(options.rotation)), number(options.intensity)
    scale, shear, blur = number(options.scaling) / 2, number(options.shear), number(options.blur)
    lit = number(options.intensity_probability)
    elastic: dict[str, Any] = {"prob": options.elastic_probability, "mode": MODES, "padding_mode": "border"}
    return mt.Compose(
        [
            mt.RandAffined(
                KEYS,
                prob=1 - (1 - options.affine_probability) ** 3,
                rotate_range=[angle] * (2 * dims - 3),
                scale_range=[scale] * dims,
                shear_range=[shear] * (dims * (dims - 1)),
                mode=MODES,
                padding_mode="border",
            ),
            mt.Rand3DElasticd(KEYS, sigma_range=(5, 8), magnitude_range=(50, 150), **elastic)
            if dims == 3
            else mt.Rand2DElasticd(KEYS, spacing=(32, 32), magnitude_range=(1, 3), **elastic),
            mt.RandGaussianSmoothd("image", *[(blur / 2, blur)] * dims, prob=options.blur_probability),
            mt.RandSimulateLowResolutiond(
                "image",
                prob=options.low_resolution_probability,
                zoom_range=(1 - number(options.low_resolution), 1),
                upsample_mode="trilinear" if dims == 3 else "bilinear",
            ),
            mt.RandGaussianNoised("image", std=number(options.noise), prob=options.noise_probability),
            mt.RandScaleIntensityd("image", factors=amount, prob=lit),
            mt.RandScaleIntensityFixedMeand("image", factors=amount, prob=lit),
            mt.RandAdjustContrastd("image", gamma=(1 - amount, 1 + amount), prob=lit),
        ]
    )


def arms(options: AugmentOptions, shape: tuple[int, ...], batches: int) -> dict[str, Callable[[], float]]:
    """Functions that return images per second."""
    count, _, *spatial = shape
    options = resolve(options, "ct", "segmentation")
    images = torch.nn.functional.interpolate(torch.rand(count, 1, *[5] * len(spatial)), spatial)
    masks = (images > 0.5).byte()
    augment = Augmenter(options, "ct", "segmentation")
    samples = Dataset(
        [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)],
        monai_transforms(options, tuple(spatial)),
    )
    loader = DataLoader(samples, batch_size=count, num_workers=0)
    epoch = 0

    def medtpp_batches() -> Iterator[Any]:
        nonlocal epoch
        for _ in range(batches):
            epoch += 1
            yield augment(images, Seeds(0).draws(torch.full((count,), epoch), torch.arange(count)), masks[:, 0])

    def monai_batches() -> Iterator[Any]:
        for _ in range(batches):
            yield from loader

    def rate(run: Callable[[], Iterator[Any]]) -> float:
        began = perf_counter()
        for _ in run():
            pass
        return batches * count / (perf_counter() - began)

    return {"medtpp": lambda: rate(medtpp_batches), "MONAI": lambda: rate(monai_batches)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    set_determinism(0)
    warnings.filterwarnings("ignore")
    table: dict[str, dict[str, Any]] = {}
    print(f"{'images/s':<40}{'medtpp':>10}{'MONAI':>10}{'ratio':>10}")
    for shape_name, shape in SHAPES.items():
        for name, options in CASES.items():
            sides = arms(options, shape, args.batches)
            interleaved(sides, 1)  # first allocations
            results = interleaved(sides, args.repeats)
            ratio = summary(ratios(results, "medtpp", "MONAI"))
            table[f"{shape_name}, {name}"] = {**results, "ratio": ratio}
            medians = "".join(f"{summary(results[side]):>10.4g}" for side in sides)
            print(f"{shape_name + ', ' + name:<40}{medians}{ratio:>10.3g}", flush=True)
    if args.out:
        machine = describe_machine("cpu", PACKAGES)
        args.out.write_text(json.dumps({"machine": machine, "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()

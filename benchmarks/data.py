"""How fast images get to the model: cache build and opening, batches, augmentation.

python benchmarks/data.py --images 512 --out data.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from medtpp.config import AugmentOptions
from medtpp.data.augment import Augmenter
from medtpp.data.batches import BatchStream
from medtpp.data.cache import build
from medtpp.data.case import Case
from medtpp.data.preprocess import Preprocessing
from medtpp.seeds import Seeds, name_key


def make_radiographs(folder: Path, count: int) -> list[Case]:
    """Grey JPEG files of 1024 x 900 pixels: soft shapes with film grain."""
    rng = np.random.default_rng(0)
    cases = []
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (9, 10), dtype=np.uint8)).resize((1024, 900))
        grainy = np.asarray(shapes) + rng.normal(0, 4, (900, 1024))
        path = folder / f"{number}.jpg"
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        cases.append(Case(id=path.name, image=path))
    return cases


def measure(count: int, size: int, channels: int, batch_size: int, steps: int) -> dict[str, float]:
    """Images per second of each stage, and the seconds that opening a ready cache takes."""
    with tempfile.TemporaryDirectory() as name:
        cases = make_radiographs(Path(name), count)
        preprocessing = Preprocessing(image_size=size, channels=channels)
        began = perf_counter()
        build(cases, preprocessing, Path(name) / "cache")
        built = perf_counter()
        cache = build(cases, preprocessing, Path(name) / "cache")
        opened = perf_counter()

        rows = np.array([cache.row[case.id] for case in cases])
        keys = np.array([name_key(case.id) for case in cases])
        stream = BatchStream(cache.images, rows, keys, None, batch_size, Seeds(0))
        batches = list(stream.iterate(0, steps))
        read = perf_counter()

        augment = Augmenter(AugmentOptions(), "pathology")
        floats = [batch.images.float() / 255 for batch in batches]
        augment(floats[0], batches[0].draws)
        ready = perf_counter()
        for images, batch in zip(floats, batches, strict=True):
            augment(images, batch.draws)
        augmented = perf_counter()
    seen = steps * batch_size
    return {
        "cache build, images/s": count / (built - began),
        "cache open, s": opened - built,
        "batches, images/s": seen / (read - opened),
        "augmentation, images/s": seen / (augmented - ready),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--channels", type=int, choices=[1, 3], default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = measure(args.images, args.size, args.channels, args.batch_size, args.steps)
    for name, value in numbers.items():
        print(f"{name:<24}{value:>10.3g}")
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.write_text(json.dumps({"settings": settings, "results": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What the benchmarks share: sizes, timing, memory, radiographs as JPEG files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from medtpp.data.phantom import generate
from medtpp.training.memory import PeakMemory

PACKAGES = ("medtpp", "torch", "torchvision", "timm", "peft", "lightning", "transformers", "accelerate", "pillow")
SKIPPED = 2  # steps before the clock starts: first allocations, and the checks that `fit` makes in them


@dataclass(frozen=True)
class Sizes:
    """One set of sizes for both sides. The rest of the network is timm's `architecture`.

    Attributes:
        architecture: Of the encoder.
        width, depth, heads: Of that architecture; `check_work` compares them with the networks themselves.
        image_size, patch: In pixels.
        batch: Images per step.
        decoder_width, decoder_depth: Of MAE's decoder; heads have 32 channels.
        mask_ratio: Share of the patches that is hidden.
        rank: Of LoRA.
        files: Number of JPEG files, a multiple of `batch`.
        file_size: Height and width of a file in pixels.
        device: "cpu" or "cuda".
        precision: "32", "bf16" or "16".
    """

    device: str
    precision: str
    architecture: str = "vit_small_patch16_224"
    width: int = 384
    depth: int = 12
    heads: int = 6
    image_size: int = 224
    patch: int = 16
    batch: int = 32
    decoder_width: int = 128
    decoder_depth: int = 2
    mask_ratio: float = 0.75
    rank: int = 8
    files: int = 512
    file_size: tuple[int, int] = (900, 1024)


def quick(device: str, precision: str) -> Sizes:
    """Sizes for trying the script out."""
    return Sizes(
        device,
        precision,
        architecture="vit_tiny_patch16_224",
        width=192,
        heads=3,
        image_size=96,
        batch=8,
        files=32,
        file_size=(300, 340),
    )


class Clock:
    """Notes the time at some steps, with the device's work done.

    Args:
        at: Steps to note.
        device: Of the work.
    """

    def __init__(self, at: list[int], device: str) -> None:
        self.at = at
        self.device = device
        self.times: list[float] = []

    def step(self, done: int) -> None:
        """Call after each step."""
        if done in self.at:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def steady_rate(train: Callable[[int, Clock], Any], sizes: Sizes, steps: int) -> float:
    """Images per second of `train(steps in all, clock)`, without its first steps."""
    clock = Clock([SKIPPED, SKIPPED + steps], sizes.device)
    train(SKIPPED + steps, clock)
    began, ended = clock.times
    return steps * sizes.batch / (ended - began)


def interleaved(arms: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each arm's results. The arms take turns in changing order, so that other load on the machine meets all."""
    results: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms)[:: -1 if repeat % 2 else 1]:
            results[name].append(arms[name]())
    return results


def ratios(results: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Ratio of two arms in each repetition."""
    return [a / b for a, b in zip(results[above], results[below], strict=True)]


def peak_growth(train: Callable[[], Any], device: str) -> float:
    """MiB that training adds at its peak: allocated on the GPU in all, or resident memory on top of what was there."""
    memory = PeakMemory(torch.device(device))
    train()
    return memory.added_mib()


def summary(values: list[float]) -> float:
    """The median, to four digits."""
    return float(f"{median(values):.4g}")


def make_radiographs(folder: Path, count: int, file_size: tuple[int, int]) -> list[Path]:
    """Grey JPEG files of chest phantoms, enlarged, with film grain of their own."""
    height, width = file_size
    films = generate(min(count, 64), 256).images
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        film = Image.fromarray(films[number % len(films)]).resize((width, height), Image.Resampling.BICUBIC)
        grainy = np.asarray(film) + rng.normal(0, 3, (height, width))
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(np.rint(grainy.clip(0, 255)).astype(np.uint8)).save(paths[-1], quality=90)
    return paths

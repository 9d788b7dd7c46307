"""What the library calls refuse before they start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from medtpp.errors import ConfigError, MedtppError, OutputError
from medtpp.tasks.base import Task
from medtpp.tuners import TunedBackbone


@contextmanager
def training(what: str) -> Iterator[None]:
    """Inside, gradients are computed, also in a script that has turned them off.

    Raises:
        ConfigError: In torch.inference_mode, of which there is no such way out.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(f"{what} trains, which torch.inference_mode() forbids: call it outside.")
    with torch.enable_grad(), in_python():
        yield


@contextmanager
def in_python() -> Iterator[None]:
    """Options of the command line in messages of errors become the arguments that they are in Python."""
    try:
        yield
    except MedtppError as error:
        error.message = re.sub(r"--(resume|overwrite)\b", r"\1=True", error.message)
        error.message = re.sub(r"(--set )?hardware\.precision=(\w+)", r'precision="\2"', error.message)
        error.args = type(error)(error.message, error.problems).args
        raise


def check_labelled(images: object, labels: Sequence[str], task: type[Task], dims: int) -> tuple[str, ...]:
    """The classes among the labels of images, sorted.

    Args:
        images: As the user gave them.
        labels: One for each.
        task: What is to be learnt.
        dims: Of space, that the model takes.

    Raises:
        ConfigError: Images are no tensor (N, C, *spatial), or not as many as labels; labels are no names, or all the
            same; or the task is segmentation.
    """
    shape = "(N, C, H, W)" if dims == 2 else "(N, C, D, H, W)"
    if not isinstance(images, Tensor):
        advice = (
            "torch.from_numpy(images).float()"
            if type(images).__module__ == "numpy"
            else "torch.stack([image for image, _ in images]) of a Dataset of pairs"
        )
        raise ConfigError(
            f"medtpp.finetune takes a tensor {shape}; images are of type {type(images).__name__}: {advice}."
        )
    if images.ndim != 2 + dims:
        raise ConfigError(f"medtpp.finetune takes images {shape} for this model, not {tuple(images.shape)}.")
    if task.dense:
        raise ConfigError(
            "medtpp.finetune learns classes of images in memory. For segmentation use medtpp.run, on a folder of "
            "images and masks."
        )
    if len(images) != len(labels):
        raise ConfigError(f"There are {len(images)} images and {len(labels)} labels.")
    if not all(isinstance(label, str) for label in labels):
        raise ConfigError(
            f"Labels are names of classes; here is a {type(labels[0]).__name__}. Numbers become names by "
            "[names[number] for number in labels]."
        )
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ConfigError(f"At least two classes are needed; the labels hold {', '.join(classes) or 'none'}.")
    return classes


def check_empty(folder: Path) -> None:
    """Raise OutputError where a folder holds something that nobody asked to replace."""
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"The folder {folder} is not empty. Replace it with overwrite=True, or name another one.")


def check_saved(model: TunedBackbone, channels: int | None) -> tuple[int, int]:
    """The side of the images and their channels, as an adapter folder of this model names them.

    Args:
        model: Tuned.
        channels: Of the images; None for those that it was trained on.

    Raises:
        ConfigError: The model takes no square images of two dimensions, or channels are not known or neither 1 nor 3.
    """
    size = model.spec.image_size
    if len(size) != 2 or size[0] != size[1]:
        raise ConfigError(
            f"medtpp.save writes adapters of square 2D images; this model takes {'x'.join(map(str, size))}. "
            + ("For volumes use medtpp.run." if len(size) == 3 else "Give medtpp.load one number as image_size.")
        )
    channels = model.seen_channels if channels is None else channels
    if channels is None:
        raise ConfigError("Say how many channels the images have: medtpp.save(..., channels=1) for grey, 3 for colour.")
    if channels not in (1, 3):
        raise ConfigError(
            f"medtpp.save writes adapters of grey images (channels=1) and of colour (channels=3), not of {channels} "
            "channels."
        )
    return size[0], channels

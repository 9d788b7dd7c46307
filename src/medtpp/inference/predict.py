"""Probabilities for images: of a cache, or of files that were never seen before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.adapter import Adapter
from medtpp.backbones import Backbone
from medtpp.data.case import Case
from medtpp.data.decode import decode, read_bytes
from medtpp.data.preprocess import Preprocessing
from medtpp.data.sources import list_images
from medtpp.errors import DataError, WeightsError
from medtpp.evaluation import Predictions
from medtpp.tasks.base import Task

BATCH = 64


@torch.no_grad()
def predict_rows(
    backbone: Backbone,
    task: Task,
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Logits (n, K) of some rows of an image cache, in their order, in float32 on the CPU.

    Args:
        backbone: Tuned, on `device`.
        task: With its head, on `device`.
        images: (N, C, S, S) uint8.
        rows: (n,) which of them.
        device: Where to compute.
        autocast: For lower precision; float32 by default.
    """
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = torch.from_numpy(images[rows[start : start + BATCH]]).to(device).float() / 255
        with autocast():
            parts.append(task(backbone.encode(batch)).float().cpu())
    return torch.cat(parts)


def as_predictions(
    cases: Sequence[Case], split: str, probabilities: Tensor, classes: tuple[str, ...], *, multilabel: bool
) -> Predictions:
    """A table of predictions for cases of one split."""
    return Predictions(
        cases=tuple(case.id for case in cases),
        split=(split,) * len(cases),
        patients=tuple(case.patient for case in cases),
        sites=tuple(case.site for case in cases),
        labels=tuple(case.labels if case.labelled else None for case in cases),
        classes=classes,
        probabilities=probabilities.numpy(),
        multilabel=multilabel,
    )


def image_cases(paths: Sequence[Path]) -> list[Case]:
    """Cases for image files, and for all images in folders; ids are the paths as given.

    Raises:
        DataError: A path does not exist, a folder holds no images, or there is none at all.
    """
    cases: dict[str, Case] = {}
    wrong = []
    for path in paths:
        names = list_images(path)[0] if path.is_dir() else []
        if not path.exists():
            wrong.append(f"{path} does not exist")
        elif path.is_dir() and not names:
            wrong.append(f"{path} holds no images")
        for image in [path / name for name in names] if path.is_dir() else [path]:
            cases.setdefault(image.as_posix(), Case(image.as_posix(), image))
    if wrong:
        raise DataError("There is nothing to predict in:", wrong)
    return list(cases.values())


@dataclass(frozen=True)
class FilePredictions:
    """What `predict_files` gives.

    Attributes:
        predictions: Of the readable files; None where there is none.
        unreadable: Files with the reason.
    """

    predictions: Predictions | None
    unreadable: dict[str, str]


@torch.no_grad()
def predict_files(
    adapter: Adapter,
    cases: Sequence[Case],
    *,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> FilePredictions:
    """Probabilities of image files. Memory is bounded by the batch; unreadable files are listed and the rest is done.

    Raises:
        WeightsError: The adapter has no head.
    """
    task, card = adapter.task, adapter.card
    if task is None or card.task is None:
        raise WeightsError("This adapter was pre-trained (TPP) but not fine-tuned, so it predicts nothing yet.")
    adapter.backbone.to(device)
    task.to(device)
    unreadable: dict[str, str] = {}
    readable: list[Case] = []
    parts: list[Tensor] = []
    pending: list[NDArray[np.uint8]] = []

    def flush() -> None:
        if pending:
            batch = torch.from_numpy(np.stack(pending)).to(device).float() / 255
            parts.append(task.probabilities(task(adapter.backbone.encode(batch))).cpu())
            pending.clear()

    for done, (case, prepared) in enumerate(_prepared(cases, card.preprocessing), start=1):
        if isinstance(prepared, str):
            unreadable[case.id] = prepared
        else:
            readable.append(case)
            pending.append(prepared)
        if len(pending) == BATCH:
            flush()
        if progress:
            progress(done, len(cases))
    flush()
    if not readable:
        return FilePredictions(None, unreadable)
    predictions = as_predictions(readable, "", torch.cat(parts), card.task.classes, multilabel=card.task.multilabel)
    return FilePredictions(predictions, unreadable)


def _prepared(cases: Sequence[Case], preprocessing: Preprocessing) -> Iterator[tuple[Case, NDArray[np.uint8] | str]]:
    """Each case with its prepared image, or the reason why there is none; a few images are decoded ahead."""

    def prepare(path: Path) -> NDArray[np.uint8] | str:
        try:
            return preprocessing.apply(decode(read_bytes(path)))
        except DataError as error:
            return error.message

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: deque[tuple[Case, Future[NDArray[np.uint8] | str]]] = deque()
        try:
            for case in cases:
                ahead.append((case, pool.submit(prepare, case.image)))
                if len(ahead) > 2 * BATCH:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

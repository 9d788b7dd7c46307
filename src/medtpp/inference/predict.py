"""Class probabilities for images and scans that were never seen before."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.adapter import Adapter
from medtpp.data.case import Case
from medtpp.data.decode import decode, read_bytes
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import DataError, WeightsError
from medtpp.evaluation import Predictions
from medtpp.inference.ensemble import check_alike, head
from medtpp.inference.scans import ahead, read_ahead, reason
from medtpp.inference.stored import network, over_patches

BATCH = 64


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
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    *,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> FilePredictions:
    """Probabilities of images or scans. Memory is bounded by the batch; unreadable files are listed, the rest is done.

    Args:
        adapters: On `device`; probabilities are the mean of theirs.
        cases: What to predict.
        device: Where to compute.
        progress: Called with the numbers of cases done and in all.

    Raises:
        WeightsError: The adapters have no head for classification, or differ.
    """
    check_alike(adapters, [f"adapter {number}" for number in range(1, len(adapters) + 1)])
    task, card = head(adapters[0])
    if task.dense:
        raise WeightsError("This adapter segments: it has no probabilities of images to give.")
    preprocessing = adapters[0].card.preprocessing
    members = [(network(one.backbone, head(one)[0], device=device), head(one)[0]) for one in adapters]
    unreadable: dict[str, str] = {}
    readable: list[Case] = []
    parts: list[Tensor] = []

    def flush(arrays: list[NDArray[Any]]) -> None:
        if not arrays:
            return
        found = []
        for logits, task in members:
            if isinstance(preprocessing, Preprocessing):
                values = logits(np.stack(arrays))
            else:
                values = torch.stack([over_patches(array, preprocessing.patch, logits) for array in arrays])
            found.append(task.probabilities(values))
        parts.append(torch.stack(found).mean(dim=0))
        arrays.clear()

    pending: list[NDArray[Any]] = []
    at_once = BATCH if isinstance(preprocessing, Preprocessing) else 1
    with closing(_arrays(cases, preprocessing)) as arrays:
        for done, (case, array) in enumerate(arrays, start=1):
            if isinstance(array, DataError):
                unreadable[case.id] = reason(case, array)
            else:
                readable.append(case)
                pending.append(array)
            del array
            if len(pending) == at_once:
                flush(pending)
            if progress:
                progress(done, len(cases))
    flush(pending)
    if not readable:
        return FilePredictions(None, unreadable)
    predictions = as_predictions(readable, "", torch.cat(parts), card.classes, multilabel=card.multilabel)
    return FilePredictions(predictions, unreadable)


def _arrays(
    cases: Sequence[Case], preprocessing: Preprocessing | VolumePreprocessing
) -> Generator[tuple[Case, NDArray[Any] | DataError]]:
    """Each case as the network sees it, or why it cannot; a few are decoded ahead."""
    if isinstance(preprocessing, VolumePreprocessing):
        for case, scan in read_ahead(cases, preprocessing):
            yield case, scan if isinstance(scan, DataError) else scan.array
        return

    def prepare(case: Case) -> NDArray[Any] | DataError:
        try:
            return preprocessing.apply(decode(read_bytes(case.image)))
        except DataError as error:
            return error

    yield from ahead(prepare, cases, workers=os.cpu_count() or 1, depth=2 * BATCH)

"""Test cases predicted and scored, by task. Guards against leaks are the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medtpp.adapter import Adapter
from medtpp.data.cache import ImageCache
from medtpp.data.case import Case
from medtpp.data.geometry import Volume
from medtpp.data.restore import Restore
from medtpp.data.store import VolumeStore
from medtpp.data.volume_preprocess import VolumePreprocessing, label_mask, scale
from medtpp.evaluation import (
    Evaluation,
    SegmentationEvaluation,
    Thresholds,
    as_segmentations,
    compare_masks,
    confident_mistakes,
    evaluate,
    evaluate_segmentation,
    positive_class,
    write_mistakes,
    write_predictions,
    write_segmentations,
)
from medtpp.evaluation.overlays import Kind, Picture, choose_cases, draw_overlay, write_overlays
from medtpp.inference.predict import as_predictions
from medtpp.inference.sliding import SlidingWindow
from medtpp.inference.stored import classify, planes, sliding_window
from medtpp.training.device import choose_accelerator
from medtpp.workflow.images import READER
from medtpp.workflow.prepare import Prepared


def classified(
    prepared: Prepared,
    loaded: Adapter,
    folder: Path,
    *,
    seed: int,
    resamples: int,
    notes: Sequence[str],
    pictures: bool,
) -> Evaluation:
    """Write predictions.csv, evaluation.json, and with `pictures` the most confident mistakes.

    Args:
        prepared: The data.
        loaded: An adapter with a head for classification.
        folder: Of the results.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
        notes: What a reader must know beforehand.
        pictures: Write images of mistakes.
    """
    card, task = loaded.card.task, loaded.task
    assert card is not None
    assert task is not None
    device = _onto_device(prepared, loaded)
    data = prepared.data(prepared.cases("test"))
    logits = classify(loaded.backbone, task, data.store, data.rows, device=device)
    predictions = as_predictions(
        data.cases, "test", task.probabilities(logits), card.classes, multilabel=card.multilabel
    )
    write_predictions(folder / "predictions.csv", predictions)
    evaluation = evaluate(
        predictions,
        thresholds=Thresholds(card.thresholds, card.threshold_notes),
        positive=positive_class(predictions, card.positive),
        resamples=resamples,
        seed=seed,
        notes=notes,
    )
    if pictures and isinstance(data.store, ImageCache):
        worst = confident_mistakes(predictions, evaluation.thresholds)
        images = [data.store.images[data.rows[mistake.row]] for mistake in worst]
        write_mistakes(folder / "mistakes", worst, images)
    evaluation.save(folder)
    return evaluation


def segmented(
    prepared: Prepared,
    loaded: Adapter,
    folder: Path,
    *,
    seed: int,
    resamples: int,
    notes: Sequence[str],
    pictures: bool,
) -> SegmentationEvaluation:
    """Write segmentation.csv, evaluation.json, and with `pictures` overlays of the best, median and worst cases.

    Masks are compared on the scans' own grids, as they were drawn. Arguments as for `classified`.
    """
    assert loaded.task is not None
    device = _onto_device(prepared, loaded)
    store = prepared.store
    if not isinstance(store, VolumeStore):
        raise TypeError("there are no masks in an image cache")
    window = sliding_window(loaded.backbone, loaded.task, store.preprocessing.patch, device=device)
    cases, structures = prepared.cases("test"), prepared.dataset.structures
    split = partial(planes, structures=len(structures), overlapping=window.overlapping)
    known = all(_restore(store, case).geometry.known for case in cases)
    agreements = []
    for case in cases:
        predicted, true = _masks(prepared, store, window, case)
        spacing = _restore(store, case).geometry.spacing if known else None
        pairs = zip(split(predicted), split(true), strict=True)
        agreements.append([compare_masks(one, other, spacing=spacing) for one, other in pairs])
    names = [structure.name for structure in structures]
    table = as_segmentations(cases, ["test"] * len(cases), agreements, names, unit="mm" if known else "px")
    write_segmentations(folder / "segmentation.csv", table)
    evaluation = evaluate_segmentation(table, resamples=resamples, seed=seed, notes=notes)
    if pictures:

        def draw(row: int) -> list[Picture]:
            predicted, true = _masks(prepared, store, window, cases[row])  # once more: to keep all takes much memory
            volume = READER.volume(cases[row])
            return draw_overlay(_shown(volume, store.preprocessing), true, predicted, volume.geometry, split)

        chosen: dict[Kind, int] = choose_cases(table)
        write_overlays(folder / "overlays", table, ((kind, row, draw(row)) for kind, row in chosen.items()))
    evaluation.save(folder)
    return evaluation


def _onto_device(prepared: Prepared, loaded: Adapter) -> torch.device:
    device = torch.device(choose_accelerator(prepared.experiment.hardware.accelerator))
    loaded.backbone.to(device)
    if loaded.task is not None:
        loaded.task.to(device)
    return device


def _restore(store: VolumeStore, case: Case) -> Restore:
    restore = store.records[store.row[case.id]].restore
    if restore is None:
        raise TypeError(f"{case.id} was not prepared")
    return restore


def _masks(
    prepared: Prepared, store: VolumeStore, window: SlidingWindow, case: Case
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The predicted and the true mask of a case on its scan's own grid: (*spatial), as `label_mask` numbers them."""
    restore = _restore(store, case)
    if case.mask is None:
        raise TypeError(f"{case.id} has no mask")
    predicted = window.scan_labels(store.image(store.row[case.id]), restore)
    return predicted, label_mask(READER.mask(case.mask, restore.geometry), prepared.dataset.structures)


def _shown(volume: Volume, preprocessing: VolumePreprocessing) -> NDArray[np.float32]:
    """The first channel (*spatial) in [0, 1], as the network's window shows it; of photographs the colours, too.

    Colours are (*spatial, 3), and all in one window, so that they keep their hue.
    """
    coloured = volume.units == "levels" and len(volume.array) == 3
    array: NDArray[Any] = np.moveaxis(volume.array, 0, -1) if coloured else volume.array[0]
    return scale(array.astype(np.float32), preprocessing.windows[0], preprocessing.air)

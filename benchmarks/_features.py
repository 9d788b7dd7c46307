"""Frozen features, and what they are worth with few labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from medtpp.backbones import Backbone
from medtpp.data.cache import ImageCache
from medtpp.evaluation.probe import few_label_auc
from medtpp.workflow.prepare import Prepared

DRAWS, PER_CLASS = 30, 10


@torch.no_grad()
def features(backbone: Backbone, cache: ImageCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, D) mean-pooled patch tokens."""
    parts = []
    for start in range(0, len(rows), 64):
        images = torch.from_numpy(cache.images[rows[start : start + 64]]).float() / 255
        parts.append(backbone.encode(images).pooled("mean"))
    return torch.cat(parts).numpy()


def probed(backbone: Backbone, prepared: Prepared) -> float:
    """Mean macro AUC of a linear probe that gets 10 labels per class of the training cases, over 30 draws of them.

    It is measured on the validation and test cases.
    """
    if not isinstance(prepared.store, ImageCache):
        raise SystemExit(f"{prepared.dataset.root} holds volumes; the probe takes images.")
    cases = [case for case in prepared.dataset.cases if case.id in prepared.whole_split]
    labels = np.array([prepared.dataset.classes.index(case.labels[0]) for case in cases])
    pool = np.array([prepared.whole_split[case.id] == "train" for case in cases])
    values = features(backbone, prepared.store, prepared.data(cases).rows)
    return float(np.mean([few_label_auc("linear", values, labels, PER_CLASS, draw, pool) for draw in range(DRAWS)]))

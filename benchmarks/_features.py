"""Frozen features, and what they are worth with few labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtpp.backbones import Backbone
from medtpp.data.cache import ImageCache

CLASSIFIERS = {
    "linear": lambda: LogisticRegression(max_iter=1000),
    "k-NN": lambda: KNeighborsClassifier(n_neighbors=5, metric="cosine", weights="distance"),
}


@torch.no_grad()
def features(backbone: Backbone, cache: ImageCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, D) mean-pooled patch tokens."""
    parts = []
    for start in range(0, len(rows), 64):
        images = torch.from_numpy(cache.images[rows[start : start + 64]]).float() / 255
        parts.append(backbone.encode(images).pooled("mean"))
    return torch.cat(parts).numpy()


def few_label_auc(
    classifier: str,
    values: NDArray[np.float32],
    labels: NDArray[np.int64],
    per_class: int,
    draw: int,
    pool: NDArray[np.bool_] | None = None,
) -> float:
    """Macro AUC (one against rest) of a classifier on standardised features, for one draw of labels.

    Args:
        classifier: "linear" or "k-NN".
        values: (n, D).
        labels: (n,) numbers of the classes.
        per_class: How many cases of each class are drawn.
        draw: Seed of the draw.
        pool: (n,) the cases to draw from; the AUC is then of the others. By default all, and of those not drawn.
    """
    rng = np.random.default_rng(draw)
    there = np.ones(len(labels), dtype=bool) if pool is None else pool
    classes = np.unique(labels)
    train = np.concatenate(
        [rng.choice(np.flatnonzero((labels == k) & there), per_class, replace=False) for k in classes]
    )
    test = np.setdiff1d(np.arange(len(labels)), train) if pool is None else np.flatnonzero(~pool)
    model = make_pipeline(StandardScaler(), CLASSIFIERS[classifier]()).fit(values[train], labels[train])
    scores = model.predict_proba(values[test])
    return float(roc_auc_score(labels[test], scores[:, 1] if len(classes) == 2 else scores, multi_class="ovr"))

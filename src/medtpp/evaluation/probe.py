"""What features are worth: simple classifiers on features that stand still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

CLASSIFIERS = {
    "linear": lambda: LogisticRegression(max_iter=1000),
    "k-NN": lambda: KNeighborsClassifier(n_neighbors=5, metric="cosine", weights="distance"),
}


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
    return _macro_auc(labels[test], _model(classifier).fit(values[train], labels[train]).predict_proba(values[test]))


def across_patients_auc(
    values: NDArray[np.float32], labels: NDArray[np.int64], patients: Sequence[str], folds: int
) -> float:
    """Macro AUC of the linear classifier, each case scored by one that was fitted without its patient.

    Args:
        values: (n, D).
        labels: (n,) numbers of the classes, each of at least `folds` patients.
        patients: n names.
        folds: Parts that the patients are divided into.
    """
    parts = StratifiedGroupKFold(folds)
    scores = cross_val_predict(_model("linear"), values, labels, groups=patients, cv=parts, method="predict_proba")
    return _macro_auc(labels, scores)


def _model(classifier: str) -> Pipeline:
    return make_pipeline(StandardScaler(), CLASSIFIERS[classifier]())


def _macro_auc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    return float(roc_auc_score(labels, scores[:, 1] if scores.shape[1] == 2 else scores, multi_class="ovr"))

"""Tables of predictions for the tests of the evaluation."""

import numpy as np
from hypothesis import strategies as st

from medtpp.evaluation import (
    Predictions,
)

NAMES = ("adenosis", "benign", "carcinoma", "ductal")


def make(probabilities, labels, classes=None, patients=None, multilabel=False, split="test", name="case"):
    n = len(probabilities)
    return Predictions(
        cases=tuple(f"{name}{i}" for i in range(n)),
        split=(split,) * n,
        patients=tuple(patients) if patients is not None else (None,) * n,
        sites=(None,) * n,
        labels=tuple(labels),
        classes=tuple(classes or NAMES[: np.shape(probabilities)[1]]),
        probabilities=np.asarray(probabilities),
        multilabel=multilabel,
    )


def binary(scores, truth, patients=None, **others):
    scores = np.asarray(scores, dtype=np.float64)
    labels = [(("negative", "positive")[int(t)],) for t in truth]
    return make(np.stack([1 - scores, scores], axis=1), labels, ("negative", "positive"), patients, **others)


def random_multiclass(seed, n=60, k=4, strength=1.0):
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), truth] += strength
    p = np.exp(logits)
    return make(p / p.sum(axis=1, keepdims=True), [(NAMES[t],) for t in truth]), truth


def halves(predictions):
    return dict.fromkeys(predictions.classes, 0.5)


@st.composite
def scored_cases(draw):
    """Scores on a coarse grid (many ties), truths of both kinds, and whole weights, some of them zero."""
    n = draw(st.integers(4, 40))
    scores = np.array(draw(st.lists(st.integers(0, 8), min_size=n, max_size=n))) / 8
    truth = np.array([True, False, *draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    weights = np.array([1, 1, *draw(st.lists(st.integers(0, 3), min_size=n - 2, max_size=n - 2))], dtype=float)
    return scores, truth, weights

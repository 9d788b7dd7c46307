"""Labels that can be told without looking at the image: by its size and format, or by where it was taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import Case, ImageRecord, Problem, Record
from medtpp.data.problems import warning
from medtpp.data.volume_scan import VolumeScan

FEW_CASES = 10
_MOST_CASES_FITTED = 5_000


def giveaways(labelled: Sequence[Case], records: Mapping[str, Record]) -> list[Problem]:
    """Warnings about what predicts the class.

    Args:
        labelled: Cases of one label each.
        records: What reading told, by case id.
    """
    problems = []
    features, names = [], []
    for case in labelled:
        shape = _shape(records.get(case.id))
        if shape:
            features.append(shape)
            names.append(case.labels[0])
    alike = len({len(shape) for shape in features}) == 1  # images and volumes together are an error of their own
    score = predictability(features, names, depth=3) if alike else None
    if score is not None:
        text = (
            f"The size, spacing and format of the images alone tell the classes with a balanced accuracy of "
            f"{score:.2f}: they may come from different sources, or be cut around what they show. A model can learn "
            "that in place of the disease; crop or resample them alike (of volumes data.volume.center_crop keeps so "
            "many mm around the middle)."
        )
        problems.append(warning("shape-predicts-label", text))
    placed = [case for case in labelled if case.site]
    sites = sorted({case.site for case in placed if case.site})
    one_hot = [[float(case.site == site) for site in sites] for case in placed]
    score = predictability(one_hot, [case.labels[0] for case in placed], depth=None)
    if score is not None:
        text = (
            f"The site alone tells the classes with a balanced accuracy of {score:.2f}. A model can learn the site in "
            "place of the disease; balance the classes within each site or test on another one."
        )
        problems.append(warning("site-predicts-label", text))
    return problems


def predictability(features: Sequence[Sequence[float]], labels: Sequence[str], *, depth: int | None) -> float | None:
    """How well a decision tree tells the labels, if that is well above chance.

    Args:
        features: (N, D).
        labels: (N,) class names; classes with few cases are left out.
        depth: Largest depth of the tree.

    Returns:
        Five-fold cross-validated balanced accuracy, if it lies, less two standard errors, a quarter of the way or more
        from chance to certainty; otherwise None.
    """
    counts = Counter(labels)
    rows = [row for row, label in enumerate(labels) if counts[label] >= FEW_CASES]
    classes = sorted({labels[row] for row in rows})
    if len(classes) < 2:
        return None
    order = np.random.default_rng(0).permutation(rows)[:_MOST_CASES_FITTED]
    x: NDArray[np.float64] = np.asarray(features, dtype=np.float64)[order]
    y = np.asarray(labels)[order]
    if (x == x[0]).all() or min(Counter(y.tolist()).values()) < 5:
        return None

    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=depth, min_samples_leaf=3, class_weight="balanced", random_state=0)
    predicted = cross_val_predict(tree, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=0))
    recalls = np.array([(predicted[y == name] == name).mean() for name in classes])
    sizes = np.array([(y == name).sum() for name in classes])
    score = float(recalls.mean())
    error = float(np.sqrt((recalls * (1 - recalls) / sizes).sum()) / len(classes))
    chance = 1 / len(classes)
    return score if score - 2 * error >= chance + 0.25 * (1 - chance) else None


def _shape(record: Record | None) -> list[float]:
    """Numbers that say how an image was made; none where it is not known."""
    if record is None or record.error is not None:
        return []
    if isinstance(record, VolumeScan):
        extent = [n * step for n, step in zip(record.shape, record.spacing, strict=True)]  # in mm
        return [*record.shape, *record.spacing, *extent, record.channels, record.known]
    if isinstance(record, ImageRecord):
        return [record.width, record.height, record.width / max(record.height, 1), record.bits, record.colour]
    return []

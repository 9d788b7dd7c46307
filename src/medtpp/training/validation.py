"""What validation cases are for: to choose weights, and in classification the thresholds.

Where the last weights are kept (`finetune.keep=last`, as in comparisons) they choose none, but their score is logged
over the steps if that costs little: it tells when a training was as good as another one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.data.store import VolumeStore
from medtpp.evaluation import choose_thresholds, positive_class, write_predictions
from medtpp.inference.predict import as_predictions
from medtpp.inference.sliding import windows_over
from medtpp.inference.stored import Autocast, classify, mean_dice, sliding_window
from medtpp.tasks.base import Task
from medtpp.training.stage import StageData

MOST_SEGMENTED = 24  # cases that a segmentation is validated on
# Of scores that choose nothing.
SHARE = 0.05  # patches seen for them over patches trained on, which cost two to three times as much each
MOST, FEWEST, FEWEST_SEGMENTED = 256, 10, 4  # cases; the loss of a handful tells nothing, masks have many voxels each
SCORES = 10  # at least


@dataclass(frozen=True)
class ScorePlan:
    """Which cases to score, and how often.

    Attributes:
        data: Some of the validation cases, evenly from the whole.
        every: Steps between scores; the last step has one, too.
    """

    data: StageData
    every: int


def plan_scores(data: StageData, *, steps: int, batch_size: int, every: int, masks: bool) -> ScorePlan | None:
    """Choose cases and steps so that scores that choose nothing take a few percent of the training's time, or None.

    The clock has no part in it, so that all arms of a comparison and all its seeds are scored alike.

    Args:
        data: The validation cases.
        steps: Of the training.
        batch_size: Images or patches in each.
        every: Steps between scores, at least.
        masks: Whether it is a segmentation.
    """
    patches = _patches(data)
    affordable = int(SHARE * steps * batch_size / SCORES / patches.mean()) if len(data) else 0
    count = min(affordable, len(data), MOST_SEGMENTED if masks else MOST)
    if count < (FEWEST_SEGMENTED if masks else FEWEST):
        return None
    chosen = np.linspace(0, len(data) - 1, count).round().astype(int)
    every = max(every, math.ceil(patches[chosen].sum() / (SHARE * batch_size)))
    return ScorePlan(StageData(data.store, tuple(data.cases[index] for index in chosen)), every)


def _patches(data: StageData) -> NDArray[np.int64]:
    """(n,) how many patches the network sees of each case."""
    store = data.store
    if not isinstance(store, VolumeStore):
        return np.ones(len(data), dtype=np.int64)
    shapes = [store.records[row].shape[1:] for row in data.rows]
    counts = [sum(1 for _ in windows_over(shape, store.preprocessing.patch, overlap=0.0)) for shape in shapes]
    return np.array(counts, dtype=np.int64)


@dataclass(frozen=True)
class Validation(ABC):
    """Validation of a task.

    Attributes:
        backbone: Tuned.
        task: With its head.
        fabric: Where to compute.
        data: The validation cases.
    """

    backbone: Backbone
    task: Task
    fabric: Fabric
    data: StageData

    @abstractmethod
    def score(self) -> float:
        """Higher is better. In the precision of the training."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """What is worth comparing between runs."""

    @abstractmethod
    def finish(self, folder: Path) -> dict[str, Any]:
        """Write what is known of the validation cases in the end; gives what the adapter's task card has to know."""


@dataclass(frozen=True)
class ClassificationValidation(Validation):
    """The loss chooses weights, the probabilities thresholds.

    Attributes:
        positive: Of two classes, the positive one, where the user says it.
    """

    positive: str | None = None

    def score(self) -> float:
        """Minus the loss."""
        logits, targets = self._logits(self.fabric.autocast), self.task.targets(self.data.cases)
        if targets is None:
            raise TypeError("the task has no targets")
        return -float(self.task.loss(logits.to(self.fabric.device), targets.to(self.fabric.device)))

    def figures(self) -> dict[str, float]:
        """None; the best score is told anyway."""
        return {}

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write validation.csv, computed in float32; gives thresholds and the positive class."""
        predictions = as_predictions(
            self.data.cases,
            "val",
            self.task.probabilities(self._logits(nullcontext)),
            self.task.classes,
            multilabel=self.task.multilabel,
        )
        write_predictions(folder / "validation.csv", predictions)
        thresholds = choose_thresholds(predictions)
        return {
            "thresholds": thresholds.values,
            "threshold_notes": thresholds.notes,
            "positive": positive_class(predictions, self.positive),
        }

    def _logits(self, autocast: Autocast) -> Tensor:
        data, device = self.data, self.fabric.device
        return classify(self.backbone, self.task, data.store, data.rows, device=device, autocast=autocast)


@dataclass(frozen=True)
class SegmentationValidation(Validation):
    """The mean Dice on the network's grid chooses weights."""

    def score(self) -> float:
        """The mean Dice, of windows that overlap as little as possible."""
        data, store = self.data, self.data.store
        if not isinstance(store, VolumeStore):
            raise TypeError("there are no masks in an image cache")
        chosen = np.linspace(0, len(data) - 1, min(len(data), MOST_SEGMENTED)).round().astype(int)
        window = sliding_window(
            self.backbone,
            self.task,
            store.preprocessing.patch,
            device=self.fabric.device,
            overlap=0.0,
            autocast=self.fabric.autocast,
        )
        return mean_dice(window, store, data.rows[chosen], len(self.task.classes))

    def figures(self) -> dict[str, float]:
        """The mean Dice of the weights that were kept."""
        return {"validation_dice": round(self.score(), 4)}

    def finish(self, folder: Path) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: masks have no threshold to choose."""
        return {}

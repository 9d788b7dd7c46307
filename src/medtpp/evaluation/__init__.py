"""Evaluation: predictions (files) to metrics with intervals. Loads no model."""

from medtpp.evaluation.bootstrap import Bootstrap, Estimate
from medtpp.evaluation.evaluate import Evaluation, evaluate, positive_class
from medtpp.evaluation.mistakes import confident_mistakes, write_mistakes
from medtpp.evaluation.predictions import Predictions, read_predictions, write_predictions
from medtpp.evaluation.segmentation import SegmentationEvaluation, evaluate_segmentation
from medtpp.evaluation.segmentation_table import (
    Segmentations,
    as_segmentations,
    read_segmentations,
    write_segmentations,
)
from medtpp.evaluation.surfaces import Agreement, compare_masks
from medtpp.evaluation.thresholds import Thresholds, choose_thresholds

__all__ = [
    "Agreement",
    "Bootstrap",
    "Estimate",
    "Evaluation",
    "Predictions",
    "SegmentationEvaluation",
    "Segmentations",
    "Thresholds",
    "as_segmentations",
    "choose_thresholds",
    "compare_masks",
    "confident_mistakes",
    "evaluate",
    "evaluate_segmentation",
    "positive_class",
    "read_predictions",
    "read_segmentations",
    "write_mistakes",
    "write_predictions",
    "write_segmentations",
]

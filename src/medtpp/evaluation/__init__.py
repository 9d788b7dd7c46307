"""Evaluation: predictions (files) to metrics with intervals. Loads no model."""

from medtpp.evaluation.bootstrap import Bootstrap, Estimate
from medtpp.evaluation.evaluate import Evaluation, evaluate, positive_class
from medtpp.evaluation.predictions import Predictions, read_predictions, write_predictions
from medtpp.evaluation.thresholds import Thresholds, choose_thresholds

__all__ = [
    "Bootstrap",
    "Estimate",
    "Evaluation",
    "Predictions",
    "Thresholds",
    "choose_thresholds",
    "evaluate",
    "positive_class",
    "read_predictions",
    "write_predictions",
]

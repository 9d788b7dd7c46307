"""Evaluation: predictions (files) to metrics with intervals. Loads no model."""

from medtpp.evaluation.bootstrap import Bootstrap, Estimate
from medtpp.evaluation.evaluate import Evaluation, evaluate, positive_class
from medtpp.evaluation.mistakes import confident_mistakes, write_mistakes
from medtpp.evaluation.predictions import Predictions, read_predictions, write_predictions
from medtpp.evaluation.thresholds import Thresholds, choose_thresholds

__all__ = [
    "Bootstrap",
    "Estimate",
    "Evaluation",
    "Predictions",
    "Thresholds",
    "choose_thresholds",
    "confident_mistakes",
    "evaluate",
    "positive_class",
    "read_predictions",
    "write_mistakes",
    "write_predictions",
]

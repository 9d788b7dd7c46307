"""The report on a run: one model, its test cases, how it was trained."""

from __future__ import annotations

from pathlib import Path

from medtpp.report.classification import classification_page
from medtpp.report.read import read_model
from medtpp.report.schema import EvaluatedFile
from medtpp.report.segmentation import segmentation_page
from medtpp.report.training import read_training


def run_page(folder: Path) -> str:
    """The HTML page of a finished run. Raises DataError where a file is missing or broken."""
    task = read_model(folder / "evaluation" / "evaluation.json", EvaluatedFile).task
    page = segmentation_page if task == "segmentation" else classification_page
    return page(folder, read_training(folder))

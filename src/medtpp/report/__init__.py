"""Reports: a finished run, comparison or study (files) -> one self-contained HTML page. Loads no model."""

from __future__ import annotations

from pathlib import Path

from medtpp.errors import DataError
from medtpp.files import write_text
from medtpp.report.comparison import comparison_page
from medtpp.report.run import run_page
from medtpp.report.study import study_page

__all__ = ["write_report"]

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a finished run, comparison or study. No model and no data set is read.

    Args:
        folder: Made by `medtpp run` or `medtpp compare`, or that of a study with its summary.

    Returns:
        The file. It needs nothing beside itself and holds no path of this machine.
        The page of a study has links to its comparisons' own.

    Raises:
        DataError: The folder is neither, is not finished, or a file in it is missing or broken.
        OutputError: The report cannot be written.
    """
    if (folder / "across.json").is_file():
        page = study_page(folder)
    elif (folder / "comparison.json").is_file():
        page = comparison_page(folder)
    elif (folder / "summary.json").is_file():
        page = run_page(folder)
    else:
        raise DataError(_why_not(folder))
    write_text(folder / REPORT, page)
    return folder / REPORT


def _why_not(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}. Name one that `medtpp run` or `medtpp compare` made."
    if (folder / "cells").is_dir():
        return (
            f"The comparison {folder} is not finished: it has no comparison.json. "
            "Go on with the same `medtpp compare` command and --resume."
        )
    if (folder / "experiment.yaml").is_file():
        return (
            f"{folder} holds no finished run: it has no summary.json. Go on with the same `medtpp run` command and "
            "--resume. Folders of a single stage (tpp, finetune, evaluate) have no report."
        )
    return f"{folder} is neither a run nor a comparison. Name a folder that `medtpp run` or `medtpp compare` made."

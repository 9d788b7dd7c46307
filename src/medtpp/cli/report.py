"""`medtpp report`: a finished run or comparison as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import show_paths


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `medtpp run` or `medtpp compare` made.")],
) -> None:
    """Write report.html into the folder: one page with figures and tables, which needs nothing beside itself."""
    from medtpp.report import write_report

    show_paths(report=write_report(folder))

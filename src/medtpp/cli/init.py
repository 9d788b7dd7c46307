"""`medtpp init`: a fully resolved experiment file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import (
    Modality,
    Overwrite,
    Settings,
    Source,
    Unlabelled,
    decoding,
    experiment_from,
    show_paths,
    show_split,
)
from medtpp.errors import OutputError


def init(
    data: Source,
    output: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("experiment.yaml"),
    modality: Modality = None,
    settings: Settings = None,
    unlabelled: Unlabelled = None,
    overwrite: Overwrite = False,
) -> None:
    """Read and check the data, choose defaults for it, and write them with comments to a file you can edit."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists. Use --overwrite, or another --out.")
    experiment = experiment_from(data, settings, unlabelled, modality)
    from medtpp.workflow.experiment import write_experiment
    from medtpp.workflow.prepare import prepare

    with decoding() as progress:
        prepared = prepare(experiment, progress=progress)
    show_split(prepared, tpp=prepared.experiment.tpp.enabled)
    write_experiment(output, prepared.experiment)
    show_paths(experiment=output, run=f"medtpp run {output} --out runs/{output.stem}")

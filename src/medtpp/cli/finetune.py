"""`medtpp finetune`: the supervised stage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import (
    Modality,
    Out,
    Overwrite,
    Resume,
    Settings,
    Source,
    console,
    decoding,
    experiment_from,
    show_paths,
    show_split,
    show_stage,
)


def finetune(
    source: Source,
    out: Out,
    adapter: Annotated[Path | None, typer.Option(help="A TPP adapter folder to start from.")] = None,
    modality: Modality = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune with labels, from a TPP adapter or from the tuner's own start."""
    experiment = experiment_from(source, settings, modality=modality)
    tpp = experiment.tpp.model_copy(update={"enabled": adapter is not None})
    experiment = experiment.model_copy(update={"tpp": tpp})
    from medtpp.files import MARKER, read_json
    from medtpp.workflow.run import finetune_stage, open_run

    with decoding() as progress:
        prepared = open_run(experiment, out, adapter=adapter, resume=resume, overwrite=overwrite, progress=progress)
    show_split(prepared, tpp=False)
    made = finetune_stage(prepared, out / "finetune", console.print, start=adapter)
    show_stage("finetune", read_json(made.parent / MARKER))
    show_paths(adapter=made, predict=f"medtpp predict {made} IMAGES -o out.csv")

"""`medtpp evaluate`: a fine-tuned adapter on the test cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import Out, Overwrite, Settings, Source, console, decoding, experiment_from, show_evaluation


def evaluate(
    source: Source,
    out: Out,
    adapter: Annotated[Path, typer.Option(help="A fine-tuned adapter folder.")],
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict the test cases of an experiment or a data set, and write predictions.csv and evaluation.json."""
    experiment = experiment_from(source, settings)
    from medtpp.workflow.run import evaluate_stage, open_run

    with decoding() as progress:
        prepared = open_run(experiment, out, overwrite=overwrite, progress=progress)
    show_evaluation(evaluate_stage(prepared, adapter, out / "evaluation"))
    console.print(f"written to {out / 'evaluation'}", markup=False)

"""`medtpp evaluate`: a fine-tuned adapter on the test cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import (
    Backbone,
    Out,
    Overwrite,
    Settings,
    Source,
    decoding,
    experiment_from,
    show_evaluation,
    show_paths,
)


def evaluate(
    source: Source,
    out: Out,
    adapter: Annotated[Path, typer.Option(help="A fine-tuned adapter folder.")],
    backbone: Backbone = None,
    every: Annotated[
        bool, typer.Option("--all", help="All labelled cases, as for data of another hospital, not a test split alone.")
    ] = False,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict the test cases of an experiment or a data set, and write predictions.csv and evaluation.json."""
    experiment = experiment_from(source, settings)
    from medtpp.workflow.run import as_trained, evaluate_stage, open_run

    experiment = as_trained(experiment, adapter, backbone=backbone)
    with decoding() as progress:
        prepared = open_run(experiment, out, adapter=adapter, all_test=every, overwrite=overwrite, progress=progress)
    show_evaluation(evaluate_stage(prepared, adapter, out / "evaluation", backbone=backbone))
    show_paths(predictions=out / "evaluation" / "predictions.csv", metrics=out / "evaluation" / "evaluation.json")

"""`medtpp run`: everything in a row."""

from __future__ import annotations

from medtpp.cli._common import (
    Modality,
    Out,
    Overwrite,
    Resume,
    Settings,
    Source,
    Unlabelled,
    console,
    decoding,
    experiment_from,
    show_evaluation,
    show_paths,
    show_split,
    show_stage,
)


def run(
    source: Source,
    out: Out,
    modality: Modality = None,
    settings: Settings = None,
    unlabelled: Unlabelled = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Split, pre-train the target parameters (TPP), fine-tune, evaluate once on the test cases, and sum up."""
    experiment = experiment_from(source, settings, unlabelled, modality)
    from medtpp.workflow.run import open_run, run_stages

    with decoding() as progress:
        prepared = open_run(experiment, out, resume=resume, overwrite=overwrite, progress=progress)
    show_split(prepared, tpp=prepared.experiment.tpp.enabled)
    result = run_stages(prepared, out, tell=console.print)
    for name, stage in result.stages.items():
        show_stage(name, stage)
    show_evaluation(result.evaluation)
    show_paths(report=out / "report.html", adapter=result.adapter)
    output = "masks/" if prepared.dataset.structures else "predictions.csv"
    show_paths(predict=f"medtpp predict {result.adapter} IMAGES -o {output}")

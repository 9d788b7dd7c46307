"""`medtpp tpp`: the pretext stage alone."""

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
    show_paths,
    show_split,
    show_stage,
)


def tpp(
    source: Source,
    out: Out,
    modality: Modality = None,
    settings: Settings = None,
    unlabelled: Unlabelled = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Pre-train the target parameters on images without labels; validation and test cases are never seen."""
    experiment = experiment_from(source, settings, unlabelled, modality)
    from medtpp.files import MARKER, read_json
    from medtpp.workflow.run import open_run, tpp_stage

    with decoding() as progress:
        prepared = open_run(experiment, out, resume=resume, overwrite=overwrite, progress=progress)
    show_split(prepared, tpp=True)
    adapter = tpp_stage(prepared, out / "tpp", console.print)
    show_stage("tpp", read_json(adapter.parent / MARKER))
    show_paths(adapter=adapter, finetune=f"medtpp finetune {out / 'experiment.yaml'} --adapter {adapter} -o FOLDER")

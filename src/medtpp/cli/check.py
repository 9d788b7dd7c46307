"""`medtpp check`: what a data set holds, and all that is wrong with it."""

from __future__ import annotations

import typer

from medtpp.cli._common import Settings, Source, checked, console, decoding, experiment_from


def check(data: Source, settings: Settings = None) -> None:
    """Report cases, classes, sizes, patients, and every problem. Exit status 2 if there are errors."""
    experiment = experiment_from(data, settings)
    from medtpp.data.cache import scan
    from medtpp.data.read import read_dataset, read_unlabelled

    dataset = read_dataset(experiment.data)
    with decoding() as progress:
        records = scan(dataset.cases, progress=progress)
    problems = checked(dataset, records)
    if experiment.data.unlabelled:
        console.print(f"[bold]unlabelled[/bold] {len(read_unlabelled(experiment.data.unlabelled))} more images for TPP")
    found = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - found
    counts = f"{found} error{'s' * (found != 1)}, {warnings} warning{'s' * (warnings != 1)}."
    console.print(counts if problems else "No problems found.", style="bold")
    if found:
        raise typer.Exit(2)

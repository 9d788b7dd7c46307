"""`medtpp predict`: probabilities for new images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import Backbone, Overwrite, console, decoding, errors
from medtpp.errors import OutputError


class Accelerator(StrEnum):
    """What can be asked for."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def predict(
    adapter: Annotated[Path, typer.Argument(help="A fine-tuned adapter folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV file to write.")],
    backbone: Backbone = None,
    accelerator: Annotated[Accelerator, typer.Option(help="Where to compute.")] = Accelerator.auto,
    overwrite: Overwrite = False,
) -> None:
    """Write a probability per class for each image. Unreadable files are listed, the rest is done: exit status 1."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists. Use --overwrite, or another --output.")
    import torch

    from medtpp.adapter import load_adapter
    from medtpp.evaluation import write_predictions
    from medtpp.inference.predict import image_cases, predict_files
    from medtpp.training.device import choose_accelerator

    cases = image_cases(images)
    loaded = load_adapter(adapter, backbone=backbone)
    with decoding() as progress:
        result = predict_files(loaded, cases, device=torch.device(choose_accelerator(accelerator)), progress=progress)
    if result.predictions is not None:
        write_predictions(output, result.predictions)
        console.print(f"{len(result.predictions)} images predicted: {output}", markup=False, soft_wrap=True)
    for name, reason in result.unreadable.items():
        errors.print(f"not read: {name}: {reason}", markup=False, soft_wrap=True)
    if result.unreadable:
        errors.print(f"{len(result.unreadable)} of {len(cases)} files could not be read.", style="bold red")
        raise typer.Exit(1)

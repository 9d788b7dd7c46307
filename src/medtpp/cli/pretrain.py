"""`medtpp pretrain`: a backbone of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import Out, Overwrite, Resume, Settings, decoding, errors, show_paths, show_stage


def pretrain(
    images: Annotated[list[Path], typer.Argument(help="Folders of images; labels and layout are disregarded.")],
    out: Out,
    modality: Annotated[str, typer.Option(help="Decides which flips are allowed, as in `medtpp run`.")] = "unknown",
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a whole backbone by MAE on unlabelled images. The folder is then a backbone wherever a name is accepted.

    Fields for --set: steps, batch_size, learning_rate, architecture, pretext.mask_ratio, augment.crop_min,
    hardware.precision and others.
    """
    from medtpp.data.problems import agree, count
    from medtpp.workflow.pretrain import PretrainJob, load_job, pretrain_backbone

    job: PretrainJob = load_job(images, settings or [], modality=modality, image_size=image_size, seed=seed)
    with decoding() as progress:
        result, unreadable = pretrain_backbone(job, out, resume=resume, overwrite=overwrite, progress=progress)
    if unreadable:
        left = f"{count(unreadable, 'image')} could not be read and {agree(unreadable, 'was', 'were')} left out"
        errors.print(f"{left}; see `medtpp check`.")
    show_stage("pretrain", result)
    show_paths(backbone=out, use=f"medtpp run DATA --out FOLDER --set backbone.name={out}")

"""`medtpp predict`: probabilities or masks for new images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medtpp.cli._common import Backbone, Overwrite, Resume, console, errors
from medtpp.errors import ConfigError, OutputError

if TYPE_CHECKING:
    import torch

    from medtpp.adapter import Adapter
    from medtpp.data.cache import Progress
    from medtpp.data.case import Case
    from medtpp.inference.segment import SegmentOptions


class Accelerator(StrEnum):
    """What can be asked for."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class MaskFormat(StrEnum):
    """Formats of masks."""

    auto = "auto"
    nii_gz = "nii.gz"
    nii = "nii"
    nrrd = "nrrd"
    mha = "mha"
    png = "png"
    dicom_seg = "dicom-seg"


def predict(
    adapter: Annotated[Path, typer.Argument(help="A fine-tuned adapter folder.")],
    images: Annotated[list[Path], typer.Argument(help="Images or scans, or folders of them.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The CSV file to write; the folder for masks.")],
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="Another adapter, to average the probabilities. Repeatable.")
    ] = None,
    mask_format: Annotated[
        MaskFormat,
        typer.Option("--format", help="Of masks. auto: as the scan; DICOM becomes DICOM-SEG, with the patient in it."),
    ] = MaskFormat.auto,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Beside each mask a NIfTI map for each structure.")
    ] = False,
    flips: Annotated[
        bool, typer.Option("--flips", help="Segment flipped images too, and average: 4 times the work in 2D, 8 in 3D.")
    ] = False,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share by which neighbouring windows overlap (0.5).")
    ] = None,
    backbone: Backbone = None,
    accelerator: Annotated[Accelerator, typer.Option(help="Where to compute.")] = Accelerator.auto,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a probability per class for each image, or a mask for each scan.

    Masks lie on the voxels of their scans; volumes.csv tells the size of each structure, and its value in the masks.
    Unreadable files are listed, the rest is done: exit status 1.
    """
    from medtpp.adapter import read_card

    card = read_card(adapter)
    segments = card.task is not None and bool(card.task.mask_values)
    given = {
        "--format": mask_format is not MaskFormat.auto,
        "--probabilities": probabilities,
        "--flips": flips,
        "--overlap": overlap is not None,
        "--resume": resume,
    }
    unfit = [name for name, is_given in given.items() if is_given]
    if unfit and not segments:
        raise ConfigError(f"{', '.join(unfit)}: for masks alone, and {adapter} does not segment. Leave it out.")
    if resume and overwrite:
        raise ConfigError("--resume goes on with what is there, --overwrite replaces it. Choose one.")
    if segments and output.suffix == ".csv":
        raise OutputError(f"{adapter} segments, so --out names a folder for masks, and {output} looks like a table.")
    if not segments and output.exists() and not overwrite:
        raise OutputError(f"{output} exists. Use --overwrite, or another --out.")
    import torch

    from medtpp.data.problems import count
    from medtpp.inference.cases import image_cases, relative_cases
    from medtpp.inference.ensemble import load_ensemble
    from medtpp.inference.segment import SegmentOptions
    from medtpp.training.device import choose_accelerator

    cases = image_cases(images, card.preprocessing, lambda line: errors.print(line, markup=False, soft_wrap=True))
    if segments:
        cases = relative_cases(cases, images, output)
    device = torch.device(choose_accelerator(accelerator))
    members = load_ensemble([adapter, *(others or [])], backbone=backbone, device=device)
    if segments:
        options = SegmentOptions(
            format=mask_format.value,
            probabilities=probabilities,
            flips=flips,
            overlap=0.5 if overlap is None else overlap,
        )
        unreadable = _segment(members, cases, output, options, device, resume=resume, overwrite=overwrite)
    else:
        unreadable = _classify(members, cases, output, device)
    for name, reason in unreadable.items():
        errors.print(f"not read: {name}: {reason}", markup=False, soft_wrap=True)
    if unreadable:
        errors.print(f"{len(unreadable)} of {count(cases, 'file')} could not be read.", style="bold red")
        raise typer.Exit(1)


def _classify(members: list[Adapter], cases: list[Case], output: Path, device: torch.device) -> dict[str, str]:
    """Write the table; gives what could not be read."""
    from medtpp.data.problems import count
    from medtpp.evaluation import write_predictions
    from medtpp.inference.predict import predict_files

    with _bar("predicting") as progress:
        result = predict_files(members, cases, device=device, progress=progress)
    if result.predictions is not None:
        write_predictions(output, result.predictions)
        console.print(f"{count(result.predictions.cases, 'image')} predicted: {output}", markup=False, soft_wrap=True)
    return result.unreadable


def _segment(
    members: list[Adapter],
    cases: list[Case],
    output: Path,
    options: SegmentOptions,
    device: torch.device,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, str]:
    """Write the masks; gives what could not be read."""
    from medtpp.data.problems import count
    from medtpp.inference.segment import VOLUMES, segment_files

    with _bar("segmenting") as progress:
        result = segment_files(
            members, cases, output, options, device=device, resume=resume, overwrite=overwrite, progress=progress
        )
    before = f"; {len(result.skipped)} were there" if result.skipped else ""
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result.seconds.items())
    console.print(f"{count(result.done, 'image')} segmented{before}: {output}", markup=False, soft_wrap=True)
    console.print(f"sizes of structures, and their values in masks: {output / VOLUMES}", markup=False, soft_wrap=True)
    if spent:
        console.print(f"time: {spent}", markup=False)
    return result.unreadable


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar, on a terminal."""
    from rich.progress import Progress as Bar

    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""`medtpp phantom`: example data, drawn from a seed."""

from __future__ import annotations

from typing import Annotated

import typer

from medtpp.cli._common import Out, show_paths


def phantom(
    out: Out,
    cases: Annotated[int, typer.Option(help="How many images.", min=10)] = 400,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.", min=32)] = 128,
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
) -> None:
    """Write made-up radiographs with and without a lesion, and their manifest, to try medtpp on."""
    from medtpp.data.phantom import write_folder
    from medtpp.files import prepare_folder

    prepare_folder(out)
    write_folder(out, cases, size, seed)
    show_paths(phantoms=out, use=f"medtpp run {out} --out runs/phantom --modality xray")

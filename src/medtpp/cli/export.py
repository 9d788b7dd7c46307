"""`medtpp export`: an adapter as a network of another library."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medtpp.cli._common import Backbone, Out, Overwrite, console, show_paths


class Target(StrEnum):
    """What can be asked for."""

    onnx = "onnx"
    torch = "torch"
    timm = "timm"
    monai_bundle = "monai-bundle"


def export(
    adapter: Annotated[Path, typer.Argument(help="A fine-tuned adapter folder.")],
    to: Annotated[Target, typer.Option("--to", help="What to write.")],
    out: Out,
    backbone: Backbone = None,
    overwrite: Overwrite = False,
) -> None:
    """Write backbone and adapter as one network for ONNX, torch, timm or MONAI, with its preprocessing stated."""
    from medtpp.adapter import load_adapter, read_card
    from medtpp.files import prepare_folder
    from medtpp.inference import export as exports

    exports.refuse(read_card(adapter), to.value, str(adapter))
    loaded = load_adapter(adapter, backbone=backbone)
    prepare_folder(out, overwrite=overwrite)
    with console.status("exporting"):
        made = exports.export(loaded, to.value, out)
    tuner = loaded.card.tuner["name"]
    size = sum((out / name).stat().st_size for name in made.files) / 1e6
    show_paths(
        network=f"{out / made.files[0]}, {size:.1f} MB in all",
        weights=f"{tuner}, {'merged into the backbone' if made.merged else 'which cannot be merged, as it is'}",
        batch="of any size" if made.batch else "of one image: this network's code counts its batch",
        difference=f"{made.difference:.1e} at most from the adapter's probabilities, on random images",
        stated=out / "preprocessing.json",
    )

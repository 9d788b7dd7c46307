"""Masks that `medtpp predict` wrote: they lie where somebody put them, often beside the images, and are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medtpp.data.sources import ImageFile
from medtpp.files import read_json

INPUTS = "inputs.json"  # in a folder of masks: what they depend on


def wrote_masks(folder: Path) -> bool:
    """Whether `medtpp predict` made a folder, for masks."""
    try:
        content = read_json(folder / INPUTS)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "adapters" in content


def predicted(folder: Path, images: Sequence[ImageFile]) -> set[str]:
    """Names of images of a folder that lie where `medtpp predict` wrote masks."""
    above = {image.name: image.image.relative_to(folder).parents for image in images}
    made = {place for place in {place for places in above.values() for place in places} if wrote_masks(folder / place)}
    return {name for name, places in above.items() if not made.isdisjoint(places)}

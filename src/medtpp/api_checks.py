"""What the library calls refuse before they start."""

from __future__ import annotations

from medtpp.errors import ConfigError
from medtpp.tuners import TunedBackbone


def check_saved(model: TunedBackbone, channels: int | None) -> tuple[int, int]:
    """The side of the images and their channels, as an adapter folder of this model names them.

    Args:
        model: Tuned.
        channels: Of the images; None for those that it was trained on.

    Raises:
        ConfigError: The model takes no square images of two dimensions, or channels are not known or neither 1 nor 3.
    """
    size = model.spec.image_size
    if len(size) != 2 or size[0] != size[1]:
        raise ConfigError(
            f"medtpp.save writes adapters of square 2D images; this model takes {'x'.join(map(str, size))}. "
            + ("For volumes use medtpp.run." if len(size) == 3 else "Give medtpp.load one number as image_size.")
        )
    channels = model.seen_channels if channels is None else channels
    if channels is None:
        raise ConfigError("Say how many channels the images have: medtpp.save(..., channels=1) for grey, 3 for colour.")
    if channels not in (1, 3):
        raise ConfigError(
            f"medtpp.save writes adapters of grey images (channels=1) and of colour (channels=3), not of {channels} "
            "channels."
        )
    return size[0], channels

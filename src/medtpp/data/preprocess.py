"""From decoded pixels to what the backbone sees: grey levels in 8 bits, one size, one or three channels."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from medtpp.config import Options
from medtpp.data.decode import Pixels, luma

WINDOW = (0.001, 0.999)  # shares of the pixels that lie below the darkest and the brightest level kept


class Preprocessing(Options):
    """How images become arrays of one shape. It is saved with an adapter and applied again to new images.

    All values are resolved: "auto" was answered before.
    """

    image_size: int = Field(gt=0, description="side of the square output in pixels")
    channels: Literal[1, 3] = Field(description="1 grey, 3 colour")
    fit: Literal["stretch", "pad"] = Field("stretch", description="how an image is made square")
    version: Literal[1] = Field(1, description="changes with the arithmetic, so that old caches are not taken for new")

    @property
    def patch(self) -> tuple[int, ...]:
        """What the network sees at once, (H, W): the whole image."""
        return self.image_size, self.image_size

    def apply(self, pixels: Pixels) -> NDArray[np.uint8]:
        """Prepare one image; the same pixels always give the same bytes.

        Args:
            pixels: (H, W) grey or (H, W, 3) colour, uint8 or uint16, as `read_image` returns them.

        Returns:
            (C, S, S) uint8, with C = `channels` and S = `image_size`.
        """
        levels = pixels if pixels.dtype == np.uint8 else window(pixels)
        if self.channels == 1 and levels.ndim == 3:
            levels = luma(levels)
        square = self._resize(Image.fromarray(levels))
        if square.ndim == 2:
            return np.repeat(square[None], self.channels, axis=0)
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def _resize(self, image: Image.Image) -> NDArray[np.uint8]:
        size = self.image_size
        if self.fit == "stretch":
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        longest = max(image.size)
        width, height = (max(1, round(side * size / longest)) for side in image.size)
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(
            image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2)
        )
        return np.asarray(canvas)


def window(pixels: Pixels) -> NDArray[np.uint8]:
    """Quantise 16-bit pixels to 8 bits between the 0.1 and 99.9 percentiles of the image, all channels together.

    Detectors deliver 10 to 14 bits in 16-bit containers, and nothing in a PNG says how many: dividing by 256 would
    leave a 12-bit radiograph 16 grey levels. The percentiles keep a few burnt-in marks or dead pixels from setting the
    range. An image of one value becomes black.

    Args:
        pixels: uint16 of any shape.

    Returns:
        uint8 of the same shape.
    """
    below = np.bincount(pixels.ravel(), minlength=1 << 16).cumsum()
    low, high = np.searchsorted(below, [share * pixels.size for share in WINDOW])
    if low == high:  # nearly all pixels have one value: what little there is lies outside the percentiles
        low, high = int(pixels.min()), int(pixels.max())
    scaled = (np.arange(1 << 16) - low) * (255.0 / max(high - low, 1))
    table: NDArray[np.uint8] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return table[pixels]

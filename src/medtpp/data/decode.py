"""Image files to arrays: PNG, JPEG, TIFF and BMP, 8 and 16 bit, grey and colour.

A file that cannot be read whole is an error with its reason, never an image with a grey lower half.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from medtpp.data.listing import PLANE_SUFFIXES, split_suffix
from medtpp.errors import DataError
from medtpp.files import digest

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MAX_PIXELS = 1 << 28  # 16384 x 16384: above any radiograph and most slide regions, below what exhausts a laptop
GREY_TOLERANCE = 8  # of 255: how far JPEG may move apart the channels of a grey image that was stored as RGB

# Pillow's own guard against decompression bombs stays, with this limit in place of a third of it.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Pillow reads 16-bit colour as 8-bit: it keeps the high byte of each value. Read once more as if the bytes were in the
# other order, it keeps the low byte.
_OTHER_ORDER = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBX;16B": "RGBX;16L",
    "RGBX;16L": "RGBX;16B",
}

_TURNED_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where an orientation may stand


def read_image(path: Path) -> Pixels:
    """Read one image file.

    EXIF orientation is applied. Palettes, CMYK and 1-bit images are expanded; transparent pixels are laid on black.
    A colour image whose channels are equal within JPEG's tolerance is returned as grey. Values without a known scale
    (floats, integers outside 0 .. 65535) are spread over the 16-bit range.

    Returns:
        (H, W) grey or (H, W, 3) colour, uint8 or uint16.

    Raises:
        DataError: The file is missing, empty, truncated, no image, has several pages or frames, more than 2**28
            pixels, or values that are not finite. The message starts with the path.
    """
    try:
        return decode(read_bytes(path))
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error


def orientation(path: Path) -> int:
    """The EXIF orientation of an image file, which reading undoes: 2 to 8, or 1 of upright images and other files.

    Raises:
        DataError: The file cannot be opened. The reason without the path.
    """
    if split_suffix(path.name)[1] not in PLANE_SUFFIXES:
        return 1
    data = read_bytes(path)
    if data.startswith(b"\x89PNG") and not any(mark in data for mark in _TURNED_PNG):
        return 1  # Pillow would decode all of it to look behind the pixels
    try:
        return int(Image.open(io.BytesIO(data), formats=FORMATS).getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - whatever is broken is told by whoever reads the pixels
        return 1


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        DataError: It cannot be read. The message holds the reason without the path.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror or error}).") from error


def decode(data: bytes) -> Pixels:
    """Decode the content of an image file; see `read_image`.

    Raises:
        DataError: The message holds the reason alone.
    """
    if not data:
        raise DataError("the file is empty (0 bytes).")
    try:
        pixels = _decode(data)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, or its header is broken."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(_too_large()) from error
    except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
        raise DataError(
            f"is truncated or broken ({str(error) or type(error).__name__}). Copy or export it again."
        ) from error
    return without_colour(pixels)


def without_colour(pixels: Pixels) -> Pixels:
    """An image as it is, or in grey if it is a colour image whose channels are equal within JPEG's tolerance.

    Args:
        pixels: (H, W) or (H, W, 3).
    """
    return luma(pixels) if pixels.ndim == 3 and _is_grey(pixels) else pixels


def pixel_fingerprint(pixels: Pixels) -> str:
    """The first 32 hexadecimal digits of a sha256 over shape, type and values: equal for equal images."""
    return digest(str(pixels.shape), pixels.dtype.name, pixels.tobytes())[:32]


def luma(pixels: Pixels) -> Pixels:
    """Grey of a colour image by ITU-R BT.601, in integers, so that equal channels stay what they are.

    Args:
        pixels: (H, W, 3) uint8 or uint16.

    Returns:
        (H, W) of the same type.
    """
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return grey.astype(np.uint8) if pixels.dtype == np.uint8 else grey.astype(np.uint16)


def probe_colour(images: Sequence[Any], read: Callable[[Any], Pixels] = read_image, sample: int = 64) -> bool:
    """Whether any image of an even sample is coloured; decides `channels: auto`. Unreadable files are passed over.

    Args:
        images: Paths, or whatever `read` takes.
        read: Reads one of them.
        sample: How many to read.
    """
    for index in np.unique(np.linspace(0, len(images) - 1, min(sample, len(images)), dtype=int)):
        try:
            if read(images[index]).ndim == 3:
                return True
        except DataError:
            continue
    return False


def _too_large() -> str:
    return f"has more than {MAX_PIXELS:,} pixels. Cut it into tiles or save a smaller copy."


def _decode(data: bytes) -> Pixels:
    image = _open(data)
    rawmode = _rawmode(image)
    deep_colour = ";16" in rawmode and not rawmode.startswith("I;16")
    if deep_colour and rawmode not in _OTHER_ORDER:
        raise DataError(
            f"has 16-bit pixels of a kind that is not supported ({rawmode}). Save it as 16-bit grey or RGB."
        )
    _check_whole(data, str(image.format))
    oriented = _load(image)
    if deep_colour:
        return _deep_colour(data, oriented, rawmode)
    if oriented.mode.startswith("I;16") or oriented.mode in ("I", "F"):
        return _sixteen_bits(np.asarray(oriented))
    if oriented.has_transparency_data:
        layer = oriented.convert("RGBA")
        oriented = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return np.asarray(oriented.convert("L" if oriented.mode in ("1", "L") else "RGB"))


def _open(data: bytes) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_too_large())
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG with a preview behind it
        raise DataError(f"holds {frames} pages or frames, and only single images are read. Save each as a file.")
    return image


def _check_whole(data: bytes, kind: str) -> None:
    """Find an interrupted copy whose missing rest is zeros: there Pillow stops without a word."""
    if kind == "PNG":
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # checksums, which decoding leaves alone
    elif kind in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise DataError("is truncated (no end marker after the image). Copy or export it again.")


def _load(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the file stores its pixels, in Pillow's words, such as "RGB;16B"."""
    arguments = image.tile[0].args or ("",)
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _deep_colour(data: bytes, high: Image.Image, rawmode: str) -> NDArray[np.uint16]:
    image = _open(data)
    other = _OTHER_ORDER[rawmode]
    image.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other) for tile in image.tile
    ]
    pixels: NDArray[np.uint16] = np.asarray(high).astype(np.uint16) << 8 | np.asarray(_load(image))
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if high.mode != "RGBA":
        return colour
    return ((colour.astype(np.uint32) * alpha + 32767) // 65535).astype(np.uint16)  # laid on black; fits 32 bits


def _sixteen_bits(values: NDArray[np.generic]) -> NDArray[np.uint16]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("holds NaN or infinite values. Replace them by numbers.")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind != "f" and low >= 0 and high <= 65535:
        return values.astype(np.uint16)
    return np.rint((values.astype(np.float64) - low) * (65535 / ((high - low) or 1))).astype(np.uint16)


def _is_grey(pixels: Pixels) -> bool:
    tolerance = GREY_TOLERANCE * (np.iinfo(pixels.dtype).max // 255)
    for view in (pixels[::16, ::16], pixels):  # a coloured image shows itself in a glance at few pixels
        red, green, blue = view[..., 0], view[..., 1], view[..., 2]
        brightest = np.maximum(np.maximum(red, green), blue)
        darkest = np.minimum(np.minimum(red, green), blue)
        if (brightest - darkest).max() > tolerance:
            return False
    return True

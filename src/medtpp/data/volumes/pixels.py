"""Pixels of DICOM files: decompressed, and brought to the values they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_windowing
from pydicom.pixels.utils import pixel_array
from pydicom.uid import AllTransferSyntaxes

from medtpp.data.volumes.header import PROJECTIONS, discreet, open_dataset
from medtpp.errors import DataError

# Modalities whose values are measured: there MONOCHROME1 (usual in PET) asks for an inverted display, nothing more.
MEASURED = frozenset({"CT", "MR", "PT", "NM"})

# On a broken stream GDCM may end the whole process; these raise. Lossless JPEG they cannot read, and GDCM does.
SAFE_DECODERS = ("pydicom", "pyjpegls", "pillow")

AIR = -1024  # HU, the lower end of a 12-bit scale: what takes the place of pixels outside of a CT's field of view

gdcm.Trace.WarningOff()
gdcm.Trace.ErrorOff()


@dataclass(frozen=True)
class _Table:
    """A VOI LUT. pydicom's own looks up tables of 8 bits with a number of 8 bits, whatever their length.

    Attributes:
        first: The value that the first entry is for; smaller ones have it too, and those above the last entry the last.
        entries: Grey levels, one for each whole number.
        depth: Their bits.
    """

    first: int
    entries: NDArray[np.int64]
    depth: int

    def looked_up(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The grey level of each value; along the line between two entries where a value is not whole."""
        places = np.arange(self.first, self.first + len(self.entries))
        levels: NDArray[np.float64] = np.interp(values, places, self.entries)
        return levels


class PixelFile:
    """A DICOM file whose pixels are wanted.

    Args:
        path: The file, read at once.

    Attributes:
        hounsfield: Whether values are in HU.

    Raises:
        DataError: It cannot be read, or holds no pixels. The reason without the path.
    """

    def __init__(self, path: Path) -> None:
        self.dataset = open_dataset(path)
        if "PixelData" not in self.dataset:
            raise DataError("holds no pixels, or is truncated before them. Export it again.")
        with discreet("has a broken DICOM header (the scaling of its values). Export it again."):
            self.modality = str(self.dataset.get("Modality") or "")
            self._shared = next(iter(self.dataset.get("SharedFunctionalGroupsSequence") or ()), Dataset())
            self._per_frame = self.dataset.get("PerFrameFunctionalGroupsSequence") or ()
            scaling = self._find("PixelValueTransformationSequence", 0)
            unit = str(scaling.get("RescaleType") or "HU")
            self.hounsfield = self.modality == "CT" and "RescaleSlope" in scaling and unit in ("HU", "US")

    def values(self, frame: int = 0) -> NDArray[Any]:
        """The values of one frame.

        Rescale slope and intercept (or the modality LUT) are applied, MONOCHROME1 is inverted where values are not
        measured, palettes and YBR become RGB. The VOI LUT or window is applied to radiographs alone: their stored
        values follow each detector, and the VOI LUT is part of the image that is read and published. Of CT it would
        cut away HU. A radiograph whose rescaled values are no whole numbers, or do not fit into 16 bits, is spread over
        the levels of its stored bits. Padding (PixelPaddingValue) is no tissue: it becomes air in CT, 0 in other
        measured images (or their smallest value if that is below), else the darkest value of the rest.

        Returns:
            (H, W) or (H, W, 3): integers where scaling keeps them so, uint8 or uint16 for radiographs and colour, else
            float32.

        Raises:
            DataError: The pixels cannot be decoded. The reason without the path.
        """
        with discreet(
            f"has pixels that cannot be decoded ({self._coding()}): the file is truncated or broken, or this kind is "
            "not supported. Export it again, uncompressed."
        ):
            stored = pixel_array(self.dataset, index=frame, decoding_plugin=self._decoder())
        with discreet("has a broken DICOM header (the scaling of its values). Export it again."):
            return self._values(stored, frame)

    def _values(self, stored: NDArray[Any], frame: int) -> NDArray[Any]:
        photometric = str(self.dataset.get("PhotometricInterpretation", ""))
        if photometric == "PALETTE COLOR":
            stored = _eight_bits(apply_color_lut(stored, self.dataset))
        if stored.ndim == 3:
            return _grey_if_equal(stored)
        padding = self._padding(stored)
        slope, intercept = self._rescaling(frame)
        values = self._scaled(stored, slope, intercept)
        whole, span = slope.is_integer() and intercept.is_integer(), self._span(slope, intercept)
        if self.modality in PROJECTIONS:
            values, whole = self._presented(values, whole and slope > 0, span), True
        if photometric == "MONOCHROME1" and self.modality not in MEASURED:
            values = self._inverted(values) if whole else np.float32(sum(span)) - values
        if padding is not None and padding.any() and not padding.all():
            # Unsigned stored values without an intercept cannot hold the air of a CT.
            values = values.astype(np.int32) if self.hounsfield and values.dtype.kind == "u" else values.copy()
            darkest = values[~padding].min()
            if self.modality in MEASURED:
                darkest = AIR if self.hounsfield else min(darkest, 0)
            values[padding] = darkest
        return values

    def _rescaling(self, frame: int) -> tuple[float, float]:
        """Slope and intercept; those that change nothing where a modality LUT takes their place."""
        if self.dataset.get("ModalityLUTSequence"):
            return 1.0, 0.0
        scaling = self._find("PixelValueTransformationSequence", frame)
        slope, intercept = scaling.get("RescaleSlope"), scaling.get("RescaleIntercept")
        slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
        if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
            raise DataError("has a broken DICOM header (a rescale slope of 0, or not finite). Export it again.")
        return slope, intercept

    def _scaled(self, stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
        if self.dataset.get("ModalityLUTSequence"):
            table: NDArray[Any] = apply_modality_lut(stored, self.dataset)
            return table
        if slope == 1 and intercept.is_integer():
            return stored if intercept == 0 else stored.astype(np.int64) + int(intercept)
        # Levels of a radiograph may lie closer than single precision tells apart beside a large intercept.
        kind: type[np.floating[Any]] = np.float64 if self.modality in PROJECTIONS else np.float32
        scaled: NDArray[np.floating[Any]] = stored.astype(kind) * kind(slope) + kind(intercept)
        return scaled

    def _span(self, slope: float, intercept: float) -> tuple[float, float]:
        """The smallest and the largest value that the stored bits can stand for."""
        bits, signed = int(self.dataset.BitsStored), int(self.dataset.PixelRepresentation)
        first = -(1 << bits - 1) if signed else 0
        ends = sorted((first * slope + intercept, (first + (1 << bits) - 1) * slope + intercept))
        return ends[0], ends[1]

    def _presented(self, values: NDArray[Any], whole: bool, span: tuple[float, float]) -> NDArray[Any]:
        """A radiograph as its VOI LUT or first window shows it; unsigned integers.

        Args:
            values: (H, W), rescaled.
            whole: Whether rescaling keeps whole numbers whole, and their order, which pydicom's windows need.
            span: What `_span` gave.
        """
        depth = int(self.dataset.BitsStored)
        table = self._table()
        if table:
            shown, depth = table.looked_up(values), depth if whole else max(depth, table.depth)
        else:
            shown = apply_windowing(values, self.dataset) if whole and self._window() else values
        if shown.min() < 0:
            shown = shown - shown.min()
        if not whole or shown.max() > np.iinfo(np.uint16).max:
            # Rounded or cut off as they are, values between 0 and 1 would be black and white.
            shares = shown / ((1 << table.depth) - 1) if table else self._shares(values, span)
            shown = shares * ((1 << depth) - 1)
        bits = np.uint8 if shown.max() <= 255 and depth <= 8 else np.uint16
        levels: NDArray[Any] = np.clip(np.rint(shown), 0, np.iinfo(bits).max).astype(bits)
        return levels

    def _shares(self, values: NDArray[Any], span: tuple[float, float]) -> NDArray[np.float64]:
        """(H, W): a radiograph as its first window shows it, in shares of the window; without one, of the span.

        A linear window is taken as LINEAR_EXACT (PS3.3 C.11.2.1.3.2). LINEAR is for whole numbers: it takes one off its
        width, which is all there is of a window from 0 to 1.
        """
        low, high = span
        window = self._window()
        if window is None:
            return (values - low) / (high - low)
        center, width = window
        if not width > 0:
            raise DataError("has a broken DICOM header (a window without width). Export it again.")
        if str(self.dataset.get("VOILUTFunction") or "LINEAR").upper() == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - center) / width))
        return np.clip((values - center) / width + 0.5, 0, 1)

    def _window(self) -> tuple[float, float] | None:
        """Centre and width of the first window."""
        centers, widths = self.dataset.get("WindowCenter"), self.dataset.get("WindowWidth")
        if centers is None or widths is None:
            return None
        return float(np.atleast_1d(centers)[0]), float(np.atleast_1d(widths)[0])

    def _table(self) -> _Table | None:
        """The first VOI LUT."""
        item = next(iter(self.dataset.get("VOILUTSequence") or ()), Dataset())
        if item.get("LUTDescriptor") is None or item.get("LUTData") is None:
            return None
        count, first, depth = (int(number) for number in item.LUTDescriptor)
        count, data = count or 1 << 16, item.LUTData  # 2**16 does not fit into 16 bits
        if isinstance(data, bytes):
            little = self.dataset.file_meta.TransferSyntaxUID.is_little_endian
            wide = "<u2" if little else ">u2"
            data = np.frombuffer(data, wide if len(data) >= 2 * count else np.uint8)  # some pack entries of 8 bits
        entries = np.asarray(data).astype(np.int64)[:count]
        if len(entries) < count:
            raise DataError("has a broken DICOM header (a VOI LUT that is too short). Export it again.")
        return _Table(first, entries, depth)

    def _inverted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Turned over inside the range that the bits of a pixel span."""
        top = max((1 << int(self.dataset.BitsStored)) - 1, int(values.max()))
        return (top - values.astype(np.int64)).astype(values.dtype)

    def _padding(self, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
        """(H, W): where a pixel pads the image."""
        first = self.dataset.get("PixelPaddingValue")
        if first is None:
            return None
        last = self.dataset.get("PixelPaddingRangeLimit", first)
        # A header may write a negative padding value as the unsigned number of the same bits.
        low, high = sorted(np.asarray([int(first), int(last)]).astype(stored.dtype))
        mask: NDArray[np.bool_] = (stored >= low) & (stored <= high)
        return mask

    def _find(self, sequence: str, frame: int) -> Dataset:
        parts = [*self._per_frame[frame : frame + 1], self._shared]
        return next((part[sequence][0] for part in parts if part.get(sequence)), self.dataset)

    def _decoder(self) -> str:
        syntax = self.dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            return ""
        plugins = get_decoder(syntax).available_plugins
        return next((name for name in SAFE_DECODERS if name in plugins), "")

    def _coding(self) -> str:
        syntax = self.dataset.file_meta.TransferSyntaxUID
        return str(syntax.name) if syntax in AllTransferSyntaxes else "an unknown transfer syntax"


def _grey_if_equal(colours: NDArray[Any]) -> NDArray[Any]:
    """(H, W) of a colour image whose channels are the same, as ultrasound is often stored."""
    grey = bool((colours == colours[..., :1]).all())
    return np.ascontiguousarray(colours[..., 0]) if grey else colours[..., :3]


def _eight_bits(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours of a palette, whose tables have 8 or 16 bits."""
    return (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)

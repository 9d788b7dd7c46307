"""Pixels of DICOM files: decompressed, and brought to the values they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
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
        cut away HU. Padding (PixelPaddingValue) is no tissue: it becomes air in CT, 0 in other measured images (or
        their smallest value if that is below), else the darkest value of the rest.

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
        values = self._scaled(stored, frame)
        if self.modality in PROJECTIONS:
            values = self._presented(values)
        if photometric == "MONOCHROME1" and self.modality not in MEASURED:
            values = self._inverted(values)
        if padding is not None and padding.any() and not padding.all():
            # Unsigned stored values without an intercept cannot hold the air of a CT.
            values = values.astype(np.int32) if self.hounsfield and values.dtype.kind == "u" else values.copy()
            darkest = values[~padding].min()
            if self.modality in MEASURED:
                darkest = AIR if self.hounsfield else min(darkest, 0)
            values[padding] = darkest
        return values

    def _scaled(self, stored: NDArray[Any], frame: int) -> NDArray[Any]:
        if self.dataset.get("ModalityLUTSequence"):
            table: NDArray[Any] = apply_modality_lut(stored, self.dataset)
            return table
        scaling = self._find("PixelValueTransformationSequence", frame)
        slope, intercept = scaling.get("RescaleSlope"), scaling.get("RescaleIntercept")
        slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
        if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
            raise DataError("has a broken DICOM header (a rescale slope of 0, or not finite). Export it again.")
        if slope == 1 and intercept.is_integer():
            return stored if intercept == 0 else stored.astype(np.int64) + int(intercept)
        return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)

    def _presented(self, values: NDArray[Any]) -> NDArray[Any]:
        """A radiograph as its VOI LUT or first window shows it; unsigned integers."""
        shown = apply_voi_lut(values, self.dataset)
        if shown.min() < 0:
            shown = shown - shown.min()
        bits = np.uint8 if shown.max() <= 255 and int(self.dataset.BitsStored) <= 8 else np.uint16
        levels: NDArray[Any] = np.clip(np.rint(shown), 0, np.iinfo(bits).max).astype(bits)
        return levels

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

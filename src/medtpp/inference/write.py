"""Masks and probabilities as files, in the geometry of their scan; read back they are equal.

Of a scan in NIfTI the header's two transforms, their codes and the unit are taken over as they are.

Structures that overlap become one file each, as in TotalSegmentator, since a mask file holds one value per voxel and
viewers differ in what they make of four axes. A DICOM segmentation holds overlapping segments in one object.

Compression is the fastest there is (level 1): masks are mostly background, and higher levels save little.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import Structure
from medtpp.data.geometry import Geometry
from medtpp.data.volumes.read import ITK_SUFFIXES, NIFTI_SUFFIXES, has_suffix
from medtpp.data.volumes.write import write_nifti, write_png
from medtpp.errors import DataError, OutputError
from medtpp.files import atomic

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".png")

# What highdicom copies though the standard lets it be empty; de-identified files often leave it out altogether.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def write_mask(path: Path, labels: NDArray[np.unsignedinteger[Any]], geometry: Geometry) -> None:
    """Write a mask as the suffix says: .nii, .nii.gz, .nrrd, .mha or (in two dimensions) .png.

    Args:
        path: The file; written whole or not at all.
        labels: (*geometry.shape), uint8 or uint16: values as they are to be in the file.
        geometry: Of the scan.

    Raises:
        OutputError: Another suffix, or the file cannot be written.
        ValueError: The labels have another shape than the scan.
    """
    labels = _on_grid(labels, geometry)
    if not has_suffix(path, SUFFIXES):
        raise OutputError(f"Masks are not written as {path.name}. Choose one of {', '.join(SUFFIXES)}.")
    if has_suffix(path, NIFTI_SUFFIXES):
        write_nifti(path, labels, geometry)
    elif has_suffix(path, ITK_SUFFIXES):
        _write_itk(path, labels, geometry)
    elif geometry.dims == 2:
        write_png(path, labels)
    else:
        raise OutputError(f"{path.name}: a PNG holds no volume. Choose one of {', '.join(SUFFIXES[:-1])}.")


def write_overlapping(
    folder: Path, labels: NDArray[np.uint8], structures: Sequence[Structure], geometry: Geometry, suffix: str
) -> list[Path]:
    """Write structures that overlap, each in a file of its own with the values 0 and 1.

    Args:
        folder: Of the case.
        labels: (*geometry.shape), bit i - 1 set where the i-th structure is.
        structures: Their names become file names; see `structure_path`.
        geometry: Of the scan.
        suffix: One of `SUFFIXES`.

    Returns:
        The files, in the order of the structures.

    Raises:
        OutputError: See `write_mask`.
    """
    paths = [structure_path(folder, number, structure, suffix) for number, structure in enumerate(structures, start=1)]
    for bit, path in enumerate(paths):
        write_mask(path, labels >> np.uint8(bit) & np.uint8(1), geometry)
    return paths


def write_probability(path: Path, probability: NDArray[np.floating[Any]], geometry: Geometry) -> None:
    """Write one map of probabilities as NIfTI in steps of 1/255, which every reader scales back.

    Args:
        path: A .nii or .nii.gz file.
        probability: (*geometry.shape) in [0, 1].
        geometry: Of the scan.

    Raises:
        OutputError: Another suffix, or the file cannot be written.
    """
    if not has_suffix(path, NIFTI_SUFFIXES):
        raise OutputError(f"Probabilities are not written as {path.name}. Choose .nii.gz or .nii.")
    levels = np.empty(geometry.shape, np.uint8)
    for one, target in zip(probability, levels, strict=True):  # slice by slice, to save memory
        target[...] = np.rint(one.astype(np.float32) * 255)
    write_nifti(path, levels, geometry, slope=1 / 255)


def structure_path(folder: Path, number: int, structure: Structure, suffix: str) -> Path:
    """The file of a structure in a case's folder, such as `2_tumour_core.nii.gz`; the number keeps names apart."""
    name = re.sub(r"\W+", "_", structure.name).strip("_")
    return folder / f"{number}_{name}{suffix}"


def write_dicom_seg(
    path: Path,
    labels: NDArray[np.uint8],
    structures: Sequence[Structure],
    files: Sequence[Path],
    *,
    overlapping: bool = False,
) -> None:
    """Write a DICOM segmentation (SEG, BINARY) by highdicom, in the frame of reference of its source.

    The patient's and the study's elements are copied from the source, as the standard demands, into this object and
    nowhere else. All structures have the category and type "Tissue", as 3D Slicer's default, since names are free; the
    name is the segment's label. Slices without any structure are left out of the file.

    Args:
        path: The file.
        labels: (D, H, W) on the grid that `read_volume` gave for the source: i for the i-th structure; with
            `overlapping`, bit i - 1.
        structures: In their order; segments are numbered from 1.
        files: The slices of the source series, or its one multi-frame file.
        overlapping: Whether structures overlap.

    Raises:
        DataError: The source is broken or lacks what a segmentation refers to. No text of the header is in it.
        OutputError: The file cannot be written.
        ValueError: The labels do not fit the source.
    """
    from medtpp.data.volumes.header import discreet

    content = BytesIO()
    try:
        with discreet("no DICOM segmentation can be made from its header. Write NIfTI instead."):
            sources, order = _sources(files)
        if len(order) != len(labels):
            raise ValueError(f"{len(labels)} slices of labels for {len(order)} slices of the source")
        pixels = np.empty_like(labels)
        pixels[order] = labels
        if overlapping:
            pixels = np.stack([pixels >> np.uint8(bit) & np.uint8(1) for bit in range(len(structures))], axis=-1)
        with discreet("no DICOM segmentation can be made from its header. Write NIfTI instead."):
            _segmentation(sources, pixels, structures).save_as(content)
    except DataError as error:
        raise DataError(f"{files[0]}: {error.message}", error.problems) from None
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _on_grid(labels: NDArray[np.unsignedinteger[Any]], geometry: Geometry) -> NDArray[np.unsignedinteger[Any]]:
    if labels.shape != geometry.shape:
        raise ValueError(f"labels of shape {labels.shape} are not on a grid of shape {geometry.shape}")
    return np.ascontiguousarray(labels)


def _write_itk(path: Path, values: NDArray[np.unsignedinteger[Any]], geometry: Geometry) -> None:
    import SimpleITK as sitk  # noqa: N813 - the name that everybody knows it by

    image = sitk.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(np.array(geometry.directions)[::-1].T.ravel().tolist())
    with atomic(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True, compressionLevel=1)
        except RuntimeError as error:
            raise OutputError(f"Cannot write {path}. Free some space or choose another folder.") from error


def _sources(files: Sequence[Path]) -> tuple[list[Dataset], list[int]]:
    """The source images without pixels, and for each slice in space the place of its frame among theirs."""
    from medtpp.data.volumes.header import open_dataset, read_header
    from medtpp.data.volumes.stack import in_order

    headers = [read_header(path) for path in files]
    planes = [plane for header in headers if header is not None for plane in header.planes]
    if not planes:
        raise DataError("has no slices with a position, which a DICOM segmentation needs. Write NIfTI or PNG instead.")
    planes = in_order(planes)
    datasets = []
    for path in dict.fromkeys(plane.file for plane in planes):
        dataset = open_dataset(path)
        missing = [keyword for keyword in _NEEDED if not dataset.get(keyword)]
        if missing:
            raise DataError(
                f"a DICOM segmentation refers to its source by {', '.join(missing)}, which the header of {path.name} "
                "lacks. Write NIfTI instead."
            )
        dataset.pop("PixelData", None)
        for keyword in _MAY_BE_EMPTY:
            if keyword not in dataset:
                setattr(dataset, keyword, None)
        datasets.append(dataset)
    return datasets, [index if plane.frame is None else plane.frame for index, plane in enumerate(planes)]


def _segmentation(sources: Sequence[Dataset], pixels: NDArray[np.uint8], structures: Sequence[Structure]) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = AlgorithmIdentificationSequence(
        "medtpp", family=codes.cid7162.ArtificialIntelligence, version=version("medtpp")
    )
    tissue = codes.SCT.Tissue
    return Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=[
            # A label has 64 characters, and a backslash would end it.
            SegmentDescription(number, one.name.replace("\\", "/")[:64], tissue, tissue, "AUTOMATIC", algorithm)
            for number, one in enumerate(structures, start=1)
        ],
        series_instance_uid=generate_uid(),
        series_number=1000,  # above those of scanners, so that viewers list it behind the scan
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="medtpp",
        manufacturer_model_name="medtpp",
        software_versions=version("medtpp"),
        device_serial_number="0",
    )

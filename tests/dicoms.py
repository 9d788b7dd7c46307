"""DICOM files of random numbers, with headers full of names and dates."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medtpp.data.case import Case
from medtpp.data.volumes import find_series, read_volume
from medtpp.errors import DataError

SECRETS = ("Doe^Jane", "PAT-4711", "19491231", "Thorax mit Befund", "Mustermann", "987654")
SHAPE = (5, 6, 8)
VALUES = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.uint16)


def dataset(pixels, **elements):
    """A CT slice of random numbers, with a header full of names and dates."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.PatientName, image.PatientID, image.PatientBirthDate = SECRETS[:3]
    image.StudyDate, image.AccessionNumber = SECRETS[2], SECRETS[5]
    image.SeriesDescription, image.ReferringPhysicianName = SECRETS[3], SECRETS[4]
    image.Modality = "CT"
    image.SeriesInstanceUID = image.StudyInstanceUID = "1.2.3.987654.1"
    image.SamplesPerPixel = pixels.shape[-1] if pixels.ndim == 3 and pixels.shape[-1] == 3 else 1
    image.PhotometricInterpretation = "RGB" if image.SamplesPerPixel == 3 else "MONOCHROME2"
    if image.SamplesPerPixel == 3:
        image.PlanarConfiguration = 0
    image.Rows, image.Columns = pixels.shape[-3:-1] if image.SamplesPerPixel == 3 else pixels.shape[-2:]
    image.BitsAllocated = image.BitsStored = 8 * pixels.dtype.itemsize
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(image, name, value)
        if value is None:
            delattr(image, name)
    return image


def slices(values=VALUES, *, step=2.5, rotation=None, spacing=(0.8, 0.6), origin=(-100.0, -50.0, 30.0), **elements):
    """One dataset per slice, in order, placed by a rotation of the usual axial orientation."""
    axes = np.eye(3) if rotation is None else rotation.as_matrix().T  # rows, columns, normal
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, **elements}
    return [
        dataset(
            pixels,
            ImagePositionPatient=[float(round(value, 6)) for value in origin + index * step * axes[2]],
            ImageOrientationPatient=[float(round(value, 8)) for value in (*axes[0], *axes[1])],
            PixelSpacing=list(spacing),
            SliceThickness=1,
            InstanceNumber=str(len(values) - index),
            **elements,
        )
        for index, pixels in enumerate(values)
    ]


def save(folder, images, names=None):
    """Write datasets under names whose order is not that of space."""
    names = names or [f"{(index * 7) % 11:02}.dcm" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(folder / name, image, enforce_file_format=True)
    return [folder / name for name in names]


def read(paths):
    return read_volume(Case("case", paths[0], files=tuple(paths)))


def read_one(path, image=None):
    if image is not None:
        save(path.parent, [image], [path.name])
    return read_volume(Case("case", path))


def faults(folder):
    """The problems of the only series in a folder, which reading reports as well."""
    (series,) = find_series(folder)
    errors = [problem for problem in series.problems if problem.severity == "error"]
    with pytest.raises(DataError) as caught:
        read(list(series.files))
    for problem in errors:
        assert problem.message in str(caught.value)
    assert not any(secret in str(caught.value) + repr(series) for secret in SECRETS)
    return {problem.code: problem.message for problem in errors}

"""Files of volumes for tests of reading, and what reading them gives."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from medtpp.data.case import Case
from medtpp.data.volumes import read_volume
from medtpp.errors import DataError

VALUES = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)  # (D, H, W)


def read(path, **options):
    return read_volume(Case("case", path, **options))


def itk_image(values=VALUES, spacing=(0.7, 0.8, 2.5), origin=(-10.0, 20.5, 3.25), direction=None, vector=False):
    image = sitk.GetImageFromArray(values, isVector=vector)
    image.SetSpacing(spacing[: image.GetDimension()])
    image.SetOrigin(origin[: image.GetDimension()])
    if direction is not None:
        image.SetDirection(np.asarray(direction, dtype=float).ravel())
    return image


def place(geometry, index):
    """Coordinates of an element, from the definition of a Geometry."""
    axes = zip(index, geometry.spacing, geometry.directions, strict=True)
    return np.array(geometry.origin) + sum(i * step * np.array(axis) for i, step, axis in axes)


def save_nifti(path, values=VALUES, affine=None, codes=(1, 1), qform=None, **header):
    """Values in our order of axes, reversed for the file."""
    image = nib.Nifti1Image(values.T, None)
    affine = np.eye(4) if affine is None else affine
    if codes[0]:
        image.set_sform(affine, codes[0])
    if codes[1]:
        image.set_qform(affine if qform is None else qform, codes[1])
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def seen_by_others(path):
    """Where nibabel and ITK see the voxels of a NIfTI file: what `numpy.testing.assert_equal` compares."""
    image, header = sitk.ReadImage(str(path)), nib.load(path).header
    places = [nib.load(path).affine, header.get_sform(coded=True), header.get_qform(coded=True)]
    steps = [header.get_zooms(), header.get_xyzt_units(), image.GetSpacing()]
    return [*places, *steps, image.GetOrigin(), image.GetDirection()]


def message(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path))
    return text

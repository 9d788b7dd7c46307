"""Reading masks: values, colours, and the grids that they must lie on."""

import io

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from medtpp.data.geometry import plain_geometry
from medtpp.data.volumes import read_mask
from medtpp.errors import DataError
from volume_files import VALUES, itk_image, read

LABELS = (VALUES % 3).astype(np.uint8)


def save_png(path, image):
    image.save(path)
    return path


def test_masks_of_volumes(tmp_path):
    sitk.WriteImage(itk_image(), str(tmp_path / "v.nii.gz"))
    geometry = read(tmp_path / "v.nii.gz").geometry
    for kind in (np.uint8, np.int16, np.int32, np.float32, np.float64):
        sitk.WriteImage(itk_image(LABELS.astype(kind)), str(tmp_path / "m.nii.gz"))
        mask = read_mask(tmp_path / "m.nii.gz", geometry)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, LABELS)
    sitk.WriteImage(itk_image(LABELS.astype(np.int16) * 1000 - 1), str(tmp_path / "m.mha"))
    assert read_mask(tmp_path / "m.mha", geometry).tolist() == (LABELS.astype(int) * 1000 - 1).tolist()


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (itk_image(LABELS[:4]), "another size"),
        (itk_image(LABELS, spacing=(0.7, 0.8, 2.4)), "another place"),
        (itk_image(LABELS, origin=(-10.0, 20.5, 9.0)), "another place"),
        (itk_image(LABELS, direction=np.diag([-1, 1, 1])), "another place"),
        (itk_image(LABELS * 0.5), "no whole numbers (0.5)"),
        (itk_image(np.full(LABELS.shape, np.nan, np.float32)), "210 NaN"),
        (itk_image(np.stack([LABELS] * 2, axis=-1), vector=True), "2 channels"),
        (itk_image(LABELS.astype(np.int32) << 26), "no labels"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, image, text):
    sitk.WriteImage(itk_image(), str(tmp_path / "v.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "m.nii.gz"))
    geometry = read(tmp_path / "v.nii.gz").geometry
    with pytest.raises(DataError) as caught:
        read_mask(tmp_path / "m.nii.gz", geometry)
    assert str(tmp_path / "m.nii.gz") in str(caught.value)
    assert text in str(caught.value)
    if text.startswith("another"):
        assert "image: 5 x 6 x 7, spacing (2.5, 0.8, 0.7) mm" in str(caught.value)


def test_image_masks_hold_values_not_colours(tmp_path):
    labels = LABELS[0]
    geometry = plain_geometry(labels.shape)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    deep = labels.astype(np.uint16) * 300
    for image, expected in (
        (Image.fromarray(labels), labels),
        (palette, labels),
        (Image.fromarray(labels > 0), labels > 0),
        (Image.fromarray(np.stack([labels] * 3, axis=-1)), labels),
        (Image.fromarray(np.stack([labels * 100] * 3 + [np.full_like(labels, 255)], axis=-1)), labels * 100),
        (Image.fromarray(deep), deep),
    ):
        mask = read_mask(save_png(tmp_path / "m.png", image), geometry)
        assert np.array_equal(mask, expected), image.mode
    assert read_mask(save_png(tmp_path / "m.tif", Image.fromarray(labels.astype(np.float32))), geometry).max() == 2


def test_colour_masks_list_their_colours(tmp_path):
    pixels = np.zeros((6, 7, 3), np.uint8)
    pixels[0] = (255, 0, 0)
    with pytest.raises(DataError) as caught:
        read_mask(save_png(tmp_path / "m.png", Image.fromarray(pixels)), plain_geometry((6, 7)))
    assert "2 colours: (0, 0, 0) at 35 pixels, (255, 0, 0) at 7 pixels" in str(caught.value)


def test_jpeg_masks_are_refused_where_compression_shows(tmp_path):
    labels = np.random.default_rng(0).choice([0, 255], (16, 16)).astype(np.uint8)
    with pytest.raises(DataError, match="JPEG, whose compression"):
        read_mask(save_png(tmp_path / "m.jpg", Image.fromarray(labels)), plain_geometry((16, 16)))
    flat = Image.fromarray(np.zeros((16, 16), np.uint8))
    assert read_mask(save_png(tmp_path / "n.jpg", flat), plain_geometry((16, 16))).max() == 0


def test_swapped_axes_are_named_and_exif_is_applied(tmp_path):
    image = Image.fromarray(np.arange(42, dtype=np.uint8).reshape(6, 7))
    exif = Image.Exif()
    exif[274] = 6  # rotate
    image.save(tmp_path / "m.png", exif=exif)
    assert read_mask(tmp_path / "m.png", plain_geometry((7, 6)))[0, 0] == 35
    with pytest.raises(DataError, match="swapped"):
        read_mask(tmp_path / "m.png", plain_geometry((6, 7)))


def test_broken_image_masks(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (60, 70), np.uint8)).save(stream, "PNG")
    for name, data in (("a.png", stream.getvalue()[:200]), ("b.png", b""), ("c.png", b"text" * 9), ("d.dcm", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_mask(tmp_path / name, plain_geometry((60, 70)))

"""Reading NIfTI, NRRD and MetaImage: exact geometry, broken files of every kind."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from medtpp.data.geometry import Geometry
from medtpp.data.volumes import read_mask, volume_fingerprint
from medtpp.errors import DataError
from volume_files import VALUES, itk_image, message, place, read, save_nifti


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    flip=st.booleans(),
    spacing=st.tuples(*[st.floats(0.05, 12)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"]),
)
def test_any_orientation_comes_back_as_itk_and_nibabel_see_it(
    tmp_path_factory, angles, flip, spacing, origin, shape, suffix
):
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    if flip:
        direction[:, 0] *= -1
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = tmp_path_factory.mktemp("v") / f"v{suffix}"
    image = itk_image(values, spacing, origin, direction)
    sitk.WriteImage(image, str(path))
    volume = read(path)
    assert np.array_equal(volume.array, values[None])
    assert volume.geometry.known
    for index in [(0, 0, 0), tuple(size - 1 for size in shape)]:
        where = place(volume.geometry, index)
        wanted = image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
        np.testing.assert_allclose(where, wanted, atol=2e-3)
        if suffix.startswith(".nii"):
            ras = nib.load(path).affine @ [*index[::-1], 1]
            np.testing.assert_allclose(where, ras[:3] * [-1, -1, 1], atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd", ".NII.GZ"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_values_and_types(tmp_path, suffix, kind):
    values = (VALUES % 250).astype(kind)
    path = tmp_path / f"v{suffix}"
    lower = tmp_path / f"w{suffix.lower()}"
    sitk.WriteImage(itk_image(values), str(lower))
    lower.rename(path)
    array = read(path).array
    assert np.array_equal(array[0], values)
    expected = {np.int32: np.int16, np.float64: np.float32}.get(kind, kind)
    assert array.dtype == expected


def test_large_integers_stay_exact(tmp_path):
    sitk.WriteImage(itk_image(VALUES.astype(np.int32) * 1000), str(tmp_path / "v.mha"))
    array = read(tmp_path / "v.mha").array
    assert array.dtype == np.float32
    assert np.array_equal(array[0].astype(np.int64), VALUES.astype(np.int64) * 1000)


def test_scaling_and_units_in_a_nifti_header(tmp_path):
    image = nib.Nifti1Image(VALUES.T, np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "v.nii")
    volume = read(tmp_path / "v.nii")
    assert np.allclose(volume.array[0], VALUES * 0.5 + 3)
    assert volume.geometry.spacing == pytest.approx((0.001,) * 3)


@pytest.mark.parametrize("code", [0, 7, 8 + 2, 255])
def test_a_unit_that_is_none_is_millimetres_as_for_itk(tmp_path, code):
    """The upper bits are the unit of time."""
    path = save_nifti(tmp_path / "v.nii", affine=np.diag([1.0, 2, 3, 1]), xyzt_units=code)
    assert read(path).geometry.spacing == (3, 2, 1)
    assert sitk.ReadImage(str(path)).GetSpacing() == (1, 2, 3)


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (3, 1, 5, 6, 7), (16, 5, 6, 7)])
def test_a_fourth_axis_is_channels(tmp_path, shape):
    values = np.random.default_rng(1).random(shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values.T, np.diag([1, 2, 3, 1.0])), tmp_path / "v.nii.gz")
    volume = read(tmp_path / "v.nii.gz")
    assert np.array_equal(volume.array, values.reshape(shape[0], 5, 6, 7))
    assert volume.geometry.spacing == (3, 2, 1)


def test_vectors_and_four_axes_of_itk_are_channels(tmp_path):
    vector = np.moveaxis(np.stack([VALUES, VALUES + 1]), 0, -1)
    for suffix in ("mha", "nrrd"):
        sitk.WriteImage(itk_image(vector, vector=True), str(tmp_path / f"v.{suffix}"))
        volume = read(tmp_path / f"v.{suffix}")
        assert np.array_equal(volume.array, np.stack([VALUES, VALUES + 1]))
        assert volume.geometry.spacing == (2.5, 0.8, 0.7)
    four = sitk.JoinSeries([itk_image(), itk_image(VALUES + 1)])
    sitk.WriteImage(four, str(tmp_path / "four.mha"))
    assert np.array_equal(read(tmp_path / "four.mha").array, np.stack([VALUES, VALUES + 1]))


def test_too_many_volumes_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 17), np.uint8), np.eye(4)), tmp_path / "v.nii")
    assert "17 volumes on its fourth axis" in message(tmp_path / "v.nii")
    sitk.WriteImage(sitk.JoinSeries([itk_image()] * 17), str(tmp_path / "v.mha"))
    assert "17 channels" in message(tmp_path / "v.mha")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2, 3), np.uint8), np.eye(4)), tmp_path / "w.nii")
    assert "5 axes" in message(tmp_path / "w.nii")


def test_channels_in_files_of_their_own(tmp_path):
    for name, offset in (("a", 0), ("b", 1)):
        sitk.WriteImage(itk_image(VALUES + offset), str(tmp_path / f"{name}.nii.gz"))
    sitk.WriteImage(itk_image(VALUES.astype(np.float32)), str(tmp_path / "c.mha"))
    volume = read(tmp_path / "a.nii.gz", channels=(tmp_path / "b.nii.gz", tmp_path / "c.mha"))
    assert np.array_equal(volume.array, np.stack([VALUES, VALUES + 1, VALUES]))
    assert volume.array.dtype == np.float32
    sitk.WriteImage(itk_image(spacing=(0.7, 0.8, 2.0)), str(tmp_path / "d.nii.gz"))
    with pytest.raises(DataError, match=r"d\.nii\.gz: has another grid") as caught:
        read(tmp_path / "a.nii.gz", channels=(tmp_path / "d.nii.gz",))
    assert "(2.5, 0.8, 0.7)" in str(caught.value)
    assert "(2, 0.8, 0.7)" in str(caught.value)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_axes_in_another_order_are_the_same_voxels(tmp_path_factory, order, signs):
    """A mask and a channel that a converter turned come back in the order of the image."""
    folder = tmp_path_factory.mktemp("v")
    tilt = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
    image = itk_image(direction=tilt)
    sitk.WriteImage(image, str(folder / "v.nii.gz"))
    turned = sitk.Flip(sitk.PermuteAxes(image, order), [sign < 0 for sign in signs])
    sitk.WriteImage(turned, str(folder / "t.mha"))
    assert sitk.GetArrayFromImage(turned).tolist() == read(folder / "t.mha").array[0].tolist()
    volume = read(folder / "v.nii.gz", channels=(folder / "t.mha",))
    assert np.array_equal(volume.array, np.stack([VALUES, VALUES]))
    assert np.array_equal(read_mask(folder / "t.mha", volume.geometry), VALUES)


def test_a_header_that_asks_for_more_than_there_is(tmp_path):
    path = save_nifti(tmp_path / "v.nii")
    data = bytearray(path.read_bytes())
    data[42:48] = np.array([32767] * 3, "<i2").tobytes()  # the shape
    path.write_bytes(data)
    assert "announces 70,3" in message(path)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mha", "nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.97])
def test_truncated_files(tmp_path, suffix, compressed, share, capfd):
    path = tmp_path / f"v.{suffix}"
    sitk.WriteImage(itk_image(np.tile(VALUES, (4, 4, 4))), str(path), useCompression=compressed)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    text = message(path)
    assert "empty" in text if share == 0 else "truncated" in text or "broken" in text
    assert not any(capfd.readouterr())  # libraries print nothing past the message


@pytest.mark.parametrize(
    ("suffix", "voxels"),
    [("nii.gz", "nii.gz"), ("mha", "mha"), ("nrrd", "nrrd"), ("nhdr", "raw.gz"), ("mhd", "zraw")],
)
def test_a_compressed_file_whose_rest_is_zeros(tmp_path, suffix, voxels):
    path, data = tmp_path / f"v.{suffix}", tmp_path / f"v.{voxels}"
    values = np.tile(VALUES, (4, 4, 4))
    sitk.WriteImage(itk_image(values), str(path), useCompression=True)
    assert np.array_equal(read(path).array[0], values)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert "does not add up" in message(path)


@given(data=st.binary(min_size=1, max_size=600))
@settings(max_examples=40, deadline=None)
def test_any_bytes_are_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("v")
    for name in ("v.nii", "v.nii.gz", "v.dcm", "v.png"):
        (folder / name).write_bytes(data)
        message(folder / name)


def test_a_missing_file_and_missing_data(tmp_path, capfd):
    for name in ("v.nii.gz", "v.mha", "v.dcm", "v.png", "folder"):
        assert "cannot be opened" in message(tmp_path / name)
    sitk.WriteImage(itk_image(), str(tmp_path / "v.mhd"))
    (tmp_path / "v.raw").write_bytes((tmp_path / "v.raw").read_bytes()[:-1])
    assert "announces 420 bytes of voxels, 419 are there" in message(tmp_path / "v.mhd")
    (tmp_path / "v.raw").unlink()
    assert "its data file is missing. Copy it" in message(tmp_path / "v.mhd")
    sitk.WriteImage(itk_image(), str(tmp_path / "v.nhdr"))
    (tmp_path / "v.raw").unlink()
    assert "data file may be missing" in message(tmp_path / "v.nhdr")
    assert not any(capfd.readouterr())


def test_what_a_library_mends_in_a_header_is_not_printed(tmp_path, caplog):
    path = save_nifti(tmp_path / "v.nii")
    data = bytearray(path.read_bytes())
    data[80:84] = bytes(4)  # the first step of the grid
    path.write_bytes(data)
    read(path)
    assert not caplog.records  # its log has a handler of its own, which prints


@pytest.mark.parametrize("suffix", ["nii.gz", "mha"])
def test_values_that_are_not_finite_are_counted(tmp_path, suffix):
    values = VALUES.astype(np.float32)
    values[1, 2, 3] = values[4, 4, 4] = np.nan
    values[3, 0, 0] = -np.inf
    sitk.WriteImage(itk_image(values), str(tmp_path / f"v.{suffix}"))
    text = message(tmp_path / f"v.{suffix}")
    assert "2 NaN and 1 infinite of 210 values, the first at index (1, 2, 3)" in text


def test_voxels_that_are_no_real_numbers(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4), np.complex64), np.eye(4)), tmp_path / "v.nii")
    assert "complex64" in message(tmp_path / "v.nii")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.complex64)), str(tmp_path / "v.nrrd"))
    assert "complex" in message(tmp_path / "v.nrrd")


def test_contradicting_transforms(tmp_path):
    other = np.diag([-1.0, 1, 1, 1])
    assert "qform and sform" in message(save_nifti(tmp_path / "a.nii", qform=other))
    # A scanner's space and an atlas's may differ: sform counts.
    volume = read(save_nifti(tmp_path / "b.nii", codes=(4, 1), qform=other))
    assert volume.geometry.directions[2] == (-1, 0, 0)  # to the right, in coordinates to the left
    # Rounding is no contradiction.
    read(save_nifti(tmp_path / "c.nii", qform=np.diag([1.00001, 1, 1, 1])))


def test_sheared_and_degenerate_directions(tmp_path):
    shear = np.eye(4)
    shear[0, 1] = 0.3
    assert "right angles" in message(save_nifti(tmp_path / "a.nii", affine=shear, codes=(1, 0)))
    # An atlas's affine registration is sheared; the scanner's own transform is not.
    atlas = read(save_nifti(tmp_path / "b.nii", affine=shear, codes=(4, 1), qform=np.diag([2.0, 2, 2, 1])))
    assert atlas.geometry.spacing == (2, 2, 2)
    assert "degenerate" in message(save_nifti(tmp_path / "c.nii", affine=np.diag([0.0, 1, 1, 1]), codes=(1, 0)))
    sitk.WriteImage(itk_image(), str(tmp_path / "d.mha"))
    good = (tmp_path / "d.mha").read_bytes()
    (tmp_path / "d.mha").write_bytes(good.replace(b"Matrix = 1 0 0 0 1 0", b"Matrix = 1 0 0 1 0 0"))
    assert "degenerate" in message(tmp_path / "d.mha")
    (tmp_path / "e.mha").write_bytes(good.replace(b"Matrix = 1 0 0 0 1 0", b"Matrix = 1 0 0 .6 .8 0"))
    assert "right angles" in message(tmp_path / "e.mha")


def test_files_that_do_not_say_where_they_are(tmp_path):
    volume = read(save_nifti(tmp_path / "a.nii", codes=(0, 0), pixdim=[1, 2, 3, 4, 0, 0, 0, 0]))
    assert not volume.geometry.known
    assert volume.geometry.spacing == (4, 3, 2)
    header = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n"
    (tmp_path / "b.nrrd").write_bytes(header.encode() + bytes(range(8)))
    volume = read(tmp_path / "b.nrrd")
    assert not volume.geometry.known
    assert volume.array.ravel().tolist() == list(range(8))


def test_two_dimensions(tmp_path):
    nib.save(nib.Nifti1Image(VALUES[0].T, np.diag([2.0, 3, 1, 1])), tmp_path / "v.nii")
    volume = read(tmp_path / "v.nii")
    assert np.array_equal(volume.array, VALUES[:1])
    assert volume.geometry.spacing == (3, 2)
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "g.png")
    grey = read(tmp_path / "g.png")
    assert (grey.units, grey.array.shape, grey.geometry.known) == ("levels", (1, 3, 4), False)
    colour = np.random.default_rng(0).integers(0, 255, (3, 4, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "c.png")
    assert np.array_equal(read(tmp_path / "c.png").array, np.moveaxis(colour, -1, 0))
    Image.fromarray(np.full((3, 4), 3000, np.uint16)).save(tmp_path / "d.png")
    assert read(tmp_path / "d.png").units == "none"


def test_fingerprints_follow_shape_type_and_values(tmp_path):
    images = [VALUES, VALUES + 1, VALUES.reshape(6, 5, 7), VALUES.astype(np.float32)]
    prints = set()
    for number, values in enumerate(images):
        sitk.WriteImage(itk_image(values), str(tmp_path / f"{number}.mha"))
        sitk.WriteImage(itk_image(values), str(tmp_path / f"{number}.nii.gz"))
        mha, nifti = (volume_fingerprint(read(tmp_path / f"{number}{suffix}")) for suffix in (".mha", ".nii.gz"))
        assert mha == nifti  # the file's kind and the way it lies in memory do not count
        prints.add(mha)
    assert len(prints) == 4
    assert all(len(text) == 32 for text in prints)


def test_a_gzip_file_of_another_kind(tmp_path):
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(b"no image at all"))
    assert "not a NIfTI file" in message(tmp_path / "v.nii.gz")


def test_geometry_is_of_plain_numbers(tmp_path):
    geometry = read(save_nifti(tmp_path / "v.nii")).geometry
    assert isinstance(geometry, Geometry)
    assert {type(value) for value in (*geometry.spacing, *geometry.origin, *geometry.directions[0])} == {float}
    assert {type(size) for size in geometry.shape} == {int}

"""Decoding and preprocessing: every format, depth and mode; broken files are errors; shapes and levels."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from medtpp.data import decode as decode_module
from medtpp.data.decode import decode, pixel_fingerprint, probe_colour, read_image
from medtpp.data.preprocess import Preprocessing, window
from medtpp.errors import DataError


def smooth(height=48, width=40, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


GREY = smooth()
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
DEEP = GREY.astype(np.uint16) << 4 | 5  # 12 bits in 16


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png16(pixels):
    """A 16-bit PNG of 1 to 4 channels, which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(pixels, order):
    """An uncompressed 16-bit TIFF of 1 or 3 channels, in either byte order."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    bits_at, data_at = 8 + 2 + 10 * 12 + 4, 8 + 2 + 10 * 12 + 4 + 2 * channels
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits_at if channels > 1 else 16),
        (259, 3, 1, 1), (262, 3, 1, 2 if channels > 1 else 1),
        (273, 4, 1, data_at), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    body = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
        body += struct.pack(f"{order}HHI", tag, kind, count) + packed
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    return start + body + struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels) + data


@pytest.mark.parametrize(
    ("pixels", "kind", "options"),
    [
        (GREY, "PNG", {}),
        (COLOUR, "PNG", {}),
        (DEEP, "PNG", {}),
        (GREY, "BMP", {}),
        (COLOUR, "BMP", {}),
        (GREY, "TIFF", {}),
        (COLOUR, "TIFF", {}),
        (DEEP, "TIFF", {}),
        (DEEP, "TIFF", {"compression": "tiff_lzw"}),
        (COLOUR, "TIFF", {"compression": "tiff_deflate"}),
        (GREY, "TIFF", {"compression": "packbits"}),
    ],
)
def test_lossless_formats_return_what_was_saved(pixels, kind, options):
    found = decode(encoded(pixels, kind, **options))
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_jpeg_returns_nearly_what_was_saved(pixels, progressive):
    found = decode(encoded(pixels, "JPEG", quality=95, subsampling=0, progressive=progressive))
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("data", [png16, lambda p: tiff16(p, "<"), lambda p: tiff16(p, ">")])
def test_sixteen_bit_colour_keeps_all_bits(data):
    pixels = COLOUR.astype(np.uint16) * 257 ^ 0x1234
    np.testing.assert_array_equal(decode(data(pixels)), pixels)


def test_sixteen_bit_alpha_is_laid_on_black():
    pixels = np.dstack([COLOUR.astype(np.uint16) * 257, np.full(GREY.shape, 32768, np.uint16)])
    np.testing.assert_allclose(decode(png16(pixels)), pixels[..., :3] / 2, atol=1)


def test_sixteen_bit_grey_with_alpha_is_refused_rather_than_cut_to_eight_bits():
    with pytest.raises(DataError, match="16-bit pixels of a kind"):
        decode(png16(np.dstack([DEEP, DEEP])))


def test_sixteen_bit_grey_stored_as_colour_is_grey():
    np.testing.assert_array_equal(decode(png16(np.dstack([DEEP] * 3))), DEEP)


def test_big_endian_grey_tiff():
    np.testing.assert_array_equal(decode(tiff16(DEEP[..., None], ">")), DEEP)


def test_palette_one_bit_and_cmyk():
    quantised = Image.fromarray(COLOUR).quantize(16)
    np.testing.assert_array_equal(decode(encoded(quantised, "PNG")), np.asarray(quantised.convert("RGB")))
    bits = Image.fromarray(GREY).convert("1")
    np.testing.assert_array_equal(decode(encoded(bits, "PNG")), np.asarray(bits) * np.uint8(255))
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    np.testing.assert_array_equal(decode(encoded(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    assert decode(encoded(cmyk, "JPEG")).shape == COLOUR.shape


def test_transparent_pixels_become_black():
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:10] = 0
    expected = np.where(alpha[..., None] > 0, COLOUR, 0)
    np.testing.assert_array_equal(decode(encoded(np.dstack([COLOUR, alpha]), "PNG")), expected)
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), np.where(alpha > 0, GREY, 0))


def test_grey_stored_as_colour_is_grey():
    np.testing.assert_array_equal(decode(encoded(np.dstack([GREY] * 3), "PNG")), GREY)
    tinted = np.dstack([GREY, GREY, GREY.clip(0, 246) + 9])
    assert decode(encoded(tinted.astype(np.uint8), "PNG")).ndim == 3


def test_one_coloured_pixel_makes_an_image_coloured():
    pixels = np.dstack([GREY] * 3)
    pixels[17, 23] = [255, 0, 0]
    assert decode(encoded(pixels, "PNG")).ndim == 3


def test_values_without_a_scale_are_spread_over_sixteen_bits():
    hounsfield = np.linspace(-1024, 3071, 48 * 40).reshape(48, 40)
    for pixels in (hounsfield.astype(np.int32), hounsfield.astype(np.float32)):
        found = decode(encoded(pixels, "TIFF"))
        assert found.dtype == np.uint16
        assert (found.min(), found.max()) == (0, 65535)
        assert (np.diff(found.ravel().astype(int)) >= 0).all()
    small = np.arange(48 * 40, dtype=np.int32).reshape(48, 40)
    np.testing.assert_array_equal(decode(encoded(small, "TIFF")), small)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    pixels = GREY.astype(np.float32)
    pixels[3, 4] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        decode(encoded(pixels, "TIFF"))


@pytest.mark.parametrize(("pixels", "kind"), [(COLOUR, "PNG"), (COLOUR, "TIFF"), (DEEP, "TIFF"), (DEEP, "PNG")])
def test_exif_orientation_is_applied(pixels, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    np.testing.assert_array_equal(decode(encoded(pixels, kind, exif=exif)), np.rot90(pixels, k=-1))


def test_exif_orientation_of_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 3
    plain, turned = (decode(encoded(GREY, "JPEG", **options)) for options in ({}, {"exif": exif}))
    np.testing.assert_array_equal(turned, plain[::-1, ::-1])


@pytest.mark.parametrize(
    ("pixels", "kind", "options"),
    [
        (GREY, "PNG", {}),
        (DEEP, "PNG", {}),
        (COLOUR, "JPEG", {}),
        (GREY, "JPEG", {"progressive": True}),
        (GREY, "BMP", {}),
        (DEEP, "TIFF", {}),
        (COLOUR, "TIFF", {"compression": "tiff_lzw"}),
        (COLOUR, "TIFF", {"compression": "jpeg"}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_truncated_file_is_an_error_or_nothing_is_missing(pixels, kind, options):
    data = encoded(pixels, kind, **options)
    whole = decode(data)
    errors = 0
    for length in [*range(0, len(data), 37), *range(len(data) - 20, len(data))]:
        try:
            np.testing.assert_array_equal(decode(data[:length]), whole)
        except DataError:
            errors += 1
    assert errors > 0.9 * len(data) / 37


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_interrupted_copy_filled_up_with_zeros_is_an_error(kind):
    data = encoded(COLOUR, kind)
    for length in range(len(data) // 2, len(data) - 20, 29):
        with pytest.raises(DataError):
            decode(data[:length] + bytes(len(data) - length))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    header=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_give_pixels_or_a_data_error_and_nothing_else(kind, changes, header):
    data = bytearray(encoded(COLOUR, kind))
    for place, value in changes:
        data[int(place * (60 if header else len(data)))] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "MAX_PIXELS", 1 << 20)
        try:
            pixels = decode(bytes(data))
        except DataError:
            return
    assert pixels.dtype in (np.uint8, np.uint16)
    assert pixels.ndim == 2 or pixels.shape[2:] == (3,)


def test_several_pages_are_refused():
    pages = [Image.fromarray(GREY), Image.fromarray(GREY)]
    with pytest.raises(DataError, match="holds 2 pages"):
        decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))


def test_messages_name_the_file_and_the_reason(tmp_path):
    path = tmp_path / "scan.png"
    for content, reason in ((b"", "0 bytes"), (b"not an image", "not a PNG, JPEG, TIFF or BMP")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason) as error:
            read_image(path)
        assert str(path) in error.value.message
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "absent.png")


def test_a_decompression_bomb_is_refused(monkeypatch):
    data = encoded(GREY, "PNG")
    monkeypatch.setattr(decode_module, "MAX_PIXELS", GREY.size - 1)
    with pytest.raises(DataError, match="more than 1,919 pixels"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="pixels"):
        decode(data)


def test_fingerprints_see_pixels_shape_and_depth():
    assert pixel_fingerprint(GREY) == pixel_fingerprint(decode(encoded(GREY, "PNG")))
    different = [GREY, GREY.reshape(40, 48), GREY.T, GREY.astype(np.uint16), GREY ^ 1]
    prints = {pixel_fingerprint(pixels) for pixels in different}
    assert len(prints) == len(different)
    assert {len(text) for text in prints} == {32}


def test_probe_colour_looks_at_an_even_sample_and_passes_over_broken_files(tmp_path):
    paths = [tmp_path / f"{number:03}.png" for number in range(100)]
    for path in paths:
        path.write_bytes(encoded(GREY, "PNG"))
    paths[0].write_bytes(b"broken")
    assert not probe_colour(paths)
    paths[-1].write_bytes(encoded(COLOUR, "PNG"))
    assert probe_colour(paths, sample=5)
    assert not probe_colour(paths[:-1])
    assert not probe_colour([])


# Preprocessing


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 64),
    channels=st.sampled_from([1, 3]),
    fit=st.sampled_from(["stretch", "pad"]),
    colour=st.booleans(),
    deep=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_image_becomes_bytes_of_one_shape(height, width, size, channels, fit, colour, deep, seed):
    shape = (height, width, 3) if colour else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 4096 if deep else 256, shape)
    pixels = pixels.astype(np.uint16 if deep else np.uint8)
    preprocessing = Preprocessing(image_size=size, channels=channels, fit=fit)
    found = preprocessing.apply(pixels)
    assert found.shape == (channels, size, size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, preprocessing.apply(pixels.copy()))
    if channels == 3 and not colour:
        assert (found == found[:1]).all()


@given(value=st.integers(0, 255), height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_a_constant_image_stays_constant(value, height, width, size):
    for shape in ((height, width), (height, width, 3)):
        found = Preprocessing(image_size=size, channels=1).apply(np.full(shape, value, np.uint8))
        assert (found == value).all()


def test_padding_is_black_centred_and_keeps_the_aspect():
    found = Preprocessing(image_size=64, channels=1, fit="pad").apply(np.full((50, 100), 200, np.uint8))[0]
    assert (found[16:48] == 200).all()
    assert not found[:16].any()
    assert not found[48:].any()


def test_a_fine_checkerboard_is_averaged_not_aliased():
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    found = Preprocessing(image_size=60, channels=1).apply(board)
    assert np.abs(found.astype(int) - 127).max() < 12


def test_colour_becomes_grey_by_luma():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 1] = 255
    assert (Preprocessing(image_size=4, channels=1).apply(pixels) == 150).all()  # 0.587 * 255


def test_twelve_bits_in_sixteen_fill_the_range_and_outliers_do_not():
    pixels = np.linspace(100, 4095, 100_000).astype(np.uint16).reshape(200, 500)
    pixels[0, :20] = 65535
    levels = window(pixels)
    assert len(np.unique(levels)) == 256
    assert abs(int(levels[100, 250]) - 127) <= 2


def test_an_almost_constant_sixteen_bit_image_keeps_what_little_there_is():
    pixels = np.full((100, 100), 1000, np.uint16)
    assert not window(pixels).any()
    pixels[5, 5] = 1200
    levels = window(pixels)
    assert levels[5, 5] == 255
    assert levels[0, 0] == 0


def test_another_version_or_size_zero_is_refused():
    with pytest.raises(ValidationError):
        Preprocessing(image_size=8, channels=1, version=2)
    with pytest.raises(ValidationError):
        Preprocessing(image_size=0, channels=1)

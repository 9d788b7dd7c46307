"""`medtpp check` on real files of volumes, masks, archives and DICOM, broken ones among them."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from runs import cli, done, refused

SECRETS = ("Doe^Jane", "Jane", "PAT-4711", "19491231", "20240229", "Thorax mit Befund", "Mustermann", "987654")
SHAPE = (6, 8, 10)  # (x, y, z) of the NIfTI files here


def nifti(path, values, spacing=(1.0, 1.0, 1.0), shift=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = shift
    nib.save(nib.Nifti1Image(values, affine), path)


def volumes(folder, count=4, spacing=(1.0, 1.0, 1.0)):
    """Sound volumes with masks."""
    for number in range(count):
        rng = np.random.default_rng(number)
        nifti(folder / "images" / f"{number}.nii.gz", rng.normal(size=SHAPE).astype(np.float32), spacing)
        mask = np.zeros(SHAPE, np.uint8)
        mask[1:4, 2:5, 2:6] = 1 + number % 2
        nifti(folder / "masks" / f"{number}.nii.gz", mask, spacing)
    return folder


def pictures(folder, count=4, size=(24, 16), seed=0):
    """Sound grey images with masks; size is (columns, rows)."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)).save(folder / "images" / f"{number}.png")
        mask = np.zeros(size[::-1], np.uint8)
        mask[3:9, 3:9] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def another_shape(folder):
    nifti(volumes(folder) / "masks" / "1.nii.gz", np.ones((6, 8, 9), np.uint8))


def another_place(folder):
    nifti(volumes(folder) / "masks" / "1.nii.gz", np.ones(SHAPE, np.uint8), shift=40.0)


def broken_number(value):
    def make(folder):
        values = np.zeros(SHAPE, np.float32)
        values[2, 3, 4] = value
        nifti(volumes(folder) / "images" / "1.nii.gz", values)

    return make


def cut_short(folder):
    file = volumes(folder) / "images" / "1.nii.gz"
    file.write_bytes(file.read_bytes()[:-60])


def fractions(folder):
    nifti(volumes(folder) / "masks" / "1.nii.gz", np.full(SHAPE, 0.5, np.float32))


def several_channels(folder):
    nifti(volumes(folder) / "images" / "1.nii.gz", np.zeros((*SHAPE, 2), np.float32))


def an_image_among_volumes(folder):
    volumes(folder)
    for part in ("images", "masks"):
        Image.fromarray(np.eye(9, dtype=np.uint8)).save(folder / part / "flat.png")


def grey_mask(folder):
    ramp = np.arange(24 * 16, dtype=np.uint32).reshape(16, 24) % 200
    Image.fromarray(ramp.astype(np.uint8)).save(pictures(folder) / "masks" / "1.png")


def colour_mask(folder):
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[3:9, 3:9] = (255, 0, 0)
    Image.fromarray(mask).save(pictures(folder) / "masks" / "1.png")


def rotated_photograph(folder):
    """Shown upright by every viewer, and outlined as it lies in the file."""
    pictures(folder)
    image = folder / "images" / "1.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image).save(image.with_suffix(".jpg"), exif=exif)
    image.unlink()


def all_empty(folder):
    volumes(folder)
    for mask in (folder / "masks").iterdir():
        nifti(mask, np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (another_shape, ["masks/1.nii.gz: the mask has another size than its image", "mask: 9 x 8 x 6, spacing",
                         "image: 10 x 8 x 6"]),
        (another_place, ["masks/1.nii.gz: the mask has another place than its image", "origin"]),
        (broken_number(np.nan), ["images/1.nii.gz: holds 1 NaN of 480 values, the first at index (4, 3, 2)"]),
        (broken_number(np.inf), ["images/1.nii.gz: holds 1 infinite of 480 values"]),
        (cut_short, ["images/1.nii.gz: is truncated"]),
        (fractions, ["masks/1.nii.gz: the mask holds 480 values that are no whole numbers (0.5)"]),
        (several_channels, ["different numbers of channels", "2 (images/1.nii.gz)"]),
        (an_image_among_volumes, ["1 image and 4 volumes are mixed", "images/flat.png"]),
        (grey_mask, ["The masks hold 200 different values, from 1 to 255", "masks/1.png", "PNG, not JPEG"]),
        (colour_mask, ["masks/1.png: the mask is in colour, with 2 colours: (0, 0, 0) at 348 pixels"]),
        (rotated_photograph, ["masks/1.png: the mask has another size than its image",
                              "was one of the two rotated?", "mask: 16 x 24", "image: 24 x 16"]),
        (all_empty, ["None of the 4 masks shows any; they hold 0"]),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, make, words):
    make(tmp_path / "data")
    said = refused("check", tmp_path / "data")
    assert [word for word in words if word not in said] == [], said
    assert "error: " in said
    assert str(tmp_path / "data" / "masks") not in said  # files are named as they lie in the data set


def turn(path, orientation, suffix=".png"):
    """The same stored pixels with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(path)
    image.load()
    path.unlink()
    image.save(path.with_suffix(suffix), exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 6, 8])
def test_images_turned_by_exif_whose_masks_are_not(tmp_path, suffix, orientation):
    """Orientations that keep the size: image and mask could disagree without a word."""
    pictures(tmp_path, 6, size=(16, 16) if orientation > 4 else (24, 16))
    turn(tmp_path / "images" / "1.png", orientation, suffix)
    turn(tmp_path / "images" / "2.png", orientation)
    turn(tmp_path / "masks" / "2.png", orientation)
    turn(tmp_path / "images" / "3.png", 1, suffix)
    turn(tmp_path / "masks" / "4.png", orientation)
    text = done("check", tmp_path).text
    assert f"warning: 2 images with another EXIF orientation than the mask: images/1{suffix}, images/4.png." in text
    assert "save images and masks upright" in text
    assert f"""--set 'data.exclude=["images/1{suffix}", "images/4.png"]'""" in text
    assert text.endswith("0 errors, 1 warning.")
    assert "EXIF" in done("check", tmp_path).text  # what reading told is kept
    turn(tmp_path / "images" / f"1{suffix}", 1, suffix)
    turn(tmp_path / "masks" / "4.png", 1)
    assert "EXIF" not in done("check", tmp_path).text


def test_a_size_tells_on_which_view_a_mask_was_drawn(tmp_path):
    """The image is oblong, and the mask has the size of the upright view."""
    pictures(tmp_path)
    turn(tmp_path / "images" / "1.png", 6)
    mask = tmp_path / "masks" / "1.png"
    Image.open(mask).transpose(Image.Transpose.ROTATE_270).save(mask)
    assert done("check", tmp_path).text.endswith("No problems found.")


def test_orientations_mean_nothing_where_images_are_classified(tmp_path):
    for number in range(24):
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (9, 9), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(values // 128).save(tmp_path / "masks" / f"{number}.png")
        turn(tmp_path / "images" / f"{number}.png", 3)
    lines = [f"images/{n}.png,masks/{n}.png,{'ab'[n % 2]}" for n in range(24)]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,mask,label", *lines]))
    assert "EXIF" not in done("check", tmp_path, "--set", "task=classification").text
    assert "24 images with another EXIF orientation" in done("check", tmp_path, "--set", "task=segmentation").text


def test_all_that_is_wrong_is_told_together(tmp_path):
    another_shape(tmp_path)
    nifti(tmp_path / "images" / "2.nii.gz", np.full(SHAPE, np.nan, np.float32))
    said = refused("check", tmp_path)
    assert "2 cases cannot be used" in said
    assert "masks/1.nii.gz" in said
    assert "images/2.nii.gz" in said
    excluded = ("--set", 'data.exclude=["images/1.nii.gz", "images/2.nii.gz"]')
    assert done("check", tmp_path, *excluded).text.endswith("No problems found.")


def test_a_run_refuses_the_same(tmp_path):
    another_shape(tmp_path / "data")
    said = refused("run", tmp_path / "data", "--out", tmp_path / "out")
    assert "1 case cannot be used: - masks/1.nii.gz: the mask has another size" in said


def test_what_is_odd_is_a_warning(tmp_path):
    volumes(tmp_path, 6)
    nifti(tmp_path / "images" / "1.nii.gz", np.ones(SHAPE, np.int16), (1, 1, 10))
    nifti(tmp_path / "masks" / "1.nii.gz", np.ones(SHAPE, np.uint8), (1, 1, 10))
    nifti(tmp_path / "masks" / "2.nii.gz", np.zeros(SHAPE, np.uint8))
    nifti(tmp_path / "masks" / "3.nii.gz", np.full(SHAPE, 7, np.uint8))
    text = done("check", tmp_path, "--set", "data.structures={organ: 1, lesion: 2, cyst: 3}").text
    assert "images/1.nii.gz (10 x 1 x 1 mm)" in text
    assert "1 spacing more than 3 times from the median (1 x 1 x 1 mm)" in text
    assert "2 of 6 masks are empty: masks/2.nii.gz, masks/3.nii.gz" in text
    assert "7 (in masks/3.nii.gz)" in text
    assert "1 image with the same value everywhere" in text
    assert "No mask shows cyst (3)" in text
    assert text.endswith("0 errors, 5 warnings.")


def test_what_shows_nothing_and_masks_of_several_images(tmp_path):
    volumes(tmp_path)
    nifti(tmp_path / "images" / "1.nii.gz", np.full(SHAPE, 7, np.float32))
    rows = (f"images/{number}.nii.gz,masks/{number % 3}.nii.gz\n" for number in range(4))
    (tmp_path / "manifest.csv").write_text("image,mask\n" + "".join(rows))
    for _ in range(2):  # also by what was kept of reading
        said = done("check", tmp_path).text
        assert "1 image with the same value everywhere, or in all of a channel: images/1.nii.gz." in said
        assert "1 mask belongs to several images: masks/0.nii.gz (images/0.nii.gz, images/3.nii.gz)." in said


def test_the_summary_of_volumes(tmp_path):
    result = done("check", volumes(tmp_path, spacing=(0.5, 0.7, 3.1)))
    assert max(map(len, result.out.splitlines())) <= 80
    assert "cases 4 " in result.text
    assert "voxels 10 x 8 x 6 (D, H, W)" in result.text
    assert "spacing 3.1 x 0.7 x 0.5 mm (D, H, W)" in result.text
    assert "masks 4 structures 1 in 2, 2 in 2 of 4 masks" in result.text
    assert "Slices are more than 3 times as far apart as pixels in 4 of 4 cases" in result.text


def test_the_summary_of_images_with_masks_in_splits(tmp_path):
    for seed, (split, count) in enumerate((("train", 3), ("test", 2))):
        pictures(tmp_path / split, count, seed=seed)
    Image.new("L", (30, 20), 9).save(tmp_path / "train" / "images" / "more.png")
    text = done("check", tmp_path).text
    assert "cases 6 (1 without mask)" in text
    assert "width 24 to 30, median 24 px height 16 to 20, median 16 px" in text
    assert "masks 5 structures foreground in 5 of 5 masks" in text
    assert "train 3 masks test 2 masks" in text


def test_labels_and_masks_are_checked_for_both_tasks(tmp_path):
    pictures(tmp_path, 24)
    (tmp_path / "masks" / "5.png").write_bytes((tmp_path / "masks" / "6.png").read_bytes()[:40])
    lines = [f"images/{n}.png,masks/{n}.png,{'ab'[n % 2] if n < 23 else 'c'}" for n in range(24)]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,mask,label", *lines]))
    said = refused("check", tmp_path)
    assert "classes a 12, b 11, c 1" in said
    assert "structures foreground in 23 of 23 masks" in said
    assert said.count("masks/5.png: is not a PNG") == 1
    assert "warning: For classification: Classes with fewer than 10 cases: c (1)" in said
    one = done("check", tmp_path, "--set", "task=classification").text
    assert "structures" not in one
    assert "cannot be used" in refused("check", tmp_path, "--set", "task=segmentation")
    assert "has labels and masks" in refused("run", tmp_path, "--out", tmp_path / "out")


# MedMNIST


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (6, 8, 10)], ids=["grey", "colour", "volume"])
def test_archives(tmp_path, shape):
    rng = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 40), ("val", 20), ("test", 24)):
        content[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(count)[:, None] % 2
    content["val_images"][3] = content["train_images"][1]
    np.savez_compressed(tmp_path / "breastmnist.npz", **content)
    said = refused("check", tmp_path / "breastmnist.npz")
    assert "cases 84 classes benign or normal 42, malignant 42" in said
    assert "train/00001 (benign or normal, train) = val/00003 (benign or normal, val)" in said
    assert "train benign or normal 20, malignant 20" in said
    if shape == (6, 8, 10):
        assert "voxels 6 x 8 x 10 (D, H, W)" in said
        assert "spacing unknown" in said
    else:
        assert f"8 bit: 84; {84 if len(shape) == 3 else 'none'} in colour" in said


# DICOM


def write_series(folder, positions, series=None, **elements):
    """Slices with a header full of names and dates."""
    series = series or generate_uid()
    for number, position in enumerate(positions):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"IM{number}.dcm"
        image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        image.PatientName, image.PatientID, image.PatientBirthDate = SECRETS[0], SECRETS[2], SECRETS[3]
        image.StudyDate, image.SeriesDescription = SECRETS[4], SECRETS[5]
        image.ReferringPhysicianName, image.AccessionNumber = SECRETS[6], SECRETS[7]
        image.Modality, image.SeriesInstanceUID, image.StudyInstanceUID = "CT", series, "1.2.987654"
        image.Rows, image.Columns = 4, 5
        image.PixelSpacing, image.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [0, 0, position]
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation, image.SamplesPerPixel = 15, 0, 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        image.PixelData = np.random.default_rng(number).integers(0, 99, (4, 5), np.uint16).tobytes()
        for name, value in elements.get(str(number), {}).items():
            setattr(image, name, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(path, image, enforce_file_format=True)


def missing(folder):
    write_series(folder, (0, 2, 4, 10, 12))


def doubled(folder):
    write_series(folder, (0, 2, 4, 4, 6))


def tilted(folder):
    write_series(folder, (0, 2, 4, 6, 8), **{"2": {"ImageOrientationPatient": [1, 0, 0, 0, 0.94, 0.342]}})


def torn(folder):
    write_series(folder, (0, 2, 4, 6))
    file = folder / "IM2.dcm"
    file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, ["About 2 slices are missing", "IM2.dcm at 4.00 mm and IM3.dcm at 10.00 mm"]),
        (doubled, ["1 slice lies where another one lies", "IM2.dcm at 4.00 mm and IM3.dcm at 4.00 mm"]),
        (tilted, ["1 of 5 slices is not parallel to the others: IM2.dcm at 4.00 mm. A volume"]),
        (torn, ["IM2.dcm"]),
    ],
)
def test_series_that_make_no_volume(tmp_path, make, words):
    for number in range(4):
        write_series(tmp_path / "ab"[number % 2] / f"scan{number}", (0, 2, 4))
    make(tmp_path / "a" / "bad")
    said = refused("check", tmp_path)
    assert [word for word in ["a/bad", *words] if word not in said] == [], said
    assert said.count(words[0]) == 1
    assert not [secret for secret in SECRETS if secret in said]


def test_several_series_in_a_folder(tmp_path):
    for number in range(4):
        write_series(tmp_path / "ab"[number % 2] / f"scan{number}", (0, 2, 4))
    write_series(tmp_path / "a" / "scan0" / "more", (0, 2, 4, 6))
    for file in (tmp_path / "a" / "scan0" / "more").iterdir():
        file.rename(tmp_path / "a" / "scan0" / f"second-{file.name}")
    result = cli("check", tmp_path)
    assert "1 folder holds several DICOM series: a/scan0#1 (CT, 3 slices of 4 x 5) and a/scan0#2 (CT, 4" in result.text
    assert "values HU" in result.text
    assert not [secret for secret in SECRETS if secret in result.text]

"""Masks of new scans, in the geometry of their scan and in every format."""

import re
import sys
import tracemalloc
from tempfile import SpooledTemporaryFile

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import dicoms as dicom
from medtpp.adapter import TaskCard, load_adapter
from medtpp.config import Window
from medtpp.data.case import Case, Structure
from medtpp.data.geometry import plain_geometry, same_grid
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import label_mask
from medtpp.data.volumes import read_mask, read_volume
from medtpp.errors import DataError, OutputError
from medtpp.inference import maps
from medtpp.inference.cases import image_cases, relative_cases
from medtpp.inference.masks import plan_targets
from medtpp.inference.sliding import SlidingWindow, as_member
from medtpp.inference.write import write_mask
from medtpp.tasks.segmentation import Segmentation
from runs import cli, done, refused
from segmenters import PATCH, adapter, in_training, scans, table, values_of
from volume_files import save_nifti, seen_by_others
from volumes import blobs


@pytest.fixture
def identity(monkeypatch):
    """Segmentation that reads the labels off the image, certain of each; gives the windows that it saw."""
    seen = []

    def forward(self, features):
        seen.append(features.images.clone())
        levels = (features.images[:, :1] * 2).round()
        if self.multilabel:  # 1 is the first structure alone, 2 both
            return torch.cat([levels >= 1, levels >= 2], dim=1) * 40.0 - 20.0
        return torch.cat([levels == number for number in range(3)], dim=1) * 40.0

    monkeypatch.setattr(Segmentation, "forward", forward)
    return seen


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_masks_lie_on_the_voxels_of_their_scans(tmp_path, identity, suffix):
    labels = scans(tmp_path / "in" / "deep", "a", suffix=suffix)["a"]
    done("predict", adapter(tmp_path / "adapter"), tmp_path / "in", "-o", tmp_path / "out")
    source, mask = (tmp_path / part / "deep" / f"a{suffix}" for part in ("in", "out"))
    where = read_volume(Case("", source)).geometry
    found = read_volume(Case("", mask))
    assert found.geometry.known
    assert same_grid(found.geometry, where, tolerance=1e-6)
    assert np.array_equal(found.array[0], in_training(labels))
    if ".nii" in suffix:
        one, other = nibabel.load(source).header, nibabel.load(mask).header
        for kind in ("get_sform", "get_qform", "get_zooms", "get_data_shape"):
            np.testing.assert_array_equal(getattr(one, kind)(), getattr(other, kind)())
    millilitres = [(labels == number).sum() * 2.3 * 0.7 * 1.1 / 1000 for number in (1, 2)]
    for structure, expected in zip(("organ", "lesion"), millilitres, strict=True):
        volume, unit = table(tmp_path / "out")[f"deep/a{suffix}", structure]
        assert unit == "ml"
        assert volume == pytest.approx(expected, rel=1e-5)


def test_masks_of_nifti_lie_where_every_reader_sees_the_scan(tmp_path, identity):
    """Readers choose between a header's two transforms by rules of their own, and take units for millimetres or not."""
    scanner = np.diag([-0.75, 1.25, 2.5, 1.0])
    scanner[:3, 3] = 30, -9, 4
    atlas, sheared, thousandth = scanner.copy(), scanner.copy(), np.diag([0.001, 0.001, 0.001, 1])
    atlas[:3, 3] += 10, 20, 30
    sheared[0, 1] = 0.3
    places = {
        "atlas": {"affine": atlas, "qform": scanner, "codes": (4, 1)},
        "sheared": {"affine": sheared, "qform": scanner, "codes": (2, 1)},
        "one": {"affine": scanner, "codes": (0, 1)},
        "other": {"affine": scanner, "codes": (3, 0), "pixdim": [1, 0.75, 1.25, 2.5, 0, 0, 0, 0]},
        "none": {"codes": (0, 0), "pixdim": [1, 0.75, 1.25, 2.5, 0, 0, 0, 0]},
        "metre": {"affine": thousandth @ scanner, "xyzt_units": 1},
        "micron": {"affine": np.diag([1000, 1000, 1000, 1]) @ scanner, "xyzt_units": 3},
        "no unit": {"affine": scanner, "xyzt_units": 0},
    }
    labels = blobs((9, 17, 20), 3)
    (tmp_path / "in").mkdir()
    for name, place in places.items():
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", labels.astype(np.int16), **place)
    nibabel.save(nibabel.Nifti2Image(labels.T, scanner), tmp_path / "in" / "second.nii.gz")  # which ITK cannot read
    done("predict", adapter(tmp_path / "adapter"), tmp_path / "in", "-o", tmp_path / "out", "--probabilities")
    affines = [nibabel.load(tmp_path / part / "second.nii.gz").affine for part in ("in", "out")]
    np.testing.assert_equal(*affines)
    for name in places:
        scan, mask = (tmp_path / part / f"{name}.nii.gz" for part in ("in", "out"))
        assert np.array_equal(np.asarray(nibabel.load(mask).dataobj).T, in_training(labels)), name
        for written in (mask, tmp_path / "out" / f"{name}_probabilities" / "1_organ.nii.gz"):
            np.testing.assert_equal(seen_by_others(written), seen_by_others(scan), name)
        assert np.array_equal(read_mask(mask, read_volume(Case("", scan)).geometry), in_training(labels))
        size = table(tmp_path / "out")[f"{name}.nii.gz", "organ"][0]
        voxels = (labels == 1).sum()
        assert size == pytest.approx(voxels * (1 if name == "none" else 0.75 * 1.25 * 2.5 / 1000), rel=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_what_the_command_writes_is_what_the_network_says(tmp_path, spacing):
    """Without tricks: the same windows and the same way back by hand, where the grid stays and where it is coarser."""
    folder = adapter(tmp_path / "adapter", spacing=spacing)
    scans(tmp_path / "in", "a")
    done("predict", folder, tmp_path / "in" / "a.nii.gz", "-o", tmp_path / "out", "--probabilities")
    loaded = load_adapter(folder)
    volume = read_volume(Case("", tmp_path / "in" / "a.nii.gz"))
    array, restore = loaded.card.preprocessing.apply(volume)
    window = SlidingWindow([as_member(loaded.backbone, loaded.task)], PATCH[3])
    labels = read_mask(tmp_path / "out" / "a.nii.gz", volume.geometry)
    assert np.array_equal(labels, in_training(window.scan_labels(array, restore)))
    assert len(np.unique(labels)) > 1
    found = [*window.probabilities(array)]
    for number, name in enumerate(("organ", "lesion"), start=1):
        written = read_volume(Case("", tmp_path / "out" / "a_probabilities" / f"{number}_{name}.nii.gz"))
        np.testing.assert_allclose(written.array[0], restore.probability(found[number]), atol=0.6 / 255)
        assert same_grid(written.geometry, volume.geometry, tolerance=1e-5)


@pytest.mark.parametrize(
    ("dims", "task", "size", "what"),
    [
        (3, "segmentation", "8x16x16 voxels", "Segments (structure = values in masks): organ = 3; lesion = 7."),
        (2, "segmentation", "32 pixels", "Segments (structure = values in masks): organ = 3; lesion = 7."),
        (3, "classification", "8x16x16 voxels", "Predicts: organ, lesion."),
    ],
)
def test_the_command_of_the_model_card_runs(tmp_path, dims, task, size, what):
    folder = adapter(tmp_path / "adapter", dims, task=task)
    card = (folder / "README.md").read_text()
    assert f"at {size}." in card
    assert what in card
    (command,) = re.findall(r"^    medtpp (.*)$", card, re.MULTILINE)
    scans(tmp_path / "in", "a", shape=PATCH[dims], suffix=".nii.gz" if dims == 3 else ".png")
    places = {"THIS_FOLDER": folder, "IMAGES": tmp_path / "in"}
    words = [places.get(word, word) for word in command.split()]
    output = tmp_path / words[-1]
    done(*words[:-1], output)
    assert output.is_dir() == (task == "segmentation")


def test_photographs_become_png(tmp_path, identity):
    (tmp_path / "in").mkdir()
    labels = blobs((40, 50), 0)
    Image.fromarray(labels * np.uint8(120)).save(tmp_path / "in" / "a.png")
    Image.fromarray(np.stack([labels * np.uint8(120)] * 3, axis=-1)).save(tmp_path / "in" / "b.bmp")
    folder = adapter(tmp_path / "adapter", 2, windows=(Window(kind="fixed", low=0, high=240),), dtype="uint8")
    done("predict", folder, tmp_path / "in", "-o", tmp_path / "out")
    for name in "ab":
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), in_training(labels))
    assert table(tmp_path / "out")["a.png", "lesion"] == ((labels == 2).sum(), "px")
    done("predict", folder, tmp_path / "in" / "a.png", "-o", tmp_path / "nifti", "--format", "nii.gz")
    assert np.array_equal(read_mask(tmp_path / "nifti" / "a.nii.gz", plain_geometry(labels.shape)), in_training(labels))


def test_dicom_series_become_dicom_segmentations_or_nifti(tmp_path, identity):
    labels = blobs((9, 17, 20), 3)
    images = dicom.slices(labels.astype(np.uint16), RescaleIntercept=0, FrameOfReferenceUID="1.2.3.4")
    names = [f"1.2.840.1/{index * 7 % 11:02}" for index in range(len(images))]  # folders are called like this
    files = dicom.save(tmp_path / "in", images, names)
    nameless = dicom.slices(labels.astype(np.uint16), RescaleIntercept=0, SeriesInstanceUID="1.2.9")
    dicom.save(tmp_path / "in", nameless, [name.replace("840.1", "840.2") for name in names])
    folder = adapter(tmp_path / "adapter")
    result = cli("predict", folder, tmp_path / "in", "-o", tmp_path / "seg")
    assert result.status == 1  # the second series names no frame of reference
    assert "not read: 1.2.840.2: a DICOM segmentation refers to its source by FrameOfReferenceUID" in result.text
    where = read_volume(Case("", files[0], files=tuple(files))).geometry
    assert np.array_equal(read_mask(tmp_path / "seg" / "1.2.840.1.dcm", where), labels)
    segments = pydicom.dcmread(tmp_path / "seg" / "1.2.840.1.dcm").SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == ["organ", "lesion"]
    more = done("predict", folder, tmp_path / "in", "-o", tmp_path / "nifti", "--format", "nii.gz", "--probabilities")
    for name in ("1.2.840.1", "1.2.840.2"):
        path = tmp_path / "nifti" / f"{name}.nii.gz"
        assert np.array_equal(read_mask(path, where), in_training(labels))
        assert (tmp_path / "nifti" / f"{name}_probabilities" / "2_lesion.nii.gz").is_file()
    told = [path.read_bytes() for path in (tmp_path / "nifti").rglob("*") if path.is_file()]
    told += [(tmp_path / "seg" / "volumes.csv").read_bytes(), (result.text + more.text).encode()]
    assert not any(secret.encode() in text for secret in dicom.SECRETS for text in told)


def test_slices_named_one_by_one_are_their_series(tmp_path, identity):
    """As by `scan/*` in a shell: what naming the folder gives, in names and bytes; a part of a series is that part."""
    labels = blobs((9, 17, 20), 3).astype(np.uint16)
    place = tmp_path / "in" / "scan"
    files = dicom.save(place, dicom.slices(labels, RescaleIntercept=0))
    others = [f"b{number}" for number in range(len(files))]
    second = dicom.slices(labels, RescaleIntercept=0, SeriesInstanceUID="1.2.9")
    folder, options = adapter(tmp_path / "adapter"), ("--format", "nii.gz")
    done("predict", folder, place, "-o", tmp_path / "folder", *options)
    said = done("predict", folder, *sorted(files), "-o", tmp_path / "files", *options).text
    assert said.startswith("1 image segmented")
    for name in ("scan.nii.gz", "volumes.csv"):
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    more = dicom.save(place, second, others)
    scans(tmp_path / "in", "a")
    named = (*files, *more[2:6], tmp_path / "in" / "a.nii.gz")
    done("predict", folder, *named, "-o", tmp_path / "both", *options)
    masks = {path.relative_to(tmp_path / "both").as_posix() for path in (tmp_path / "both").rglob("*.nii.gz")}
    assert masks == {"a.nii.gz", "scan/scan#1.nii.gz", "scan/scan#2.nii.gz"}
    part = read_volume(Case("", tmp_path / "both" / "scan" / "scan#2.nii.gz")).array[0]
    assert np.array_equal(part, in_training(labels[2:6]))
    gap = cli("predict", folder, *more[2:6], more[8], "-o", tmp_path / "gap")
    assert gap.text.count("not read: ") == 1
    assert "missing" in gap.text
    alone = cli("predict", folder, more[8], "-o", tmp_path / "alone")
    assert "has 2 dimensions, but the training images have 3. Give the whole volume" in alone.text


def test_structures_that_overlap_are_files_in_a_folder(tmp_path, identity):
    labels = scans(tmp_path / "in", "a")["a"]
    folder = adapter(tmp_path / "adapter", values=((1, 2), (2,)), overlapping=True)
    done("predict", folder, tmp_path / "in", "-o", tmp_path / "out", "--probabilities")
    where = read_volume(Case("", tmp_path / "in" / "a.nii.gz")).geometry
    for number, name in ((1, "1_organ"), (2, "2_lesion")):
        mask = read_mask(tmp_path / "out" / "a" / f"{name}.nii.gz", where)
        assert np.array_equal(mask, labels >= number)
        found = read_volume(Case("", tmp_path / "out" / "a_probabilities" / f"{name}.nii.gz")).array[0]
        assert np.array_equal(found > 0.5, labels >= number)
    assert set(values_of(tmp_path / "out").values()) == {1}
    sizes = table(tmp_path / "out")
    assert sizes["a.nii.gz", "organ"][0] > sizes["a.nii.gz", "lesion"][0]


@pytest.mark.parametrize("kind", ["nii.gz", "nrrd", "mha", "png", "dicom-seg"])
@pytest.mark.parametrize(
    ("values", "written", "dtype"),
    [
        (((2,), (1,)), (2, 1), np.uint8),
        (((600,), (2,)), (600, 2), np.uint16),
        (((3,), (65535,)), (3, 65535), np.uint16),
        (((9, 4), (7, 5)), (4, 5), np.uint8),  # regions have the smallest of their values
    ],
)
def test_values_are_those_of_the_training(tmp_path, identity, kind, values, written, dtype):
    dims = 2 if kind == "png" else 3
    labels = blobs((9, 17, 20), 3) if dims == 3 else blobs((40, 50), 0)
    if kind == "png":
        (tmp_path / "in").mkdir()
        Image.fromarray(labels * np.uint8(120)).save(tmp_path / "in" / "a.png")
        how = {"windows": (Window(kind="fixed", low=0, high=240),), "dtype": "uint8"}
    else:
        images = dicom.slices(labels.astype(np.uint16), RescaleIntercept=0, FrameOfReferenceUID="1.2.3.4")
        dicom.save(tmp_path / "in", images, [f"a/{index:02}" for index in range(len(images))])
        how = {}
    card = adapter(tmp_path / "adapter", dims, values=values, **how)
    done("predict", card, tmp_path / "in", "-o", tmp_path / "out", "--format", kind)
    (path,) = (path for path in (tmp_path / "out").iterdir() if path.suffix not in (".csv", ".json"))
    if kind == "dicom-seg":
        written = (1, 2)  # segments have numbers of their own
        read = read_mask(
            path, read_volume(image_cases([tmp_path / "in"], load_adapter(card).card.preprocessing)[0]).geometry
        )
    else:
        read = read_volume(Case("", path)).array[0]
        assert read.dtype == dtype
    assert np.array_equal(read, np.array([0, *written])[labels])
    assert [*values_of(tmp_path / "out").values()] == [*written]
    if kind != "dicom-seg":  # and as a mask to train on, it shows the same
        structures = tuple(map(Structure, ("organ", "lesion"), values))
        assert np.array_equal(label_mask(read, structures), labels)


def test_neighbouring_windows_overlap_and_flip_as_asked(tmp_path, identity):
    scans(tmp_path / "in", "a", shape=(20, 20, 20))
    folder = adapter(tmp_path / "adapter")
    masks, counts = [], []
    for name, options in (("0", ["--overlap", 0]), ("1", []), ("2", ["--overlap", 0.75]), ("3", ["--flips"])):
        identity.clear()
        done("predict", folder, tmp_path / "in", "-o", tmp_path / name, *options)
        counts.append(sum(len(images) for images in identity))
        masks.append((tmp_path / name / "a.nii.gz").read_bytes())
    assert counts == [3 * 2 * 2, 4 * 2 * 2, 7 * 2 * 2, 8 * 4 * 2 * 2]
    assert len(set(masks)) == 1  # the identity does not mind


def test_channels_in_files_of_their_own_are_joined(tmp_path, identity):
    names = [f"liver_000{channel}" for channel in range(3)]
    labels = scans(tmp_path / "in", (*names, "spleen_0000", "x_0000", "x_0002"))
    folder = adapter(tmp_path / "adapter", windows=(Window(kind="fixed", low=0, high=2),) * 3)
    where = read_volume(Case("", tmp_path / "in" / "liver_0000.nii.gz")).geometry
    for name in names:
        write_mask(tmp_path / "in" / f"{name}.nii.gz", labels[name], where)
    result = cli("predict", folder, tmp_path / "in", "-o", tmp_path / "out")
    assert result.status == 1
    assert "3 of 4 files" in result.text
    for name in ("spleen_0000", "x_0000", "x_0002"):
        assert f"not read: {name}.nii.gz: has 1 channel, but the training images have 3." in result.text
    assert np.array_equal(read_mask(tmp_path / "out" / "liver.nii.gz", where), in_training(labels["liver_0000"]))
    assert identity[0].shape[1] == 3
    assert not torch.equal(identity[0][:, 0], identity[0][:, 1])


def test_names_keep_folders_apart(tmp_path):
    for name in ("one/a.png", "two/a.png", "out/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name)
    options = Preprocessing(image_size=32, channels=1)

    def names(*paths):
        return [case.id for case in relative_cases(image_cases(paths, options), paths, tmp_path / "out")]

    assert names(tmp_path) == ["one/a.png", "two/a.png"]  # and not what lies in the output folder
    assert names(tmp_path / "one") == names(tmp_path / "one" / "a.png") == ["a.png"]
    assert names(tmp_path / "one", tmp_path / "two" / "a.png") == ["one/a.png", "two/a.png"]
    with pytest.raises(DataError, match="lie in the output folder"):
        names(tmp_path / "out")


def test_names_keep_the_dots_of_uids(tmp_path):
    cases = [
        Case("1.2.840.113", tmp_path, files=(tmp_path / "a", tmp_path / "b")),
        Case("1.2.840.114", tmp_path / "1.2.840.114"),
        Case("1.2.840.115", tmp_path / "one slice", files=(tmp_path / "a",)),
        Case("x/IM1.dcm", tmp_path / "IM1.dcm", files=(tmp_path / "IM1.dcm",)),
    ]
    task = TaskCard(options={}, classes=("organ",), multilabel=False, mask_values=((1,),))
    targets = plan_targets(cases, tmp_path, task, 3, "auto", probabilities=False)
    names = [target.place.relative_to(tmp_path).as_posix() for target in targets.values()]
    assert names == ["1.2.840.113.dcm", "1.2.840.114.dcm", "1.2.840.115.dcm", "x/IM1.dcm"]


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_probabilities_too_large_for_the_memory_wait_in_a_file(tmp_path, spacing, monkeypatch):
    folder = adapter(tmp_path / "adapter", spacing=spacing)
    scans(tmp_path / "in", "ab")
    command = ("predict", folder, tmp_path / "in", "--probabilities", "-o")
    done(*command, tmp_path / "memory")
    places = []

    def rollover(self):
        places.append(self._TemporaryFileArgs["dir"])
        SpooledTemporaryFile.rollover(self)

    monkeypatch.setattr(maps, "SpooledTemporaryFile", type("Seen", (SpooledTemporaryFile,), {"rollover": rollover}))
    monkeypatch.setattr(maps, "IN_MEMORY", 1000)
    done(*command, tmp_path / "file")
    assert places == [str(tmp_path / "file")] * 2
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("memory", "file")
    )
    assert len(one) == 8
    assert one == other


def test_maps_in_a_file_take_the_memory_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "IN_MEMORY", 1000)
    shape, size = (20, 32, 64, 64), 2 * 32 * 64 * 64
    parts = [np.full((20, 8, 64, 64), part, np.float16) for part in range(4)]
    tracemalloc.start()
    kept = maps.Maps(shape, tmp_path)
    for part in parts:
        kept.append(part)
    for number, one in enumerate(kept):
        assert one.shape == shape[1:]
        assert one[::8, number, 0].tolist() == [0, 1, 2, 3]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * size
    assert [*tmp_path.iterdir()] == [] or sys.platform == "win32"
    with pytest.raises(OutputError, match=r"gone.*probabilities of a scan wait.*They need 0.0 GB"):
        maps.Maps(shape, tmp_path / "gone")


def test_wishes_that_do_not_fit_are_refused(tmp_path):
    scans(tmp_path / "in", "a")
    (tmp_path / "in" / "a.nrrd").write_bytes(b"")
    volumes, flat = adapter(tmp_path / "adapter"), adapter(tmp_path / "flat", 2)
    out = ("-o", tmp_path / "out")
    assert "a PNG holds no volume" in refused("predict", volumes, tmp_path / "in", *out, "--format", "png")
    said = refused("predict", volumes, tmp_path / "in", *out, "--format", "dicom-seg")
    assert "2 of 2 images are not: a.nii.gz, a.nrrd" in said
    said = refused("predict", flat, tmp_path / "in", *out, "--format", "png")
    assert "written to the same file" in said
    assert "a.nii.gz and a.nrrd" in said
    assert "names a folder" in refused("predict", volumes, tmp_path / "in", "-o", tmp_path / "masks.csv")
    classifier = adapter(tmp_path / "classifier", task="classification")
    said = refused("predict", classifier, tmp_path / "in", *out, "--flips", "--overlap", 0.1, "--resume")
    assert "--flips, --overlap, --resume: for masks alone" in said
    assert not (tmp_path / "out").exists()

"""Image and mask folders, manifests with masks, names of structures."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folders import read, touch
from medtpp.config import DataOptions
from medtpp.data.case import Structure
from medtpp.data.listing import split_suffix
from medtpp.data.read import read_dataset
from medtpp.data.sources import find_images
from medtpp.data.sources._pairing import pair
from medtpp.data.sources._structures import parse_structures
from medtpp.data.sources.segmentation_folders import without_masks
from medtpp.errors import DataError


def masks(dataset):
    return {case.id: case.mask and case.mask.relative_to(dataset.root).as_posix() for case in dataset.cases}


def problems(dataset):
    return {problem.code: (problem.severity, problem.message) for problem in dataset.problems}


# Folders of images and masks


def test_images_and_masks_are_paired_by_stem(tmp_path):
    touch(
        tmp_path,
        "images/a.jpg",
        "images/b.nii.gz",
        "images/deep/c.PNG",
        "images/d.1.mha",
        "images/._a.jpg",
        "images/e_mask.png",
        "images/f/scan.nii.gz",
        "images/g.nii.gz",
    )
    touch(
        tmp_path,
        "masks/a.png",
        "masks/b_seg.nii.gz",
        "masks/deep/c_mask.png",
        "masks/d.1-GT.nrrd",
        "masks/e_mask.png",
        "masks/f/scan.nii.gz",
        "masks/g/Segmentation 1.nii.gz",
        "notes/x.txt",
    )
    dataset = read(tmp_path)
    assert dataset.layout == "segmentation_folders"
    assert masks(dataset) == {
        "images/a.jpg": "masks/a.png",
        "images/b.nii.gz": "masks/b_seg.nii.gz",
        "images/d.1.mha": "masks/d.1-GT.nrrd",
        "images/deep/c.PNG": "masks/deep/c_mask.png",
        "images/e_mask.png": "masks/e_mask.png",
        "images/f/scan.nii.gz": "masks/f/scan.nii.gz",
        "images/g.nii.gz": "masks/g/Segmentation 1.nii.gz",
    }
    assert dataset.problems == ()
    assert dataset.structures == ()
    assert all(case.image.is_file() and case.split is None and not case.labelled for case in dataset.cases)


@pytest.mark.parametrize(
    "names", [("images", "masks"), ("Img", "labels"), ("scans", "Ground_Truth"), ("volumes", "seg")]
)
def test_names_of_the_folders(tmp_path, names):
    touch(tmp_path, f"{names[0]}/1.png", f"{names[1]}/1.png")
    assert masks(read(tmp_path)) == {f"{names[0]}/1.png": f"{names[1]}/1.png"}


def test_split_folders(tmp_path):
    touch(tmp_path, "Train/images/1.png", "Train/masks/1.png", "valid/imgs/1.png", "valid/labels/1.png")
    touch(tmp_path, "test/images/9.png", "extra/images/7.png")
    dataset = read(tmp_path)
    assert {case.id: (case.split, case.mask is not None) for case in dataset.cases} == {
        "Train/images/1.png": ("train", True),
        "valid/imgs/1.png": ("val", True),
        "test/images/9.png": ("test", False),
    }
    assert "1 of 3 images has no mask" in problems(dataset)["image-without-mask"][1]


def test_splits_inside_both_folders(tmp_path):
    touch(tmp_path, "images/training/1.png", "images/test/1.png", "masks/training/1.png", "masks/test/1.png")
    dataset = read(tmp_path)
    assert [(case.id, case.split) for case in dataset.cases] == [
        ("images/test/1.png", "test"),
        ("images/training/1.png", "train"),
    ]
    touch(tmp_path, "images/north/1.png", "masks/north/1.png")  # now these are folders like any other
    assert {case.split for case in read(tmp_path).cases} == {None}


def test_what_has_no_partner_is_told(tmp_path):
    touch(tmp_path, "images/1.png", "images/2.png", "masks/1.png", "masks/3.png", "masks/readme.txt", "images/x.csv")
    dataset = read(tmp_path)
    assert masks(dataset) == {"images/1.png": "masks/1.png", "images/2.png": None}
    assert problems(dataset) == {
        "image-without-mask": ("warning", "1 of 2 images has no mask and counts as unlabelled: images/2.png."),
        "mask-without-image": ("warning", "1 mask has no image of the same name: masks/3.png: ignored."),
        "not-an-image": ("warning", "2 files are no images: images/x.csv, masks/readme.txt: ignored."),
    }


def test_doubled_stems_are_an_error(tmp_path):
    touch(tmp_path, "images/1.png", "images/1.jpg", "images/2.png", "images/3.png")
    touch(tmp_path, "masks/1.png", "masks/2.png", "masks/2_mask.png", "masks/3.png")
    dataset = read(tmp_path)
    assert masks(dataset) == {"images/3.png": "masks/3.png"}
    severity, text = problems(dataset)["doubled-stem"]
    assert severity == "error"
    assert "2 names" in text
    assert "images/1 (images/1.jpg, images/1.png, masks/1.png)" in text
    assert "images/2 (images/2.png, masks/2.png, masks/2_mask.png)" in text


def test_nothing_paired_shows_both_sides(tmp_path):
    touch(tmp_path, "images/case1.png", "masks/segmentation_case1.png")
    with pytest.raises(DataError, match=r"Images: images/case1.png. Masks: masks/segmentation_case1.png"):
        read(tmp_path)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    with pytest.raises(DataError, match="holds no images and masks"):
        read(tmp_path / "empty")


def test_two_folders_of_masks_are_refused(tmp_path):
    touch(tmp_path, "images/1.png", "masks/1.png", "labels/1.png")
    with pytest.raises(DataError, match=r"which folder is it.*\n.*labels, masks"):
        read(tmp_path)


def test_images_and_masks_are_no_classes(tmp_path):
    touch(tmp_path, "images/1.png", "masks/1.png")
    with pytest.raises(DataError, match=r"data\.layout=segmentation_folders"):
        read(tmp_path, layout="folders")


def test_a_manifest_or_dataset_json_beside_the_folders_decides(tmp_path):
    touch(tmp_path, "images/1.png", "masks/1.png")
    (tmp_path / "manifest.csv").write_text("image,mask\nimages/1.png,masks/1.png\n")
    assert read(tmp_path).layout == "manifest"
    assert read(tmp_path, layout="segmentation_folders").layout == "segmentation_folders"
    with pytest.raises(DataError, match=r"data\.layout=segmentation_folders"):
        read(tmp_path, layout="folders")


def test_masks_are_left_out_of_pools(tmp_path):
    kept = ["a/Images/1.png", "a/images_b/1.png", "msd/imagesTr/1.nii.gz", "msd/imagesTs/2.nii.gz", "a/3.png"]
    touch(tmp_path, *kept, "a/masks/deep/1.png", "msd/labelsTr/1.nii.gz", "msd/labelsTs/2.nii.gz")
    names = [image.name for image in without_masks(find_images(tmp_path)[0])]
    assert sorted(names) == sorted(kept)
    touch(tmp_path, "x/labels/1.png")  # nothing there says that these are masks
    assert "x/labels/1.png" in [image.name for image in without_masks(find_images(tmp_path)[0])]


stems = st.text("ab_1.", min_size=1, max_size=5).filter(lambda stem: stem.strip("."))
suffixes = st.sampled_from([".png", ".jpg", ".nii.gz", ".NII.GZ", ".nrrd", ".mha"])
endings = st.sampled_from(["", "_mask", "-seg", "_GT", " label", ".segmentation"])


@given(st.dictionaries(stems, st.tuples(suffixes, suffixes, endings), max_size=8))
@settings(deadline=None)
def test_every_image_finds_its_mask(names):
    images = [(stem, stem + suffix) for stem, (suffix, _, _) in names.items()]
    expected = {stem: stem + ending + suffix for stem, (_, suffix, ending) in names.items()}
    assert [split_suffix(name)[0] for _, name in images] == [*names]
    pairing = pair(images, expected.values())
    assert pairing.masks == expected
    assert not pairing.alone
    assert not pairing.doubled


@given(st.lists(st.tuples(st.sampled_from("ab"), suffixes), unique=True), st.lists(stems, unique=True))
@settings(deadline=None)
def test_pairing_loses_nothing(images, stems):
    masks = [f"{stem}.tif" for stem in stems]
    pairing = pair([(stem, stem + suffix) for stem, suffix in images], masks)
    doubled = [name for both in pairing.doubled.values() for names in both for name in names]
    told = [*pairing.masks.values(), *pairing.alone, *(name for name in doubled if name.endswith(".tif"))]
    assert sorted(told) == sorted(masks)
    assert sum(not name.endswith(".tif") for name in doubled) == sum(stem in pairing.doubled for stem, _ in images)
    assert pairing.masks.keys() <= {stem for stem, _ in images} - pairing.doubled.keys()


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_umlauts_of_other_systems_are_the_same_letters(tmp_path, forms):
    """Names of masks that were made on a Mac, of images that were not."""
    image, mask = (lambda name, form=form: unicodedata.normalize(form, name) for form in forms)
    touch(tmp_path, *map(image, ("images/Müller.png", "images/é/1.png", "images/ü/scan.png")))
    touch(tmp_path, *map(mask, ("masks/Müller_mask.png", "masks/é/1.png", "masks/ü/scan/Segmentation.png")))
    dataset = read(tmp_path)
    assert dataset.problems == ()
    found = {case.id: case.mask for case in dataset.cases}
    assert found.keys() == set(map(image, ("images/Müller.png", "images/é/1.png", "images/ü/scan.png")))
    assert found[image("images/Müller.png")] == tmp_path / mask("masks/Müller_mask.png")
    assert all(case.image.is_file() and case.mask.is_file() for case in dataset.cases)


# Manifests


def test_masks_in_a_manifest(tmp_path):
    touch(tmp_path, "a/1.nii.gz", "a/2.png", "m/1.nii.gz")
    (tmp_path / "manifest.csv").write_text("image,mask,split\na/1.nii.gz,m\\1.nii.gz,train\na/2.png,,\n")
    dataset = read(tmp_path, structures={1: "kidney", 2: "tumour"})
    assert masks(dataset) == {"a/1.nii.gz": "m/1.nii.gz", "a/2.png": None}
    assert dataset.structures == (Structure("kidney", (1,)), Structure("tumour", (2,)))
    assert dataset.problems == ()  # no label is asked for where there are masks
    table = tmp_path / "other.csv"
    table.write_text("image,annotation\na/1.nii.gz,m/1.nii.gz\n")
    assert masks(read(table, columns={"mask": "annotation"})) == {"a/1.nii.gz": "m/1.nii.gz"}


def test_faults_of_masks_are_told_with_the_others(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png", "m.png")
    text = "image,mask,split\n1.png,gone.png,train\n2.png,m.png,\n3.png,lost.png,test\nno.png,m.png,test\n"
    (tmp_path / "manifest.csv").write_text(text)
    found = problems(read(tmp_path))
    assert found["missing-mask"][0] == "error"
    assert "2 masks do not exist" in found["missing-mask"][1]
    assert "(line 2: gone.png, line 4: lost.png)" in found["missing-mask"][1]
    assert "(line 3: 2.png)" in found["empty-split"][1]
    assert "line 5: no.png" in found["missing-file"][1]
    assert "missing-mask" not in problems(read(tmp_path, exclude=["1.png", "3.png"]))


def test_a_column_of_masks_that_is_not_there(tmp_path):
    touch(tmp_path, "1.png")
    (tmp_path / "manifest.csv").write_text("image,label\n1.png,a\n")
    assert "'seg' (data.columns.mask)" in problems(read(tmp_path, columns={"mask": "seg"}))["missing-column"][1]


# Names of structures


def test_structures_of_both_spellings_and_regions():
    assert parse_structures({"2": "b", "0": "air", "1": "a"}, "x") == (Structure("a", (1,)), Structure("b", (2,)))
    regions = {"background": 0, "core": [2, 3], "whole": [3, 1, 2, 2], "active": 3}
    assert parse_structures(regions, "x") == (
        Structure("core", (2, 3)),
        Structure("whole", (1, 2, 3)),
        Structure("active", (3,)),
    )
    assert parse_structures({"b": 4, "a": [1, 2]}, "x") == (Structure("a", (1, 2)), Structure("b", (4,)))


def test_all_mistakes_of_structures_are_told_together():
    wrong = {"a": -1, "b": [], "c": "d", " ": 4, "e": [0, 1], "Background": 2, "f": 5, "g": 5, "6": "h", "7": "h"}
    with pytest.raises(DataError) as error:
        parse_structures(wrong, "FIELD")
    assert "FIELD" in error.value.message
    told = "\n".join(error.value.problems)
    for part in ("'a': -1", "'b': []", "'c': 'd'", "value 4 has no name", "'e' has 0, 1", "'Background' has 2"):
        assert part in told
    assert "'f', 'g' have the same value 5" in told
    assert "'h' is there 2 times" in told
    assert len(error.value.problems) == 8
    for value in (-1, 1 << 16):
        with pytest.raises(DataError, match=rf"'a': \[1, {value}\] is no value of a structure, .* from 1 to 65535"):
            parse_structures({"a": [1, value]}, "FIELD")
    with pytest.raises(DataError, match="nothing is named but the background"):
        parse_structures({"0": "background"}, "x")


values = st.integers(-2, 5) | st.text("01a ", max_size=2) | st.lists(st.integers(-1, 4), max_size=3)


@given(st.dictionaries(st.text("012ab ", max_size=2) | st.just("background"), values, max_size=6))
@settings(deadline=None)
def test_structures_are_sound_or_refused(labels):
    try:
        structures = parse_structures(labels, "x")
    except DataError:
        return
    assert structures
    assert all(one.values and min(one.values) > 0 and one.name.strip() for one in structures)
    assert len({one.name for one in structures}) == len({one.values for one in structures}) == len(structures)


def test_structures_in_an_experiment(tmp_path):
    touch(tmp_path, "images/1.png", "masks/1.png")
    options = DataOptions(path=tmp_path, structures={1: "kidney", "whole kidney": [1, 2]})
    assert DataOptions.model_validate(options.model_dump(mode="json")) == options
    assert read_dataset(options).structures == (Structure("kidney", (1,)), Structure("whole kidney", (1, 2)))
    with pytest.raises(DataError, match=r"data\.structures"):
        read(tmp_path, structures={"kidney": -1})
    with pytest.raises(ValueError, match="structures"):
        DataOptions(path=Path(), structures={"kidney": 1.5})

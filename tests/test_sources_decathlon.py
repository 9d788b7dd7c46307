"""The Decathlon's and nnU-Net's folders: both schemas of dataset.json, channels, what is said of broken ones."""

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folders import read, touch
from medtpp.data.case import Structure
from medtpp.errors import DataError

LABELS = {"0": "background", "1": "Anterior", "2": "Posterior"}
NNUNET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}


def make(root, content, *names):
    touch(root, *names)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def decathlon(root, cases, *extra, test=(), **changes):
    names = [f"{folder}/{case}.nii.gz" for case in cases for folder in ("imagesTr", "labelsTr")]
    content = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": len(cases),
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
        "test": [f"./imagesTs/{case}.nii.gz" for case in test],
        **changes,
    }
    return make(root, content, *names, *(f"imagesTs/{case}.nii.gz" for case in test), *extra)


def problems(dataset):
    return {problem.code: (problem.severity, problem.message) for problem in dataset.problems}


def told(root, content):
    make(root, content)
    with pytest.raises(DataError) as error:
        read(root)
    return str(error.value)


# The Decathlon


def test_decathlon(tmp_path):
    dataset = read(decathlon(tmp_path, ["h_2", "h_1"], "imagesTr/._h_1.nii.gz", "labelsTr/._h_1.nii.gz", test=["h_9"]))
    assert dataset.layout == "decathlon"
    one, two, unlabelled = dataset.cases
    assert (one.id, one.image) == ("imagesTr/h_1.nii.gz", tmp_path / "imagesTr" / "h_1.nii.gz")
    assert one.mask == tmp_path / "labelsTr" / "h_1.nii.gz"
    assert two.id == "imagesTr/h_2.nii.gz"
    assert (unlabelled.id, unlabelled.mask, unlabelled.split) == ("imagesTs/h_9.nii.gz", None, None)
    assert dataset.structures == (Structure("Anterior", (1,)), Structure("Posterior", (2,)))
    assert dataset.problems == ()
    assert read(tmp_path / "dataset.json") == dataset


def test_all_faults_of_the_listing_are_told(tmp_path):
    decathlon(tmp_path, ["a", "b", "c"], "imagesTs/new.nii.gz", numTraining=7)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["training"] += [
        {"image": "imagesTr\\a.nii.gz", "label": "labelsTr/a.nii.gz"},
        {"image": "imagesTr/gone.nii.gz", "label": "labelsTr/a.nii.gz"},
    ]
    make(tmp_path, content)
    (tmp_path / "labelsTr" / "c.nii.gz").unlink()
    dataset = read(tmp_path)
    found = problems(dataset)
    assert found["doubled-image"] == (
        "error",
        "dataset.json: 1 image is listed more than once. Keep one entry for each (imagesTr/a.nii.gz).",
    )
    advice = "Paths are relative to dataset.json: add the files, or take the entries out of it"
    excluded = """Or leave the cases out: --set 'data.exclude=["imagesTr/{}.nii.gz"]'."""
    assert found["missing-file"] == (
        "error",
        f"dataset.json: 1 image does not exist. {advice} (imagesTr/gone.nii.gz). {excluded.format('gone')}",
    )
    assert found["missing-mask"] == (
        "error",
        f"dataset.json: 1 mask does not exist. {advice} (labelsTr/c.nii.gz). {excluded.format('c')}",
    )
    assert found["training-count"][0] == "warning"
    assert "says 7 training cases" in found["training-count"][1]
    assert "imagesTs/new.nii.gz" in found["unlisted-file"][1]
    assert len(found) == 5
    assert [case.id for case in dataset.cases] == [f"imagesTr/{name}.nii.gz" for name in "abc"]
    assert "missing-mask" not in problems(read(tmp_path, exclude=["*/c.nii.gz"]))


def test_own_names_go_before_those_of_the_file(tmp_path):
    dataset = read(decathlon(tmp_path, ["a"]), structures={"whole": [1, 2], "front": 1})
    assert dataset.structures == (Structure("whole", (1, 2)), Structure("front", (1,)))


def test_a_listing_of_nnunet_1_has_channels(tmp_path):
    decathlon(tmp_path, ["p_1"], "imagesTr/p_1_0001.nii.gz", "imagesTr/p_1_0000.nii.gz", "imagesTr/p_0007.nii.gz")
    (tmp_path / "imagesTr" / "p_1.nii.gz").unlink()
    (case,) = read(tmp_path).cases
    assert case.id == "imagesTr/p_1_0000.nii.gz"
    assert case.channels == (tmp_path / "imagesTr" / "p_1_0001.nii.gz",)


def test_a_number_at_the_end_of_a_listed_name_is_no_channel(tmp_path):
    dataset = read(decathlon(tmp_path, ["p", "p_0000", "p_0001"]))
    assert [(case.id, case.channels) for case in dataset.cases] == [
        ("imagesTr/p.nii.gz", ()),
        ("imagesTr/p_0000.nii.gz", ()),
        ("imagesTr/p_0001.nii.gz", ()),
    ]


# Names from several systems


@pytest.mark.parametrize("forms", [("NFC", "NFD", "NFC"), ("NFD", "NFC", "NFC"), ("NFC", "NFC", "NFD")])
def test_umlauts_of_other_systems_are_the_same_letters(tmp_path, forms):
    """Those of images, of masks and of dataset.json."""
    image, mask, told = (lambda name, form=form: unicodedata.normalize(form, name) for form in forms)
    listed = {"image": told("imagesTr/Süd.nii.gz"), "label": told("labelsTr/Süd.nii.gz")}
    content = {"labels": LABELS, "training": [listed], "test": [told("imagesTs/Ost-é.nii.gz")]}
    names = [image("imagesTr/Süd_0000.nii.gz"), mask("labelsTr/Süd.nii.gz"), image("imagesTs/Ost-é.nii.gz")]
    names = [*names, mask("labelsTs/Ost-é.nii.gz")]
    test, training = read(make(tmp_path / "1", content, *names)).cases[::-1]
    assert (training.id, training.mask) == (names[0], tmp_path / "1" / names[1])
    assert (test.id, test.mask) == (names[2], tmp_path / "1" / names[3])
    assert all(case.image.is_file() and case.mask.is_file() for case in (training, test))

    content = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "T1", "1": "T2"}}
    dataset = read(make(tmp_path / "2", content, names[0], told("imagesTr/Süd_0001.nii.gz"), names[1]))
    (case,) = dataset.cases
    assert dataset.problems == ()
    assert (case.id, case.mask) == (names[0], tmp_path / "2" / names[1])
    assert len(case.channels) == 1


# nnU-Net


def test_nnunet_with_channels_and_regions(tmp_path):
    content = {
        "channel_names": {"0": "FLAIR", "1": "T1"},
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing": 3},
        "regions_class_order": [1, 2, 3],
        "numTraining": 1,
        "file_ending": ".nrrd",
    }
    names = [f"images{part}/b_{case}_000{channel}.nrrd" for part, case in (("Tr", 1), ("Ts", 2)) for channel in (0, 1)]
    dataset = read(make(tmp_path, content, *names, "labelsTr/b_1.nrrd"))
    one, two = dataset.cases
    assert one.id == "imagesTr/b_1_0000.nrrd"
    assert one.channels == (tmp_path / "imagesTr" / "b_1_0001.nrrd",)
    assert one.mask == tmp_path / "labelsTr" / "b_1.nrrd"
    assert (two.id, two.mask, two.split) == ("imagesTs/b_2_0000.nrrd", None, None)
    assert [one.values for one in dataset.structures] == [(1, 2, 3), (2, 3), (3,)]
    assert dataset.problems == ()


def test_masks_of_test_images_make_a_split(tmp_path):
    names = ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz", "imagesTs/c_0000.nii.gz"]
    make(tmp_path, NNUNET, *names)
    assert {case.split for case in read(tmp_path).cases} == {None}
    touch(tmp_path, "labelsTs/b.nii.gz")
    assert {case.id: (case.split, case.mask is not None) for case in read(tmp_path).cases} == {
        "imagesTr/a_0000.nii.gz": ("train", True),
        "imagesTs/b_0000.nii.gz": ("test", True),
        "imagesTs/c_0000.nii.gz": ("test", False),
    }


def test_channels_must_be_complete(tmp_path):
    names = ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/c_0001.nii.gz"]
    make(tmp_path, NNUNET, *names, *(f"labelsTr/{case}.nii.gz" for case in "abc"))
    found = problems(read(tmp_path))
    which = "imagesTr/b_0000.nii.gz has no _0001, imagesTr/c_0001.nii.gz has no _0000"
    text = f"2 images lack channels that others have. Add the files ({which}). Or leave the cases out: --set"
    assert text in found["missing-channel"][1]
    assert "missing-channel" not in problems(read(tmp_path, exclude=["*/b_*", "*/c_*"]))
    assert found["channel-count"] == ("error", "dataset.json names 1 channel (channel_names), the files have 2.")


def test_files_that_lie_elsewhere_are_listed(tmp_path):
    """nnU-Net 2 may list its files under `dataset`; other programs keep a name there."""
    cases = {
        case: {"images": [f"mri/{case}_t1.nii.gz", f"./mri/{case}_t2.nii.gz"], "label": f"seg/{case}.nii.gz"}
        for case in "ab"
    }
    content = {**NNUNET, "channel_names": {"0": "T1", "1": "T2"}, "numTraining": 2, "dataset": cases}
    names = ["mri/a_t1.nii.gz", "mri/a_t2.nii.gz", "mri/b_t1.nii.gz", "mri/b_t2.nii.gz", "seg/a.nii.gz", "seg/b.nii.gz"]
    make(tmp_path, content, *names, "imagesTs/c_0000.nii.gz", "imagesTs/c_0001.nii.gz")
    dataset = read(tmp_path)
    assert dataset.problems == ()
    assert [case.id for case in dataset.cases] == ["imagesTs/c_0000.nii.gz", "mri/a_t1.nii.gz", "mri/b_t1.nii.gz"]
    assert dataset.cases[1].channels == (tmp_path / "mri" / "a_t2.nii.gz",)
    assert dataset.cases[1].mask == tmp_path / "seg" / "a.nii.gz"
    (tmp_path / "seg" / "b.nii.gz").unlink()
    assert "(seg/b.nii.gz)" in problems(read(tmp_path))["missing-mask"][1]
    for wrong in ({"a": {"images": [], "label": "x"}}, {"a": {"images": ["x"]}}, [1]):
        assert "dataset: should hold images (a list of files) and label (a file)" in told(
            tmp_path, {**content, "dataset": wrong}
        )
    make(tmp_path, {**NNUNET, "dataset": "prostate"}, "imagesTr/d_0000.nii.gz", "labelsTr/d.nii.gz")
    assert "imagesTr/d_0000.nii.gz" in [case.id for case in read(tmp_path).cases]


def test_a_colour_photograph_has_its_channels_in_one_file(tmp_path):
    content = {**NNUNET, "channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    dataset = read(make(tmp_path, content, "imagesTr/a_0000.png", "labelsTr/a.png"))
    assert dataset.problems == ()


def test_file_ending_that_no_file_has(tmp_path):
    make(tmp_path, NNUNET, "imagesTr/a_0000.nrrd", "imagesTr/b_0000.nrrd")
    with pytest.raises(DataError, match=r"(?s)imagesTr/CASE_0000.nii.gz.*Found: imagesTr/a_0000.nrrd"):
        read(tmp_path)
    touch(tmp_path, "imagesTr/c_0000.nii.gz")
    found = problems(read(tmp_path))
    assert "1 of 1 image in imagesTr has no mask" in found["image-without-mask"][1]
    assert "2 files belong to no case of dataset.json: imagesTr/a_0000.nrrd" in found["unlisted-file"][1]
    assert "'.npy' is no format" in told(tmp_path, {**NNUNET, "file_ending": ".npy"})


def test_values_with_gaps_are_a_warning(tmp_path):
    content = {**NNUNET, "labels": {"background": 0, "a": 1, "b": 4}}
    dataset = read(make(tmp_path, content, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"))
    assert [one.values for one in dataset.structures] == [(1,), (4,)]
    severity, text = problems(dataset)["values-not-consecutive"]
    assert severity == "warning"
    assert "2, 3" in text


def test_the_label_ignore_is_refused(tmp_path):
    assert "'ignore' marks voxels" in told(tmp_path, {**NNUNET, "labels": {"background": 0, "a": 1, "ignore": 2}})


# Broken descriptions


def test_json_that_cannot_be_read(tmp_path):
    file = tmp_path / "dataset.json"
    for data, message in [
        (b"", "not valid JSON: line 1"),
        (b'{"labels": {},\n "training": [,]}', "not valid JSON: line 2"),
        (b'{"name": "\xe9"}', "not text in UTF-8"),
        (b"[]", "the file: should be a JSON object"),
        (b'{"labels": {"1": "a", "1": "b"}, "file_ending": ".mha"}', "'1' is there more than once"),
    ]:
        file.write_bytes(data)
        with pytest.raises(DataError) as error:
            read(tmp_path)
        assert message in str(error.value)


def test_wrong_types_are_told_together(tmp_path):
    text = told(
        tmp_path,
        {
            "labels": {"a": 1.5, "b": [1, "2"], "c": None, "d": True},
            "training": [{"image": 3, "label": "x"}, {"label": "y"}, "z"],
            "numTraining": "many",
        },
    )
    for part in ("labels.a: should be a name, a whole number", "labels.b: ", "labels.c: ", "labels.d: "):
        assert part in text
    assert "training.0.image: input should be a valid string" in text
    assert "training.1.image: is missing" in text
    assert "training.2: " in text
    assert "numTraining: " in text
    assert "data.layout=folders" in text
    assert text.count("\n") == 8


def test_fields_that_are_missing(tmp_path):
    assert "labels: is missing" in told(tmp_path, {"training": []})
    assert "file_ending (such as .nii.gz) is missing" in told(tmp_path, {"labels": LABELS})
    wrong = told(tmp_path, {**NNUNET, "labels": {"background": 1, "a": [0, 2], "b": 3, "c": 3}})
    assert "dataset.json (labels) cannot be used" in wrong
    assert wrong.count("\n") == 3


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats(allow_nan=False) | st.text("a0/.\0é", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("a01", max_size=1), inner, max_size=2),
    max_leaves=4,
)
fields = st.sampled_from(["labels", "training", "test", "file_ending", "channel_names", "numTraining"])


@given(st.dictionaries(fields, anything), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused(tmp_path, content, valid):
    content = {**(NNUNET if valid else {"labels": LABELS, "training": []}), **content}
    make(tmp_path, content, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    try:
        dataset = read(tmp_path)
    except DataError:
        return
    assert dataset.structures
    assert all(case.image.is_file() for case in dataset.cases)


names = st.lists(st.text("ab_0", min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@given(names, st.integers(1, 3), st.sampled_from([".nii.gz", ".mha", ".png"]))
@settings(max_examples=40, deadline=None)
def test_every_case_of_nnunet_is_found_with_its_channels(tmp_path_factory, cases, channels, ending):
    root = tmp_path_factory.mktemp("nnunet")
    files = [f"imagesTr/{case}_{channel:04d}{ending}" for case in cases for channel in range(channels)]
    content = {**NNUNET, "channel_names": {str(number): "x" for number in range(channels)}, "file_ending": ending}
    dataset = read(make(root, content, *files, *(f"labelsTr/{case}{ending}" for case in cases)))
    assert dataset.problems == ()
    assert {case.mask.name.removesuffix(ending): len(case.channels) + 1 for case in dataset.cases} == dict.fromkeys(
        cases, channels
    )

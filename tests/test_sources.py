"""Layouts: what is read from folders and manifests, and what is said when they are wrong."""

import csv
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folders import read, touch
from medtpp.data.case import Dataset
from medtpp.data.listing import list_images
from medtpp.data.problems import first_few
from medtpp.data.read import read_unlabelled
from medtpp.data.sources import split_of
from medtpp.errors import DataError


def manifest(root: Path, text: str, *images: str, encoding: str = "utf-8") -> Path:
    touch(root, *images)
    (root / "manifest.csv").write_bytes(text.encode(encoding))
    return root


def problems(dataset: Dataset) -> dict[str, str]:
    return {problem.code: problem.message for problem in dataset.problems}


# Folders


def test_class_folders(tmp_path):
    touch(
        tmp_path,
        "b/2.PNG",
        "a/deep/er/1.jpg",
        "a/0.tiff",
        ".git/x.png",
        "__MACOSX/a/._1.png",
        "a/Thumbs.db",
        "a/.hid.png",
    )
    dataset = read(tmp_path)
    assert [(case.id, case.labels) for case in dataset.cases] == [
        ("a/0.tiff", ("a",)),
        ("a/deep/er/1.jpg", ("a",)),
        ("b/2.PNG", ("b",)),
    ]
    assert dataset.classes == ("a", "b")
    assert dataset.problems == ()
    assert all(case.image.is_file() and case.labelled and case.split is None for case in dataset.cases)


def test_split_folders_and_their_synonyms(tmp_path):
    touch(tmp_path, "Train/a/1.png", "VALID/b/2.png", "testing/a/deep/3.png", "readme.txt")
    dataset = read(tmp_path)
    assert {case.id: (case.split, case.labels) for case in dataset.cases} == {
        "Train/a/1.png": ("train", ("a",)),
        "VALID/b/2.png": ("val", ("b",)),
        "testing/a/deep/3.png": ("test", ("a",)),
    }
    assert problems(dataset)["not-an-image"].startswith("1 file is no image: readme.txt")


def test_split_folders_beside_class_folders_are_refused(tmp_path):
    touch(tmp_path, "train/a/1.png", "test/a/2.png", "benign/3.png")
    with pytest.raises(DataError, match=r"split folders \(test, train\) beside .*\(benign\)"):
        read(tmp_path)


def test_images_alone_are_unlabelled(tmp_path):
    dataset = read(touch(tmp_path, "2.png", "1.bmp"))
    assert [(case.id, case.labelled) for case in dataset.cases] == [("1.bmp", False), ("2.png", False)]
    assert dataset.classes == ()
    assert dataset.problems == ()


def test_stray_images_and_other_files_are_warned_of(tmp_path):
    dataset = read(touch(tmp_path, "a/1.png", "stray.png", "notes.txt", "b/x.dat"))
    assert problems(dataset)["not-an-image"] == "2 files are no images: b/x.dat, notes.txt: ignored."
    assert "stray.png" in problems(dataset)["outside-class-folders"]
    assert {case.id for case in dataset.cases if not case.labelled} == {"stray.png"}


@pytest.mark.parametrize("names", [(), ("a/1.dat",)])
def test_no_images_shows_what_is_expected(tmp_path, names):
    with pytest.raises(DataError, match=r"(?s)holds no images.*DATA/benign/1.png"):
        read(touch(tmp_path, *names))


def test_folders_have_one_label(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.csv"):
        read(touch(tmp_path, "a/1.png"), multilabel=True)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "store/1.png", "data/b/2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    assert list_images(tmp_path / "data")[0] == ["a/1.png", "b/2.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_text_are_refused(tmp_path):
    touch(tmp_path, "a/1.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xe9.png")).write_bytes(b"")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path)


# Manifests


def test_manifest(tmp_path):
    text = "image,label,patient,site,split\nimg/1.png,01,p1,A,Training\nimg/2.png,02,,,validation\nimg/3.png,,p2,A,\n"
    dataset = read(manifest(tmp_path, text, "img/1.png", "img/2.png", "img/3.png"))
    one, two, three = dataset.cases
    assert (one.id, one.labels, one.patient, one.site, one.split) == ("img/1.png", ("01",), "p1", "A", "train")
    assert (two.patient, two.site, two.split) == (None, None, "val")
    assert (three.labelled, three.labels, three.split) == (False, (), None)
    assert dataset.classes == ("01", "02")
    assert dataset.problems == ()
    assert read(tmp_path / "manifest.csv") == dataset


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_and_encodings(tmp_path, separator, encoding):
    text = separator.join(["image", "label"]) + "\r\n" + separator.join(["é.png", '"a, b; c"']) + "\r\n"
    dataset = read(manifest(tmp_path, text, "é.png", encoding=encoding), label_separator="|")
    assert [(case.id, case.labels) for case in dataset.cases] == [("é.png", ("a, b; c",))]


@given(
    cells=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)), min_size=1, max_size=6
    ),
    separator=st.sampled_from(",;\t"),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_label_survives(tmp_path, cells, separator):
    touch(tmp_path, *(f"{row}.png" for row in range(len(cells))))
    file = tmp_path / "any.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow(["image", "label"])
        writer.writerows([f"{row}.png", label] for row, (label,) in enumerate(cells))
    found = {case.id: case.labels for case in read(file).cases}
    assert found == {f"{row}.png": ((label.strip(),) if label.strip() else ()) for row, (label,) in enumerate(cells)}


@given(st.binary(max_size=600))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_a_data_error_or_a_problem(tmp_path, data):
    file = tmp_path / "garbage.csv"
    file.write_bytes(b"image,label\n" + data)
    try:
        dataset = read(file)
    except DataError:
        return
    assert dataset.problems
    assert not dataset.cases


def test_all_faults_are_reported_together_with_their_lines(tmp_path):
    text = (
        "image,label,split\n"  # 1
        "a.png,x,train\n"
        ",x,train\n"  # 3
        '"a.png",y,test\n'
        "\n"
        "gone.png,x,train\n"  # 6
        "b.png,y,later\n"
        "c.png,y,\n"  # 8
        "d.png,y\n"
        ",,\n"
        "./a.png,x,train\n"  # 11
    )
    dataset = read(manifest(tmp_path, text, "a.png", "b.png", "c.png", "d.png"))
    found = problems(dataset)
    assert {problem.severity for problem in dataset.problems} == {"error"}
    assert "(line 3)" in found["no-image"]
    assert "(line 4: a.png, as in line 2, line 11: a.png, as in line 2)" in found["doubled-image"]
    assert "line 6: gone.png" in found["missing-file"]
    assert "line 7: 'later'" in found["unknown-split"]
    assert "(line 8: c.png)" in found["empty-split"]
    assert "line 9: 2 cells, not 3" in found["row-length"]
    assert len(found) == 6


def test_lines_are_counted_as_an_editor_does(tmp_path):
    text = 'image,label\n1.png,"a\nb"\n2.png,x\n'
    dataset = read(manifest(tmp_path, text, "1.png"))
    assert "line 4: 2.png" in problems(dataset)["missing-file"]


def test_long_lists_are_cut(tmp_path):
    dataset = read(manifest(tmp_path, "image\n" + "".join(f"{i}.png\n" for i in range(1000))))
    assert "and 995 more" in problems(dataset)["missing-file"]
    assert len(problems(dataset)["missing-file"]) < 300


def test_missing_image_column_names_the_option(tmp_path):
    with pytest.raises(DataError, match=r"columns found are file, label\..*--set data\.columns\.image=NAME"):
        read(manifest(tmp_path, "file;label\n1.png;x\n", "1.png"))


def test_other_column_names(tmp_path):
    path = manifest(tmp_path, "File,Diagnosis,x\n1.png,flu,2\n", "1.png")
    dataset = read(path, columns={"image": "file", "label": "Diagnosis", "patient": "who"})
    assert dataset.cases[0].labels == ("flu",)
    assert "'who' (data.columns.patient)" in problems(dataset)["missing-column"]
    assert "data.columns.label" in problems(read(path, columns={"image": "File"}))["no-label-column"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"image,label\n1.png,caf\xe9\n", r"not UTF-8 \(line 2\)"),
        (b'image,label\n1.png,x\n2.png,"x\n', "line 3 is not valid CSV"),
        (b"image,label\n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_broken_manifests(tmp_path, data, message):
    (tmp_path / "manifest.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_several_labels(tmp_path):
    text = "image,label\n1.png,b; a;b\n2.png,\n3.png,;\n4.png,None\n5.png,none;a\n"
    path = manifest(tmp_path, text, *(f"{i}.png" for i in range(1, 6)))
    dataset = read(path, multilabel=True)
    assert dataset.multilabel
    assert [(case.labels, case.labelled) for case in dataset.cases][:4] == [
        (("a", "b"), True),
        ((), False),
        ((), True),
        ((), True),
    ]
    assert "line 6" in problems(dataset)["none-with-labels"]
    assert "data.multilabel=true" in problems(read(path))["several-labels"]


def test_paths_of_windows_and_absolute_paths(tmp_path):
    text = f"image\na\\1.png\n{(tmp_path / 'a' / '2.png').as_posix()}\n../out/3.png\n"
    touch(tmp_path.parent / "out", "3.png")
    dataset = read(manifest(tmp_path, text, "a/1.png", "a/2.png"))
    assert {case.id for case in dataset.cases} == {"a/1.png", "a/2.png", "../out/3.png"}
    assert all(case.image.is_file() for case in dataset.cases)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_a_manifest_finds_files_whose_names_are_spelled_otherwise(tmp_path, forms):
    """Macs cut umlauts in two signs; tables that are written elsewhere do not."""
    there, told = (lambda name, form=form: unicodedata.normalize(form, name) for form in forms)
    touch(tmp_path, there("Männer/ü/ö 1.png"), "masks/" + there("ö 1.png"), there("Männer/gone"))
    rows = [told("Männer/ü/ö 1.png") + ",a," + told("masks/ö 1.png"), told("Männer/ä.png") + ",a,"]
    (tmp_path / "manifest.csv").write_text("image,label,mask\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = read(tmp_path)
    assert [case.id for case in found.cases] == [told("Männer/ü/ö 1.png")]
    assert found.cases[0].image.is_file()
    assert found.cases[0].mask.is_file()
    assert [problem.code for problem in found.problems] == ["missing-file"]
    assert told("Männer/ä.png") in found.problems[0].message


# Choice of the layout, exclusion, unlabelled folders


def test_manifest_goes_before_folders_unless_named(tmp_path):
    path = manifest(tmp_path, "image,label\na/1.png,x\n", "a/1.png", "b/2.png")
    assert read(path).layout == "manifest"
    assert read(path, layout="folders").classes == ("a", "b")


def test_unknown_layouts_and_paths(tmp_path):
    touch(tmp_path, "table.xlsx")
    with pytest.raises(DataError, match=r"(?s)none of the layouts.*folders: .*manifest: "):
        read(tmp_path / "table.xlsx")
    with pytest.raises(DataError, match="There is no file or folder"):
        read(tmp_path / "nowhere")


def test_exclude(tmp_path):
    touch(tmp_path, "a/1.png", "a/[1].png", "b/2.png", "b/3.png", "c/4.png")
    dataset = read(tmp_path, exclude=["a/[1].png", "c/*", "b/3.png", "nothing*"])
    assert [case.id for case in dataset.cases] == ["a/1.png", "b/2.png"]
    assert dataset.classes == ("a", "b")
    assert "'nothing*'" in problems(dataset)["idle-exclude"]


def test_a_missing_file_can_be_excluded(tmp_path):
    path = manifest(tmp_path, "image,label\n1.png,x\ngone.png,y\n", "1.png")
    dataset = read(path, exclude=["gone.png"])
    assert [case.id for case in dataset.cases] == ["1.png"]
    assert dataset.problems == ()


def test_unlabelled_folders(tmp_path):
    touch(tmp_path, "x/pool/a/1.png", "y/pool/a/1.png", "y/pool/train/b/2.png")
    pools = [tmp_path / "x" / "pool", tmp_path / "y" / "pool"]
    cases = read_unlabelled([*pools, tmp_path / "y"])
    assert [case.id for case in cases] == [
        "unlabelled:pool/a/1.png",
        "unlabelled:pool-2/a/1.png",
        "unlabelled:pool-2/train/b/2.png",
    ]
    assert not any(case.labelled or case.split for case in cases)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"(?s)gone is not a folder.*empty holds no images"):
        read_unlabelled([tmp_path / "gone", tmp_path / "empty", *pools])


def test_small_helpers():
    assert first_few(range(7), 3) == "0, 1, 2 and 4 more"
    assert first_few([]) == ""
    assert [split_of(name) for name in ("Valid", "TEST ", "training", "tes", "")] == [
        "val",
        "test",
        "train",
        None,
        None,
    ]

"""Medical Segmentation Decathlon and nnU-Net: `dataset.json` beside `imagesTr`, `labelsTr` and `imagesTs`.

Two schemas share the name. The Decathlon (Antonelli et al., arXiv 2106.05735; nnU-Net 1 as well) lists its files and
writes labels as `{"1": "liver"}`; nnU-Net 2 (Isensee et al., Nature Methods 2021) gives a `file_ending`, finds files
by their names and writes `{"liver": 1}` or regions, `{"whole tumour": [1, 2, 3]}`.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem, Structure
from medtpp.data.listing import IMAGE_SUFFIXES, PLANE_SUFFIXES, list_images, spelled, split_suffix
from medtpp.data.problems import agree, count, exclude_option, first_few
from medtpp.data.sources import is_excluded
from medtpp.data.sources._structures import named_structures, parse_structures
from medtpp.errors import DataError

_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
_RELATIVE = "Paths are relative to dataset.json: add the files, or take the entries out of it"
# What is said of one, of several, and of both.
_ADVICE = {
    "missing-file": ("image does", "images do", f"not exist. {_RELATIVE}"),
    "missing-mask": ("mask does", "masks do", f"not exist. {_RELATIVE}"),
    "doubled-image": ("image is", "images are", "listed more than once. Keep one entry for each"),
    "missing-channel": ("image lacks", "images lack", "channels that others have. Add the files"),
}


@SOURCES.register("decathlon")
class Decathlon:
    """Training images with masks, and images of `imagesTs`.

    The latter have no masks: they are unlabelled cases, good for TPP, and no test cases. Where there is `labelsTs`
    (users of nnU-Net often add it), `imagesTs` are the test cases and `imagesTr` the training cases.

    Channels in files of their own (`case_0000.nii.gz`, `case_0001.nii.gz`) make one case. The order in which nnU-Net
    paints regions (`regions_class_order`) is not needed: regions are predicted one by one.
    """

    summary: ClassVar[str] = "Medical Segmentation Decathlon or nnU-Net: dataset.json, imagesTr, labelsTr, imagesTs"

    @staticmethod
    def recognises(path: Path) -> bool:
        """A dataset.json, or the folder that holds it."""
        return (path.name == "dataset.json" and path.is_file()) or (path / "dataset.json").is_file()

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read dataset.json and the names of all files.

        Raises:
            DataError: dataset.json is not JSON, lacks fields or has wrong ones, or no training image is found.
        """
        file = path / "dataset.json" if path.is_dir() else path
        root = file.parent
        content = _read_json(file)
        structures = named_structures(options.structures) or _structures(file, content)
        present = _files(root)
        entries = _entries(file, content, present)
        faults: dict[str, list[tuple[str, str]]] = defaultdict(list)
        cases = _cases(root, entries, options.exclude, faults)
        problems = [_fault_problem(code, faults[code]) for code in _ADVICE if faults[code]]
        problems += _problems(content, entries, structures)
        used = {name for entry in entries for name in (*entry.images.values(), entry.mask)}
        unlisted = [name for name in present if name not in used]
        if unlisted:
            files = f"{count(unlisted, 'file')} {agree(unlisted, 'belongs', 'belong')}"
            text = f"{files} to no case of dataset.json: {first_few(unlisted)}: ignored."
            problems.append(Problem("warning", "unlisted-file", text))
        return Dataset(root, "decathlon", cases, structures=structures, problems=tuple(problems))


class _Pair(BaseModel):
    image: str
    label: str


class _Files(BaseModel):
    images: list[str] = Field(min_length=1)
    label: str


class _Content(BaseModel):
    """What is read of dataset.json; its other fields are for other programs."""

    labels: dict[str, StrictInt | StrictStr | list[StrictInt]]
    training: list[_Pair] = []
    test: list[str] = []
    dataset: dict[str, _Files] | str = {}  # of nnU-Net 2 where files lie elsewhere; other programs keep a name here
    file_ending: str | None = None
    channel_names: dict[str, Any] = {}
    numTraining: int | None = None  # noqa: N815  (the field's own name)


@dataclass(frozen=True)
class _Entry:
    """A case as the names say it, paths relative to the root.

    Attributes:
        images: The file of each channel by its number, in order.
        mask: Its mask, if it has one.
        training: Whether it is one of the training images.
    """

    images: Mapping[int, str]
    mask: str | None
    training: bool

    @property
    def id(self) -> str:
        return next(iter(self.images.values()))


def _read_json(file: Path) -> _Content:
    """The content of dataset.json, of either schema, or DataError with all that is wrong in it."""
    doubled: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        content = _Content.model_validate(
            json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique), strict=True
        )
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON: line {error.lineno}, {error.msg}.") from error
    except ValidationError as error:
        raise DataError(
            f"{file} does not describe a data set as the Decathlon or nnU-Net do. If it is about something else, "
            "choose the layout, such as --set data.layout=folders.",
            dict.fromkeys(map(_mistake, error.errors())),
        ) from error
    wrong = [f"{key!r} is there more than once" for key in dict.fromkeys(doubled)]
    if not content.training and not content.file_ending:
        wrong.append("training (a list of images and labels) or file_ending (such as .nii.gz) is missing")
    if content.file_ending and content.file_ending.lower() not in IMAGE_SUFFIXES:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        wrong.append(f"file_ending: {content.file_ending!r} is no format that is read; known: {known}")
    if wrong:
        raise DataError(f"{file} cannot be used as it is:", wrong)
    return content


def _mistake(error: Any) -> str:
    place = error["loc"]
    if place[:1] == ("labels",) and len(place) > 1:  # of a union pydantic says what each of its members wants
        return f"labels.{place[1]}: should be a name, a whole number or a list of whole numbers"
    if place[:1] == ("dataset",):  # likewise
        return "dataset: should hold images (a list of files) and label (a file) for each case"
    where = ".".join(map(str, place)) or "the file"
    wants = "should be a JSON object" if not place else error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {'is missing' if error['type'] == 'missing' else wants}"


def _structures(file: Path, content: _Content) -> tuple[Structure, ...]:
    if any("ignore" in (name, value) for name, value in content.labels.items()):
        raise DataError(
            f"{file}: the label 'ignore' marks voxels that nobody annotated, and masks must be whole here. Give these "
            "voxels another value in the masks, and take the label out of dataset.json."
        )
    return parse_structures(content.labels, f"{file} (labels)")


def _files(root: Path) -> list[str]:
    """Files of the four folders, relative to the root, sorted; hidden ones (`._case.nii.gz`) left out."""
    folders = [folder for folder in _FOLDERS if (root / folder).is_dir()]
    return sorted(f"{folder}/{name}" for folder in folders for names in list_images(root / folder) for name in names)


def _by_spelling(present: Iterable[str]) -> dict[str, str]:
    """Files by how their names are `spelled`, sorted: dataset.json and files may come from several systems."""
    return dict(sorted((spelled(name), name) for name in present))


def _entries(file: Path, content: _Content, present: Sequence[str]) -> list[_Entry]:
    """The cases as the schema in use finds them; DataError if none is for training."""
    ending = content.file_ending
    if not ending:
        return _listed(content, present)
    if isinstance(content.dataset, dict) and content.dataset:
        listed = [
            _Entry(dict(enumerate(map(_path, one.images))), _path(one.label), training=True)
            for one in content.dataset.values()
        ]
        return listed + [entry for entry in _by_name(ending, present) if not entry.training]
    entries = _by_name(ending, present)
    if not any(entry.training for entry in entries):
        found = first_few((name for name in present if name.startswith("imagesTr/")), 3) or "nothing"
        raise DataError(
            f"{file.parent}: no file is called imagesTr/CASE_0000{ending}, as nnU-Net has it and file_ending in "
            f"dataset.json says. Found: {found}."
        )
    return entries


def _listed(content: _Content, present: Iterable[str]) -> list[_Entry]:
    """The Decathlon's entries. nnU-Net 1 lists `case.nii.gz` where `case_0000.nii.gz` and so on are."""
    files = _by_spelling(present)
    channels: dict[str, dict[int, str]] = defaultdict(dict)
    for name in files:
        stem, suffix = split_suffix(name)
        if match := re.fullmatch(r"(.+)_(\d{4})", stem):
            channels[match[1] + suffix][int(match[2])] = files[name]

    def entry(image: str, mask: str | None, *, training: bool) -> _Entry:
        same = spelled(image)
        images = channels[same] if same not in files and same in channels else {0: files.get(same, image)}
        return _Entry(images, mask, training)

    def test_mask(image: str) -> str | None:
        return files.get(spelled(f"labelsTs/{posixpath.basename(image)}"))

    def mask_of(label: str) -> str:
        return files.get(spelled(label), label)

    training = [entry(_path(pair.image), mask_of(_path(pair.label)), training=True) for pair in content.training]
    return training + [entry(image, test_mask(image), training=False) for image in map(_path, content.test)]


def _path(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _by_name(ending: str, present: Sequence[str]) -> list[_Entry]:
    """nnU-Net's entries: `imagesTr/CASE_0000.nii.gz` with `labelsTr/CASE.nii.gz`, and the same in Ts."""
    files = _by_spelling(present)
    channels: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in files:
        if match := re.fullmatch(rf"images(Tr|Ts)/(.+)_(\d{{4}}){re.escape(ending)}", name):
            channels[match[1], match[2]][int(match[3])] = files[name]
    return [
        _Entry(images, files.get(f"labels{part}/{case}{ending}"), training=part == "Tr")
        for (part, case), images in channels.items()
    ]


def _cases(
    root: Path, entries: Sequence[_Entry], exclude: Sequence[str], faults: dict[str, list[tuple[str, str]]]
) -> tuple[Case, ...]:
    """Cases of all that exist, sorted; faults are noted by code, with the name of a file and the case id."""
    tested = any(entry.mask for entry in entries if not entry.training)
    channels = {number for entry in entries for number in entry.images}
    cases: dict[str, Case] = {}
    for entry in entries:
        name, mask = entry.id, entry.mask
        found = {file for file in (*entry.images.values(), mask) if file and os.path.isfile(root / file)}  # noqa: PTH113
        if name in cases:
            faults["doubled-image"].append((name, name))
            continue
        if not is_excluded(name, exclude):  # an excluded case is dropped later, which is a way to mend the data set
            if name not in found:
                faults["missing-file"].append((name, name))
                continue
            if mask and mask not in found:
                faults["missing-mask"].append((mask, name))
            if entry.images.keys() != channels:
                lacking = first_few(f"_{number:04d}" for number in sorted(channels - entry.images.keys()))
                faults["missing-channel"].append((f"{name} has no {lacking}", name))
        cases[name] = Case(
            name,
            root / name,
            split=("train" if entry.training else "test") if tested else None,
            channels=tuple(root / file for file in entry.images.values() if file != name),
            mask=root / mask if mask else None,
        )
    return tuple(cases[name] for name in sorted(cases))


def _fault_problem(code: str, faults: Sequence[tuple[str, str]]) -> Problem:
    one, several, rest = _ADVICE[code]
    what = f"{len(faults)} {agree(faults, one, several)} {rest}"
    cases = tuple(case for _, case in faults)
    text = f"dataset.json: {what} ({first_few(name for name, _ in faults)})."
    if code != "doubled-image":
        text += f" Or leave the cases out: {exclude_option(cases)}."
    return Problem("error", code, text, cases)


def _problems(content: _Content, entries: Sequence[_Entry], structures: Sequence[Structure]) -> list[Problem]:
    """Where dataset.json and the files differ, and labels that look like a slip."""
    problems = []
    training = [entry for entry in entries if entry.training]
    bare = tuple(entry.id for entry in training if entry.mask is None)
    if bare:
        verbs = agree(bare, "has no mask and counts", "have no mask and count")
        text = f"{len(bare)} of {count(training, 'image')} in imagesTr {verbs} as unlabelled: "
        problems.append(Problem("warning", "image-without-mask", f"{text}{first_few(bare)}.", bare))
    annotated = len(training) - len(bare)
    if content.numTraining is not None and content.numTraining != annotated:
        text = f"dataset.json says {content.numTraining} training cases (numTraining), {annotated} are there."
        problems.append(Problem("warning", "training-count", text))
    channels, named = len({number for entry in entries for number in entry.images}), len(content.channel_names)
    # nnU-Net keeps the three channels of a colour photograph in one file.
    colour = channels == 1 and named == 3 and (content.file_ending or "").lower() in PLANE_SUFFIXES
    if content.file_ending and named not in (0, channels) and not colour:
        text = (
            f"dataset.json names {count(content.channel_names, 'channel')} (channel_names), the files have {channels}."
        )
        problems.append(Problem("error", "channel-count", text))
    values = {value for structure in structures for value in structure.values}
    skipped = sorted(set(range(1, max(values) + 1)) - values)
    if skipped:
        text = f"The values of structures are not consecutive: nothing is named for {first_few(skipped)}."
        problems.append(Problem("warning", "values-not-consecutive", text))
    return problems

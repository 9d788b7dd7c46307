"""From an experiment to data ready for training: read, stored once, checked, split; `auto` values answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medtpp import backbones
from medtpp.config import TUNERS, Experiment
from medtpp.data.cache import ImageCache, Progress
from medtpp.data.case import Case, Dataset, Problem, Record
from medtpp.data.check import check, raise_errors
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.holdout import Holdout
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_dataset, read_unlabelled
from medtpp.data.split import draw_labels, make_split, read_split, split_problems, tpp_cases
from medtpp.data.store import VolumeStore
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError, DataError
from medtpp.seeds import Seeds
from medtpp.training.dense import require_decoder
from medtpp.training.finetune import resolve_finetune
from medtpp.training.monitor import plan_monitor
from medtpp.training.stage import StageData, augmenter_of
from medtpp.training.tpp import (
    candidates,
    make_pretext,
    require_batches,
    require_pair,
    require_targets,
    resolve_pretext,
    resolve_tpp,
)
from medtpp.workflow.images import are_photographs, scan, store_more, store_photographs, store_volumes, with_task


@dataclass(frozen=True)
class PreparedData:
    """The data of an experiment: read, stored once, checked and split. Neither seed, tuner nor labels matter any more.

    Attributes:
        dataset: The labelled cases and what the source found.
        store: Prepared images of all cases, the unlabelled ones included.
        records: What reading each told, by case id.
        preprocessing: How images were prepared.
        whole_split: "train", "val" or "test" by case id.
        tpp: Cases that TPP may see.
        excluded: Ids of unlabelled cases that TPP may not see.
        problems: Warnings to show.
        backbone_sha256: Hash of the backbone's own weights.
    """

    dataset: Dataset
    store: ImageCache | VolumeStore
    records: Mapping[str, Record]
    preprocessing: Preprocessing | VolumePreprocessing
    whole_split: dict[str, str]
    tpp: tuple[Case, ...]
    excluded: tuple[str, ...]
    problems: tuple[Problem, ...]
    backbone_sha256: str

    def data(self, cases: Iterable[Case]) -> StageData:
        """Some cases as a stage takes them."""
        return StageData(self.store, tuple(cases))

    def fingerprints(self, cases: Iterable[Case]) -> Fingerprints:
        """Fingerprints of some cases."""
        return Fingerprints.of(cases, self.records)


@dataclass(frozen=True)
class Prepared(PreparedData):
    """An experiment with its data.

    Attributes:
        experiment: All `auto` values answered but those of the machine (hardware).
        split: The whole split, reduced to `data.labels`.
    """

    experiment: Experiment
    split: dict[str, str]

    def cases(self, *splits: str) -> tuple[Case, ...]:
        """The labelled cases of some splits."""
        return tuple(case for case in self.dataset.cases if self.split.get(case.id) in splits)


def prepare(
    experiment: Experiment,
    *,
    split_file: Path | None = None,
    all_test: bool = False,
    held_out: Holdout | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read, decode, check and split the data of an experiment. Nothing but the image cache is written.

    Args:
        experiment: As written by the user.
        split_file: A whole split that was kept, taken in place of a new one if the file exists. A draw of
            `data.labels` is made anew from it, by name.
        all_test: Take all labelled cases as test cases, whatever split is prescribed: data of another hospital.
        held_out: Take a fold or a site as test cases, whatever split is prescribed.
        progress: Called with images decoded so far and in all.

    Raises:
        DataError: The data cannot be used; all reasons are listed.
        ConfigError: Methods do not fit together.
    """
    experiment, dataset = with_task(experiment, read_dataset(experiment.data))
    if all_test:
        dataset = dataset.with_cases(tuple(replace(case, split=None) for case in dataset.cases))
    elif held_out is not None:
        dataset = dataset.with_cases(tuple(held_out.resplit(case) for case in dataset.cases))
    positive = experiment.data.positive
    if positive is not None and (len(dataset.classes) != 2 or positive not in dataset.classes):
        raise ConfigError(
            f"data.positive is {positive!r}; it is for two classes, and the data set has {dataset.classes}."
        )
    wanted = experiment.data.unlabelled if experiment.tpp.enabled else []
    unlabelled = read_unlabelled(wanted) if wanted else ()
    every = [*dataset.cases, *unlabelled]
    records: Mapping[str, Record]
    stored = None
    if are_photographs(experiment, every):
        stored = store_photographs(experiment, dataset, unlabelled, progress)
        records = {record.case: record for record in stored.store.records}
    else:
        scans, dataset = scan(experiment, dataset, unlabelled, progress)
        records = scans
    problems = check(dataset, records)
    raise_errors(dataset, problems)
    problems += _unlabelled_problems(dataset, unlabelled)
    whole = _whole_split(experiment, dataset, records, split_file, held_out, all_test=all_test)
    seen, excluded = tpp_cases(dataset, records, whole, unlabelled)
    if experiment.tpp.transductive:
        seen += [case for case in dataset.cases if whole.get(case.id) in ("val", "test")]
    if stored is None:
        wanted_ids = whole.keys() | {case.id for case in seen}
        used = [case for case in every if case.id in wanted_ids]
        train = [case for case in used if whole.get(case.id) == "train"] or used
        stored = store_volumes(experiment, dataset, scans, train, used, progress)
        records = {name: found.without_samples() for name, found in scans.items()}
    backbone = backbones.load(stored.experiment.backbone, image_size=stored.preprocessing.patch)
    data = PreparedData(
        dataset=dataset,
        store=stored.store,
        records=records,
        preprocessing=stored.preprocessing,
        whole_split=whole,
        tpp=tuple(seen),
        excluded=tuple(excluded),
        problems=tuple(problems),
        backbone_sha256=backbone.spec.sha256,
    )
    prepared = arrange(data, stored.experiment, backbone)
    if all_test:
        return prepared
    return replace(prepared, problems=(*data.problems, *split_problems(dataset, prepared.split)))


def arrange(data: PreparedData, experiment: Experiment, backbone: backbones.Backbone | None = None) -> Prepared:
    """An experiment on data that were prepared for it, or for one that differs in seed, labels or methods alone.

    Args:
        data: Prepared for the same data and backbone sections, but for `data.labels`.
        experiment: As written by the user.
        backbone: The experiment's; loaded if not at hand.

    Raises:
        DataError: There are not as many labels as asked for.
        ConfigError: TPP is asked of a tuner without target parameters, the pretext task does not fit the backbone, or
            the monitor of TPP not the labels.
    """
    labels, split = experiment.data.labels, data.whole_split
    if labels != "all" and {"train", "val"} & set(split.values()):
        split = draw_labels(data.dataset, split, labels, Seeds(experiment.seed))
    backbone = backbone or backbones.load(experiment.backbone, image_size=data.preprocessing.patch)
    train = sum(part == "train" for part in split.values())
    resolved = _resolve(experiment, data.preprocessing, backbone, train, len(data.tpp))
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(PreparedData)}
    prepared = Prepared(**fields, experiment=resolved, split=split)
    if resolved.tpp.enabled and resolved.tpp.monitor:
        plan_monitor(resolved, prepared.data(prepared.cases("train")))  # what it refuses is refused before any training
    return prepared


def foreign_pool(data: PreparedData, paths: Sequence[Path], progress: Progress | None = None) -> PreparedData:
    """The same data with images of another source in the place of those that TPP may see.

    Left out are images that cannot be read, and those that share their pixels or a patient with any image of the data,
    whether training, validation, test or unlabelled: what is left is foreign.

    Args:
        data: Prepared.
        paths: Folders of images; labels are disregarded.
        progress: Called with images decoded so far and in all.

    Raises:
        DataError: A folder does not exist or holds no images, or none is left.
    """
    cases = read_unlabelled(paths, "--foreign")
    store = store_more(cases, data.preprocessing, progress)
    records: dict[str, Record] = {record.case: record for record in store.records}
    known = data.fingerprints([*data.dataset.cases, *data.tpp])
    known |= Fingerprints(images=tuple(record.fingerprint for record in data.records.values()))
    excluded = {*known.overlap(cases, records), *(case for case, record in records.items() if record.error)}
    usable = tuple(case for case in cases if case.id not in excluded)
    if not usable:
        reason = next((record.error for record in records.values() if record.error), None)
        raise DataError(
            f"No image of --foreign is left: all {len(cases)} belong to the data set, or cannot be read"
            f"{f' ({reason})' if reason else ''}. Name a folder of other images, of the same kind."
        )
    problems = tuple(_unlabelled_problems(data.dataset, usable, "foreign"))
    out = tuple(sorted(excluded))
    return replace(data, store=store, records=records, tpp=usable, excluded=out, problems=problems)


def _unlabelled_problems(dataset: Dataset, images: Sequence[Case], kind: str = "unlabelled") -> list[Problem]:
    if all(case.patient for case in images) or not any(case.patient for case in dataset.cases):
        return []
    unknown = sum(not case.patient for case in images)
    text = (
        f"Nothing says whose the {unknown} {kind} images are. Those with the pixels of a validation or test case "
        "are left out; other images of their patients are not: see to it that there are none."
    )
    return [Problem("warning", f"{kind}-without-patients", text)]


def _whole_split(
    experiment: Experiment,
    dataset: Dataset,
    records: Mapping[str, Record],
    split_file: Path | None,
    held_out: Holdout | None,
    *,
    all_test: bool,
) -> dict[str, str]:
    if all_test:
        return {case.id: "test" for case in dataset.cases if case.labelled}
    data, seeds = experiment.data, Seeds(experiment.seed)
    kept = split_file if split_file is not None and split_file.is_file() else None
    if kept is not None and held_out is None:
        used = {case.id for case in dataset.cases if case.labelled}
    else:
        if held_out is not None:
            split = held_out.split(dataset, records, seeds=seeds, val_fraction=data.val_fraction)
        else:
            split = make_split(
                dataset, records, seeds=seeds, val_fraction=data.val_fraction, test_fraction=data.test_fraction
            )
        if kept is None:
            return split
        used = set(split)
    whole = read_split(kept, dataset)
    added = sorted(used - whole.keys())
    if added:
        raise DataError(
            f"{kept} does not know {len(added)} labelled cases, for example {added[0]}: they were added "
            "since. Begin anew with --overwrite or another --out, or leave them out with data.exclude."
        )
    return whole


def _resolve(
    experiment: Experiment,
    preprocessing: Preprocessing | VolumePreprocessing,
    backbone: backbones.Backbone,
    train: int,
    seen: int,
) -> Experiment:
    """Answer every `auto` that the data and the backbone decide.

    Raises:
        ConfigError: TPP is asked of a tuner without target parameters, or the pretext task does not fit the backbone.
    """
    update: dict[str, object] = {"augment": augmenter_of(experiment, preprocessing).options}
    if isinstance(preprocessing, Preprocessing):
        update |= {"image_size": preprocessing.image_size, "channels": preprocessing.channels}
    devices, spec = experiment.hardware.devices, backbone.spec
    rate, tpp = TUNERS.get(experiment.tuner.name).learning_rate, experiment.tpp
    chosen = resolve_pretext(experiment.pretext, spec, experiment.tuner.name)
    if tpp.enabled:
        require_targets(experiment)
        require_decoder(experiment)
        given = tpp
        for options in candidates(chosen, given):
            pretext, trained = make_pretext(options, backbone, Seeds(experiment.seed))
            tpp = resolve_tpp(given, images=seen, learning_rate=rate, spec=spec, trained_head=trained, devices=devices)
            require_batches(pretext, tpp)
            require_pair(experiment.tuner.name, pretext)
        if given.choose:  # each task answers for its own head
            tpp = tpp.model_copy(update={"head_warmup": given.head_warmup})
    names = {"tuner": experiment.tuner.name, "task": experiment.task.name}
    finetune = resolve_finetune(experiment.finetune, **names, cases=train, spec=spec, devices=devices)
    data = experiment.data.model_copy(update=update)
    return experiment.model_copy(update={"data": data, "pretext": chosen, "tpp": tpp, "finetune": finetune})

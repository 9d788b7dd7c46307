"""A data set read and checked, for what it can be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medtpp.config import Experiment
from medtpp.data.cache import Progress
from medtpp.data.cache import scan as scan_photographs
from medtpp.data.case import Dataset, Problem, Record
from medtpp.data.check import DatasetSummary, check, describe
from medtpp.data.read import read_dataset, read_unlabelled
from medtpp.workflow.images import are_photographs, scan, with_task


@dataclass(frozen=True)
class CheckedData:
    """What `medtpp check` tells.

    Attributes:
        dataset: With its structures.
        summary: In numbers.
        problems: Errors before warnings.
        unlabelled: Further images without labels.
    """

    dataset: Dataset
    summary: DatasetSummary
    problems: tuple[Problem, ...]
    unlabelled: int


def check_data(experiment: Experiment, progress: Progress | None = None) -> CheckedData:
    """Read a data set as a run would, and check it. With labels and masks and no task said, it is checked for both.

    Args:
        experiment: As written by the user.
        progress: Called with the numbers of cases read and in all.

    Raises:
        DataError: Nothing can be read at all.
        ConfigError: The data set lacks what the task needs.
    """
    dataset = read_dataset(experiment.data)
    unlabelled = read_unlabelled(experiment.data.unlabelled) if experiment.data.unlabelled else ()
    views = [with_task(one, dataset) for one in _tasks(experiment, dataset)]
    chosen, seen = views[-1]  # for segmentation, if for both: its scans tell of images and masks
    records: Mapping[str, Record]
    if are_photographs(chosen, [*seen.cases, *unlabelled]):
        records = scan_photographs(seen.cases, progress=progress)
    else:
        records, seen = scan(chosen, seen, (), progress)
    whole = seen if len(views) == 1 else replace(dataset, structures=seen.structures)
    found = {one.task.name: check(view, records) for one, view in [*views[:-1], (chosen, seen)]}
    return CheckedData(whole, describe(whole, records), tuple(_joined(found)), len(unlabelled))


def _tasks(experiment: Experiment, dataset: Dataset) -> list[Experiment]:
    """The experiment for each task that it may mean."""
    masks, labels = any(case.mask for case in dataset.cases), any(case.labelled for case in dataset.cases)
    if experiment.task.name != "auto" or not (masks and labels):
        return [experiment]
    values = experiment.model_dump()
    return [
        type(experiment).model_validate(values | {"task": {"name": name}})
        for name in ("classification", "segmentation")
    ]


def _joined(found: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """Problems for several tasks: each once, with the name of the task where it is a problem for one alone."""
    joined: list[Problem] = []
    for task, problems in found.items():
        for problem in problems:
            shared = all(problem in others for others in found.values())
            told = problem if shared else replace(problem, message=f"For {task}: {problem.message}")
            if told not in joined:
                joined.append(told)
    return sorted(joined, key=lambda problem: problem.severity != "error")

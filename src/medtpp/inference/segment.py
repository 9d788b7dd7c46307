"""Masks for scans that were never seen before, each in the geometry of its scan.

OUT/inputs.json         # what the masks depend on: adapters and options
OUT/CASE.nii.gz, ...    # see `plan_targets`
OUT/CASE_probabilities/ # where wanted: a map for each structure
OUT/volumes.csv         # case,structure,value,volume,unit: a line for each structure of the cases that are done;
                        # value is what stands for it in the case's mask

One case is predicted while the next one is read. Peak memory: what `read_ahead` and `SlidingWindow` document.
"""

from __future__ import annotations

import csv
import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from medtpp.adapter import Adapter, TaskCard
from medtpp.backbones import hash_state
from medtpp.config import Options
from medtpp.data.case import Case
from medtpp.data.predicted import INPUTS, wrote_masks
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import DataError, OutputError, WeightsError
from medtpp.files import digest, prepare_folder, read_json, write_json, write_text
from medtpp.inference.ensemble import check_alike, head
from medtpp.inference.maps import Maps
from medtpp.inference.masks import Format, Target, measured, plan_targets, write_case
from medtpp.inference.scans import Scan, read_ahead, reason
from medtpp.inference.sliding import SlidingWindow, as_member
from medtpp.inference.stored import patches_at_once
from medtpp.inference.write import write_probability

VOLUMES = "volumes.csv"
_COLUMNS = ["case", "structure", "value", "volume", "unit"]


class SegmentOptions(Options):
    """How scans are segmented."""

    format: Format = Field("auto", description="of the masks; auto: as the scan")
    probabilities: bool = Field(False, description="write a map for each structure as well")
    flips: bool = Field(False, description="average over flips of all axes of space: 4 passes in 2D, 8 in 3D")
    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window by which neighbours overlap, at least")


@dataclass(frozen=True)
class Segmented:
    """What `segment_files` did.

    Attributes:
        done: Ids of the cases that have a mask now.
        skipped: Ids of those that had one.
        unreadable: Ids of the others, with the reason.
        seconds: Spent "waiting" for scans, "predicting" and "writing".
    """

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    unreadable: dict[str, str]
    seconds: dict[str, float]


def segment_files(
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    output: Path,
    options: SegmentOptions,
    *,
    device: torch.device,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Segmented:
    """Write a mask for each scan; those that cannot be read, or referred to, are listed and the rest is done.

    Args:
        adapters: On `device`; the mean of their probabilities decides.
        cases: With ids relative to a folder, after which masks are named; see `relative_cases`.
        output: The folder.
        options: How.
        device: Where to compute.
        resume: Go on in a folder that a killed run left, or with more cases.
        overwrite: Replace what an earlier run wrote.
        progress: Called with the numbers of cases done and in all.

    Raises:
        WeightsError: The adapters have no head for segmentation, or differ.
        ConfigError: The format does not fit the cases.
        OutputError: The folder holds something, was made by other adapters or options, or cannot be written.
    """
    segmenter = _Segmenter.of(adapters, options, device, output)
    card = segmenter.card
    targets = plan_targets(
        cases, output, card, segmenter.preprocessing.dims, options.format, probabilities=options.probabilities
    )
    _open(output, _inputs(adapters, options), resume=resume, overwrite=overwrite)
    unfinished = {name for name, target in targets.items() if not target.complete}
    table = _Table(output / VOLUMES, len(card.classes), unfinished)
    skipped = [case.id for case in cases if case.id in table.cases]
    missing = [case for case in cases if case.id not in table.cases]
    done: list[str] = []
    unreadable: dict[str, str] = {}
    clock = _Clock()
    with closing(read_ahead(missing, segmenter.preprocessing)) as scans:
        for _ in missing:
            with clock.during("waiting"):
                case, scan = next(scans)
            try:
                if isinstance(scan, DataError):
                    raise scan
                segmenter.segment(case, scan, targets[case.id], table, clock)
                done.append(case.id)
            except DataError as error:
                unreadable[case.id] = reason(case, error)
            del scan  # before the next but one is read
            if progress:
                progress(len(skipped) + len(done) + len(unreadable), len(cases))
    return Segmented(tuple(done), tuple(skipped), unreadable, dict(clock.seconds))


@dataclass(frozen=True)
class _Segmenter:
    card: TaskCard
    preprocessing: VolumePreprocessing
    window: SlidingWindow
    maps: bool  # whether probabilities are wanted

    @staticmethod
    def of(adapters: Sequence[Adapter], options: SegmentOptions, device: torch.device, output: Path) -> _Segmenter:
        check_alike(adapters, [f"adapter {number}" for number in range(1, len(adapters) + 1)])
        task, card = head(adapters[0])
        preprocessing = adapters[0].card.preprocessing
        if not (task.dense and isinstance(preprocessing, VolumePreprocessing)):
            raise WeightsError("This adapter classifies: it has no masks to write.")
        window = SlidingWindow(
            [as_member(adapter.backbone, head(adapter)[0]) for adapter in adapters],
            preprocessing.patch,
            card.multilabel,
            overlap=options.overlap,
            flips=tuple(range(preprocessing.dims)) if options.flips else (),
            batch=patches_at_once(preprocessing.patch),
            device=device,
            folder=output,
        )
        return _Segmenter(card, preprocessing, window, options.probabilities)

    def segment(self, case: Case, scan: Scan, target: Target, table: _Table, clock: _Clock) -> None:
        """Predict and write one case; its line in the table comes last and makes it whole."""
        geometry, overlapping = scan.restore.geometry, self.card.multilabel
        maps: Maps | None = None
        with clock.during("predicting"):
            if self.maps:
                labels, maps = self.window.scan_maps(scan.array, scan.restore)
            else:
                labels = self.window.scan_labels(scan.array, scan.restore)
        with clock.during("writing"):
            write_case(target, labels, self.card, case, geometry)
            if maps is not None:
                for path, one in zip(target.maps, islice(maps, 0 if overlapping else 1, None), strict=True):
                    write_probability(path, scan.restore.probability(one), geometry)
            sizes, unit = measured(labels, self.card.structures, geometry, overlapping=overlapping)
            table.add(case.id, zip(self.card.classes, target.values, sizes, strict=True), unit)


def _inputs(adapters: Sequence[Adapter], options: SegmentOptions) -> dict[str, Any]:
    """What masks depend on, as plain values."""

    def state(adapter: Adapter) -> str:
        card, (task, task_card) = adapter.card, head(adapter)
        tensors = {**adapter.backbone.adapter_state(), **adapter.backbone.embed_state(), **task.state_dict()}
        told = (card.backbone.sha256, card.preprocessing.model_dump_json(), task_card.model_dump_json())
        return digest(*told, hash_state(tensors))

    return {"adapters": sorted(map(state, adapters)), **options.model_dump(mode="json")}


def _open(folder: Path, inputs: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make the output folder ready.

    Raises:
        OutputError: It holds something, and no wish or no right to go on there or to replace it.
    """
    path = folder / INPUTS
    before = read_json(path) if wrote_masks(folder) else {}
    if folder.is_dir() and any(folder.iterdir()) and (resume or overwrite) and not before:
        raise OutputError(f"{folder} holds something that medtpp predict did not write. Name another folder.")
    prepare_folder(folder, resume=resume, overwrite=overwrite)
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if resume and changed:
        raise OutputError(
            f"The masks in {folder} were made with other {' and '.join(changed)}. Go on with the same, replace them "
            "with --overwrite, or name another folder."
        )
    write_json(path, inputs)


class _Table:
    """volumes.csv, which grows by the lines of one case at a time.

    A kill may leave the lines of a case torn; the case then counts as not done, and the next run drops them.

    Args:
        path: The file.
        structures: Lines of a whole case.
        unfinished: Ids of cases that lack other files; their lines are dropped.

    Attributes:
        cases: Ids of the cases that are done.
    """

    def __init__(self, path: Path, structures: int, unfinished: set[str]) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = [row for row in csv.reader(io.StringIO(whole)) if len(row) == len(_COLUMNS) and row != _COLUMNS]
        counts = Counter(row[0] for row in lines)
        self.cases = {case for case, count in counts.items() if count == structures} - unfinished
        write_text(path, _lines([_COLUMNS, *(row for row in lines if row[0] in self.cases)]))

    def add(self, case: str, structures: Iterable[tuple[str, int, float]], unit: str) -> None:
        """Write the lines of one case."""
        try:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                lines = ([case, name, str(value), f"{size:.6g}", unit] for name, value, size in structures)
                stream.write(_lines(lines))
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror}. Free some space.") from error


def _lines(rows: Iterable[Sequence[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


@dataclass(frozen=True)
class _Clock:
    """Seconds by what they were spent on."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

"""From a study's comparisons to OUT/across.json and the tidy tables OUT/across/*.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medtpp.errors import DataError, MedtppError
from medtpp.evaluation.paired import resamples_for
from medtpp.evaluation.ranks import FEWEST_ARMS, FEWEST_SETS, rank_arms
from medtpp.files import atomic, write_json
from medtpp.report.schema import ArmFile
from medtpp.report.schema_study import AcrossFile, PartFile, RankFile, ScoreFile
from medtpp.workflow.study.efficiency import equal_of
from medtpp.workflow.study.finished import Finished, read_finished
from medtpp.workflow.study.gains import find_gains, gain_files, metric_of, pooled_files
from medtpp.workflow.study.parts import StudyPart
from medtpp.workflow.study.reach import reach_of
from medtpp.workflow.study.sets import DataSet, data_sets, largest_family, pairs_of
from medtpp.workflow.study.words import answer, notes_of, ranks_sentence

_TABLES = ("parts", "sets", "scores", "gains", "pooled", "equal", "reach")


def summarise_study(parts: Sequence[StudyPart], out: Path) -> AcrossFile:
    """Read the comparisons of a study, and write `across.json` and the tables in `across/`.

    What is missing, has failed or is broken is left out, and told in `parts`.

    Args:
        parts: Of the study.
        out: Its folder.

    Raises:
        DataError: No comparison can be read, or those of a data set have different metrics.
        OutputError: The files cannot be written.
    """
    finished, told = _read(parts, out)
    if not finished:
        raise DataError("No comparison of the study can be summarised:", [part.reason for part in told])
    sets, levels = data_sets(finished)
    _refuse_mixed(sets)
    pairs = pairs_of(finished)
    gains = find_gains(sets, pairs, levels)
    single = gain_files(gains)
    pooled = pooled_files(gains, sets, single)
    main = [pair for pair in pairs if pair.kind == "standard"]
    arms = list({arm.name: arm for one in finished for arm in one.file.arms}.values())
    described = [one.describe() for one in sets]
    scores = [score for level in levels for one in sets for score in _scores(one, level.name, arms)]
    reached = [reach_of(one, pair, level.name) for pair in main for level in levels for one in sets]
    across = AcrossFile(
        schema=1,
        level=sets[0].coverage,
        parts=told,
        sets=described,
        levels=levels,
        arms=arms,
        scores=scores,
        gains=single,
        pooled=pooled,
        ranks=[_ranks(sets, level.name, scores) for level in levels],
        equal=[equal for pair in main for one in sets for equal in equal_of(one, pair)],
        reach=[found for found in reached if found is not None],
        answer=answer([one for one in pooled if one.kind == "standard"], len(sets)),
        notes=notes_of(described, levels, pooled),
    )
    write_json(out / "across.json", across.model_dump(mode="json", by_alias=True))
    tables = {name: [row.model_dump() for row in getattr(across, name)] for name in _TABLES}
    for name, rows in (tables | {"ranks": list(_rank_rows(across.ranks))}).items():
        _write_table(out / "across" / f"{name}.csv", rows)
    return across


def _read(parts: Sequence[StudyPart], out: Path) -> tuple[list[Finished], list[PartFile]]:
    finished: list[Finished] = []
    told: list[PartFile] = []
    resamples = resamples_for(largest_family(parts))
    for part in parts:
        named: dict[str, Any] = {name: getattr(part, name) for name in ("dataset", "backbone", "fold", "site")}
        named["folder"] = _way(part.folder, out)
        try:
            one = read_finished(part, resamples)
        except MedtppError as error:
            there = (part.folder / "comparison.json").is_file()
            named["status"] = "broken" if there else "missing"
            told.append(PartFile(**named, reason=" ".join([error.message, *error.problems])))
            continue
        done = int((one.cells.status == "done").sum())
        status: Literal["done", "partial"] = "done" if done == len(one.cells) else "partial"
        failed = tuple((failure.cell, failure.reason) for failure in one.file.failed)
        finished.append(one)
        told.append(PartFile(**named, status=status, cells=len(one.cells), done=done, failed=failed))
    return finished, told


def _way(folder: Path, out: Path) -> str:
    """The way from one folder to another, with slashes; "" where there is none (other drives of Windows)."""
    try:
        return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()
    except ValueError:
        return ""


def _refuse_mixed(sets: Iterable[DataSet]) -> None:
    mixed = []
    for one in sets:
        metrics = sorted({(part.file.metric, part.file.metric_unit) for part in one.parts})
        if len(metrics) > 1:
            mixed.append(f"{one.name}: {', '.join(' in '.join(filter(None, metric)) for metric in metrics)}")
    if mixed:
        raise DataError(
            "Comparisons of one data set have different metrics, so they have no mean. Compare with one --metric.",
            mixed,
        )


def _scores(one: DataSet, level: str, arms: Iterable[ArmFile]) -> list[ScoreFile]:
    found = [(arm, one.score(arm.name, level)) for arm in arms]
    return [
        ScoreFile(
            dataset=one.name,
            level=level,
            labels=one.labels(level),
            arm=arm.name,
            seeds=len(score.by_seed),
            **vars(metric_of(score.estimate)),
        )
        for arm, score in found
        if score is not None
    ]


def _ranks(sets: Sequence[DataSet], level: str, scores: Iterable[ScoreFile]) -> RankFile:
    """Mean ranks of arms over the data sets that have all of them.

    On each, all arms are scored over the same comparisons and seeds: else one that failed on a hard fold would gain.
    """
    table = [(one.dataset, one.arm) for one in scores if one.level == level and one.value is not None]
    there = {one.name: [arm for name, arm in table if name == one.name] for one in sets}
    names, arms = _widest({name: found for name, found in there.items() if found})
    rows = {one.name: row for one in sets if one.name in names and (row := one.side_by_side(arms, level))}
    names = list(rows)
    every = [*dict.fromkeys(arm for _, arm in table), *(name for name, found in there.items() if found)]
    told: dict[str, Any] = {"level": level, "sets": len(names)}
    for what, count, least in (("data sets", len(names), FEWEST_SETS), ("arms", len(arms), FEWEST_ARMS)):
        if count < least:
            return RankFile(**told, reason=f"Ranks take {least} {what} or more; here are {count} that can be compared.")
    signs = {one.name: one.sign for one in sets}
    values = np.array([np.multiply(signs[name], rows[name]) for name in names])
    ranking = rank_arms(values, sets[0].coverage)
    order = np.argsort(ranking.ranks, kind="stable").tolist()
    found = RankFile(
        **told,
        arms=tuple(arms[index] for index in order),
        ranks=tuple(ranking.ranks[index] for index in order),
        p=ranking.p,
        critical=ranking.critical,
        groups=tuple(tuple(sorted(order.index(index) for index in group)) for group in ranking.groups),
        left_out=tuple(name for name in every if name not in {*arms, *names}),
    )
    return found.model_copy(update={"sentence": ranks_sentence(found)})


def _widest(there: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Data sets and arms that all of them have, as many as there can be: sets times arms."""
    common = [arm for arm in next(iter(there.values()), []) if all(arm in found for found in there.values())]
    choices = [
        ([name for name, found in there.items() if set(arms) <= set(found)], list(arms))
        for arms in (common, *there.values())
    ]
    enough = [one for one in choices if len(one[0]) >= FEWEST_SETS and len(one[1]) >= FEWEST_ARMS]
    return max(enough or choices, key=lambda one: len(one[0]) * len(one[1]))


def _rank_rows(ranks: Iterable[RankFile]) -> Iterator[dict[str, Any]]:
    """A row for each arm."""
    for one in ranks:
        told = {"level": one.level, "sets": one.sets, "p": one.p, "critical": one.critical}
        for arm, rank in zip(one.arms, one.ranks, strict=True):
            yield {**told, "arm": arm, "rank": rank}


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A row for each entry; nothing where a value is not there."""
    plain = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in plain for name in row))
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)


def _flat(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Columns of a row: a dictionary has one for each key, a list is told in one."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}_")
        elif isinstance(value, list | tuple):
            yield before + name, "; ".join(map(str, value))
        else:
            yield before + name, value

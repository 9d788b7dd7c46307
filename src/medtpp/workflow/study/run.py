"""A study as it is planned and run: its comparisons are opened, timed and done together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from medtpp.config import RECIPES, Experiment
from medtpp.data.download import is_name
from medtpp.data.holdout import Fold, Holdout, LeftOut, sites_of
from medtpp.data.read import read_dataset
from medtpp.errors import ConfigError, MedtppError
from medtpp.report import write_report
from medtpp.report.schema import StudyFailedFile, StudyFile
from medtpp.report.schema_study import AcrossFile
from medtpp.workflow.cluster import ClusterOptions
from medtpp.workflow.compare.axes import Axes
from medtpp.workflow.compare.comparison import Comparison, Machine
from medtpp.workflow.compare.opening import hold, is_comparison, keep_comparison, read_comparison, share_machine
from medtpp.workflow.compare.plan import base_experiment
from medtpp.workflow.compare.run import measure, run_together
from medtpp.workflow.compare.summary import summarise
from medtpp.workflow.compare.work import Timing
from medtpp.workflow.images import with_task
from medtpp.workflow.pool import Outcome
from medtpp.workflow.steps import refuse_folder
from medtpp.workflow.study.across import summarise_study
from medtpp.workflow.study.file import Member, Study, backbone_title, folder_name, shared_folders
from medtpp.workflow.study.parts import StudyPart
from medtpp.workflow.study.tables import read_study_file, title_of, write_cells, write_study_file

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A part of a study, as far as it could be opened.

    Attributes:
        part: Which.
        experiment: As written by the user, on the part's backbone.
        axes: As written by the user.
        held_out: What its test cases are, where the study says it.
        comparison: None where it could not be opened.
        missing: The data set is not there: what to do.
        failed: Why else it could not be opened.
    """

    part: StudyPart
    experiment: Experiment
    axes: Axes
    held_out: Holdout | None = None
    comparison: Comparison | None = None
    missing: str = ""
    failed: str = ""

    @property
    def title(self) -> str:
        """In a reader's words."""
        return title_of(self.part)

    def counts(self, folder: Path | None) -> tuple[int, int]:
        """Cells and runs of TPP that are not done in its folder; without the data, all that the axes ask for."""
        if self.comparison is not None:
            cells, starts = self.comparison.missing_cells(folder), self.comparison.missing_starts(folder)
        else:
            axes = self.axes.resolved(self.experiment)
            cells = list(axes.cells(base_experiment(self.experiment, axes)))
            starts = list(dict.fromkeys(start for cell in cells for start in cell.starts))
        return len(cells), sum(start.origin is None for start in starts)


@dataclass(frozen=True)
class OpenStudy:
    """A study whose data were read.

    Attributes:
        study: What was asked for.
        out: Its folder; None of a dry run without one.
        parts: All of them.
        machine: How the cells of all are spread.
    """

    study: Study
    out: Path | None
    parts: tuple[Planned, ...]
    machine: Machine

    @property
    def comparisons(self) -> dict[str, tuple[Comparison, Path]]:
        """Those that could be opened, with their folders, by what is put before the names of their jobs."""
        return {f"{one.title}: ": (one.comparison, one.part.folder) for one in self.parts if one.comparison}

    def folder(self, planned: Planned) -> Path | None:
        """Of a part; None where nothing is written."""
        return None if self.out is None else planned.part.folder

    def seconds_left(self, planned: Planned) -> float | None:
        """What is not done of a part will take with all processes at work; None where that is unknown."""
        found = planned.comparison
        return None if found is None or not found.timings else found.seconds_left(self.folder(planned))


def open_study(
    study: Study,
    out: Path | None,
    *,
    jobs: int | None = None,
    cluster: ClusterOptions | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OpenStudy:
    """Read all data sets and find out whether all cells can be made; nothing is deleted or written.

    A data set that is not there or cannot be used does not stop the others.

    Args:
        study: What is compared.
        out: The output folder; a dry run may go without.
        jobs: Processes at once; as many as fit by default.
        cluster: Where the cells will be done, if not here.
        dry_run: With `out`, what is done there counts.
        resume: Go on with what the folder holds.
        overwrite: Replace what the folders of the comparisons hold.
        progress: Called with images decoded so far and in all of one data set.

    Raises:
        ConfigError: Comparisons make no sense, or the folder holds other ones; all reasons are listed.
        OutputError: The folder is not empty and neither `resume` nor `overwrite` is given.
    """
    if out is not None and not dry_run:
        refuse_folder(out, [], resume=resume, overwrite=overwrite)
    mistakes: list[str] = []
    parts = list(_parts(study, out or Path(), mistakes))
    if out is not None and is_comparison(out):
        mistakes.append(f"{out} holds a single comparison, and a study has several in folders of it: use another --out")
    elif out is not None and not overwrite:
        mistakes += _lost(study, parts, out)
    read = functools.partial(
        read_comparison,
        jobs=jobs,
        cluster=cluster,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    opened = []
    for planned in parts:
        if not planned.missing:
            planned = _opened(planned, read, out, mistakes)
        opened.append(planned)
    if mistakes:
        _remove_empty([one.part.folder for one in opened], out)
        raise ConfigError("This study cannot be made:", dict.fromkeys(mistakes))
    cells = sum(len(one.comparison.cells) for one in opened if one.comparison)
    machines = [share_machine(one.comparison.base, cells, jobs, cluster) for one in opened if one.comparison]
    return _on(OpenStudy(study, out, tuple(opened), Machine(1, 1)), machines)


def measure_study(study: OpenStudy, *, dry_run: bool = False) -> OpenStudy:
    """The same study with its steps timed, once for each data set and backbone."""
    known: dict[tuple[str, str], Mapping[str, Timing]] = {}
    parts = []
    for one in study.parts:
        if one.comparison is not None:
            key = one.part.dataset, one.part.backbone
            found = measure(one.comparison, study.folder(one), dry_run=dry_run, known=known.get(key))
            known[key] = found.timings
            one = replace(one, comparison=found)
        parts.append(one)
    return _on(replace(study, parts=tuple(parts)), [one.comparison.machine for one in parts if one.comparison])


@contextmanager
def hold_parts(study: OpenStudy) -> Iterator[None]:
    """Keep other processes out of all comparisons' folders."""
    with ExitStack() as stack:
        for _, folder in study.comparisons.values():
            stack.enter_context(hold(folder))
        yield


def keep_study(study: OpenStudy, out: Path, *, overwrite: bool = False) -> None:
    """Make the folders of all comparisons, and write what the study is."""
    for comparison, folder in study.comparisons.values():
        keep_comparison(comparison, folder, overwrite=overwrite)
    write_study_file(out, study.study, [one.part for one in study.parts if not _unknown(one)], [])


def run_study(study: OpenStudy, out: Path) -> Iterator[Outcome]:
    """Do what is not done yet, of all comparisons on one set of processes; gives each start and cell as it ends."""
    return run_together(study.comparisons, study.machine, out)


def finish_study(study: OpenStudy, out: Path) -> tuple[StudyFile, AcrossFile | None]:
    """Evaluate what is there: each comparison with its report, then the tables, summary and report of all.

    Returns:
        What the study is, and what of it failed; what its comparisons say together, if there is any that says anything.
    """
    failed, finished = [], []
    for one in study.parts:
        reason = one.missing or one.failed
        if one.comparison is not None:
            try:
                summary = summarise(one.comparison, one.part.folder)
                write_report(one.part.folder)
            except MedtppError as error:
                reason = str(error)
            else:
                finished.append(one.part)
                failed += [
                    StudyFailedFile(part=one.title, cell=cell.cell, reason=cell.reason) for cell in summary.failed
                ]
        if reason:
            failed.append(StudyFailedFile(part=one.title, reason=reason))
    backbones = {one.part.folder: one.experiment.backbone.name for one in study.parts}
    write_cells(out, finished, backbones)
    parts, across = [one.part for one in study.parts if not _unknown(one)], None
    if finished:
        try:
            across = summarise_study(parts, out)
            write_report(out)
        except MedtppError as error:
            failed.append(StudyFailedFile(part="summary", reason=str(error)))
    return write_study_file(out, study.study, parts, failed), across


def _parts(study: Study, base: Path, mistakes: list[str]) -> Iterator[Planned]:
    """All parts, with data sets that are not there told."""
    for member, backbone in study.variants:
        missing = _missing(member)
        for held_out, fold, site in _held_out(study, member, missing, mistakes):
            named = backbone_title(backbone)
            names = {"dataset": member.name, "backbone": named, "fold": f"fold{fold}", "site": site}
            levels = [folder_name(names[level]) for level in study.levels]
            part = StudyPart(member.name, named, fold, site, base.joinpath(*levels))
            yield Planned(part, member.experiment, member.axes, held_out, missing=missing)


def _held_out(
    study: Study, member: Member, missing: str, mistakes: list[str]
) -> Iterator[tuple[Holdout | None, str, str]]:
    """Each holdout with its fold and its site in words. Of a data set that is not there the sites are unknown."""
    if study.folds:
        for number in range(1, study.folds + 1):
            yield Fold(number, study.folds), str(number), ""
    elif study.sites and not missing:
        try:
            _, dataset = with_task(member.experiment, read_dataset(member.experiment.data))
            sites = sites_of(dataset, member.experiment.data.columns.site)
        except MedtppError as error:
            mistakes.append(f"{member.name}: {error}")
        else:
            mistakes += [f"{member.name}: {text}" for text in shared_folders("sites", sites)]
            for site in sites:
                yield LeftOut(site), "", site
    else:
        yield None, "", "?" if study.sites else ""


def _unknown(planned: Planned) -> bool:
    """Whether it stands for sites that nobody knows yet."""
    return planned.part.site == "?" and planned.held_out is None


def _missing(member: Member) -> str:
    """What to do where a data set is not there; "" where it is."""
    path = member.experiment.data.path
    if is_name(path) or path.expanduser().exists():
        return ""
    names = RECIPES.names()
    recipe = next((name for name in (path.parent.name, path.name, member.name) if name in names), None)
    how = f"medtpp data prepare {recipe}" if recipe else f"check data.path of {member.name}"
    return f"{path} is missing: {how}"


def _opened(planned: Planned, read: Callable[..., Comparison], out: Path | None, mistakes: list[str]) -> Planned:
    """With its comparison, or why there is none."""
    try:
        comparison = read(
            planned.experiment,
            planned.axes,
            None if out is None else planned.part.folder,
            held_out=planned.held_out,
        )
    except ConfigError as error:
        mistakes.append(f"{planned.title}: {error}")
    except (MedtppError, OSError) as error:
        return replace(planned, failed=str(error))
    else:
        return replace(planned, comparison=comparison)
    return planned


def _remove_empty(folders: list[Path], out: Path | None) -> None:
    """Take away what looking at the folders made."""
    for folder in folders if out is not None else ():
        for above in (folder, *folder.parents):
            if above == out:
                break
            with suppress(OSError):  # it holds something
                above.rmdir()


def _lost(study: Study, parts: list[Planned], out: Path) -> list[str]:
    """What a study that is gone on with would no longer have."""
    before = read_study_file(out)
    if before is None:
        return []
    if before.levels != list(study.levels):
        return [
            f"{out} was begun with folders by {', '.join(before.levels) or 'nothing'}, and now they would be by "
            f"{', '.join(study.levels) or 'nothing'}: results there would be made anew. Use another --out."
        ]
    now = {title_of(one.part) for one in parts}
    unknown = {one.part.dataset for one in parts if _unknown(one)}
    gone = [title_of(part) for part in before.parts if part.dataset not in unknown and title_of(part) not in now]
    return [f"{out} has {one}, which this study leaves out: keep it, or use another --out" for one in gone]


def _on(study: OpenStudy, machines: list[Machine]) -> OpenStudy:
    """The same study with all its comparisons on the smallest of some machines."""
    machine = min(machines, key=lambda machine: machine.processes, default=study.machine)
    parts = [
        replace(one, comparison=replace(one.comparison, machine=machine)) if one.comparison else one
        for one in study.parts
    ]
    return replace(study, parts=tuple(parts), machine=machine)

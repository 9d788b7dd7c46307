"""What a study consists of, read from a file or made from one experiment; all its mistakes are reported at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from ruamel.yaml.comments import CommentedMap

from medtpp.backbones.folder import EMBEDDED
from medtpp.config import BACKBONES, PRETEXTS, TUNERS, BackboneOptions, Count, Experiment, Options
from medtpp.data.download import is_name
from medtpp.errors import ConfigError
from medtpp.registry import Registry
from medtpp.workflow.compare.axes import AUTO, INITS, METRICS, Axes
from medtpp.workflow.compare.plan import Extra, base_experiment, refuse_together
from medtpp.workflow.experiment import load_experiment, read_yaml, validate

# The axes of a comparison: how a file and the command line call them, and how `Axes` does.
AXES = {
    "tuner": "tuners",
    "pretext": "pretexts",
    "init": "inits",
    "arm": "extras",
    "labels": "labels",
    "seeds": "seeds",
    "metric": "metric",
    "margin": "margin",
    "foreign": "foreign",
}
_LISTS = ("backbones", "tuner", "pretext", "init", "arm", "labels", "foreign")


def _one_of(kind: str, names: Callable[[], Iterable[str]]) -> AfterValidator:
    def known(name: str) -> str:
        if name not in (found := list(names())):
            raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(found)}")
        return name

    return AfterValidator(known)


def _registered(registry: Registry[Any]) -> AfterValidator:
    return _one_of(registry.kind, registry.names)


Labelled = list[Count | Literal["all"]]


class MemberOptions(Options):
    """A data set of a study."""

    file: Path = Field(description="its experiment file, relative to the study's")
    set: list[str] = Field([], description="fields to override in it: [data.image_size=128]")
    labels: Labelled | None = Field(None, description="label counts of its own")


class StudyOptions(Options):
    """The file of a study."""

    experiments: dict[str, MemberOptions] = Field(min_length=1, description="data sets by name")
    backbones: list[str] = Field([], description="names; by default each experiment's own")
    folds: Annotated[int, Field(ge=2)] | None = Field(None, description="each of so many parts is the test set once")
    sites: bool = Field(False, description="each site is the test set once")
    tuner: list[Annotated[str, _registered(TUNERS)]] | None = None
    pretext: list[Annotated[str, _one_of("pretext", lambda: (AUTO, *PRETEXTS.names()))]] | None = None
    init: list[Annotated[str, _one_of("init", lambda: INITS)]] | None = None
    arm: list[Extra] | None = None
    labels: Labelled | None = None
    seeds: Count | None = None
    metric: Annotated[str, _one_of("metric", lambda: (AUTO, *METRICS))] | None = None
    margin: Annotated[float, Field(ge=0)] | None = None
    foreign: list[Path] | None = None


@dataclass(frozen=True)
class Member:
    """A data set of a study.

    Attributes:
        name: For tables and folders.
        experiment: As written by the user.
        axes: What is compared on it.
    """

    name: str
    experiment: Experiment
    axes: Axes


@dataclass(frozen=True)
class Study:
    """A grid of comparisons.

    Attributes:
        members: The data sets.
        backbones: Names; () for each experiment's own.
        folds: Each of so many parts of the cases is the test set once; 0 for one split.
        sites: Each site is the test set once.
    """

    members: tuple[Member, ...]
    backbones: tuple[str, ...] = ()
    folds: int = 0
    sites: bool = False

    @property
    def levels(self) -> tuple[str, ...]:
        """The axes that have a level of folders."""
        found = {
            "dataset": len(self.members) > 1,
            "backbone": len(self.backbones) > 1,
            "fold": self.folds > 0,
            "site": self.sites,
        }
        return tuple(name for name, there in found.items() if there)

    @property
    def single(self) -> Member | None:
        """The one data set of what is a single comparison."""
        return None if self.levels else next(member for member, _ in self.variants)

    @property
    def variants(self) -> Iterator[tuple[Member, str]]:
        """Each data set on each backbone, with the backbone's name, or "" for the experiment's own."""
        for member in self.members:
            for name in self.backbones or ("",):
                yield replace(member, experiment=_on_backbone(member.experiment, name)), name

    def problems(self) -> list[str]:
        """All that no data are needed for to say it."""
        found = []
        if self.folds and self.sites:
            found.append("folds and sites exclude each other: both decide what the test cases are")
        if self.folds == 1:
            found.append("folds: one fold is no split; 2 or more are")
        doubled = [name for name, times in Counter(self.backbones).items() if times > 1]
        found += [f"backbone {name} is named twice" for name in doubled]
        unknown = [name for name in self.backbones if not any(kind.recognises(name) for kind in BACKBONES.values())]
        found += [f"no backbone is called {name!r}; see `medtpp list backbones`" for name in unknown]
        found += shared_folders("data sets", (member.name for member in self.members))
        found += shared_folders("backbones", (backbone_title(name) for name in dict.fromkeys(self.backbones)))
        for member, _ in self.variants:
            with _gathering(found, f"{member.name}: "):
                base_experiment(member.experiment, member.axes)
        return list(dict.fromkeys(found))


def is_study(source: Path) -> bool:
    """Whether a source is the file of a study. Raises ConfigError where a YAML file cannot be read."""
    return source.suffix.lower() in (".yaml", ".yml") and source.is_file() and "experiments" in read_yaml(source)


def read_study(source: Path, settings: Sequence[str], given: Mapping[str, Any]) -> Study:
    """A study from its file.

    Args:
        source: A YAML file with the field `experiments`.
        settings: `field.field=value` texts that override fields of all experiments.
        given: Fields of the file that the command line says otherwise; None where it says nothing.

    Raises:
        ConfigError: All mistakes of the file, of its experiments' files, and of what is compared.
    """
    values = _normal(read_yaml(source))
    problems: list[str] = []
    options: StudyOptions | None = None
    try:
        options = validate(StudyOptions, values, str(source))
    except ConfigError as error:
        problems += error.problems
    said = {name: value for name, value in given.items() if value is not None}
    members = []
    for name, file, chosen in _files(values, source.parent):
        axes, experiment = None, None
        with _gathering(problems, f"{file}: "):
            experiment = load_experiment(file, [*chosen, *settings])
        if options is not None:
            with _gathering(problems):
                axes = make_axes(_fields(options, name, source.parent) | said)
        if experiment is not None and axes is not None:
            members.append(Member(name, experiment, axes))
    if options is None:
        raise ConfigError(_mistakes_in(source), problems)
    folds, sites = said.get("folds", options.folds) or 0, said.get("sites", options.sites)
    if "folds" in said and "sites" not in said:
        sites = False
    elif "sites" in said and "folds" not in said:
        folds = 0
    backbones = tuple(_found(name, source.parent) for name in said.get("backbones", options.backbones))
    study = Study(tuple(members), backbones, folds, sites)
    problems += study.problems()
    if problems:
        raise ConfigError(_mistakes_in(source), dict.fromkeys(problems))
    return study


def study_of(experiment: Experiment, axes: Axes, *, backbones: Sequence[str], folds: int, sites: bool) -> Study:
    """A study of one data set, called as the folder of its manifest or its images is.

    Raises:
        ConfigError: All that makes no study.
    """
    path = experiment.data.path
    named = path if is_name(path) else path.resolve()
    named = named.parent if named.suffix.lower() == ".csv" else named
    found = tuple(_found(name, Path()) for name in backbones)
    study = Study((Member(named.name, experiment, axes),), found, folds, sites)
    if found or folds or sites:  # what is wrong with a single comparison is found when it is opened
        refuse_together("This study cannot be made:", study.problems())
    return study


def make_axes(fields: Mapping[str, Any]) -> Axes:
    """Axes from the fields of a file or of the command line; None where nothing is said. Raises ConfigError."""
    named = {AXES[name]: value for name, value in fields.items() if name in AXES and value is not None}
    return Axes.load(named)


def backbone_title(name: str) -> str:
    """The name of a backbone, of a folder without those above it."""
    return Path(name).name if (Path(name) / "backbone.json").is_file() else name


def shared_folders(kind: str, names: Iterable[str]) -> list[str]:
    """What to say of names whose folders would be the same."""
    folders = Counter(folder_name(name).casefold() for name in names)
    doubled = [name for name, times in folders.items() if times > 1]
    return [f"several {kind} would have the folder {name}: name them otherwise" for name in doubled]


def folder_name(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def _normal(values: CommentedMap) -> CommentedMap:
    """Short forms written out: "a, b" is [a, b], one value a list of it, a file's name {file: NAME}."""
    experiments = values.get("experiments")
    sections = [values]
    if isinstance(experiments, CommentedMap):
        for name, entry in experiments.items():
            if isinstance(entry, str):
                experiments[name] = CommentedMap({"file": entry})
            elif isinstance(entry, CommentedMap):
                sections.append(entry)
    for section in sections:
        for name in _LISTS:
            value = section.get(name)
            if isinstance(value, str):
                parts = [part.strip() for part in value.split(",") if part.strip()]
                section[name] = [int(part) if part.isdecimal() else part for part in parts]
            elif isinstance(value, int) and not isinstance(value, bool):
                section[name] = [value]
    return values


def _files(values: CommentedMap, base: Path) -> list[tuple[str, Path, list[str]]]:
    """The data sets whose files can be looked at, whatever else is wrong: name, file, settings."""
    experiments = values.get("experiments")
    found = []
    for name, entry in experiments.items() if isinstance(experiments, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("file"), str):
            chosen = entry.get("set")
            texts = [text for text in chosen if isinstance(text, str)] if isinstance(chosen, list) else []
            found.append((str(name), base / entry["file"], texts))
    return found


def _fields(options: StudyOptions, name: str, base: Path) -> dict[str, Any]:
    """The axes that a file gives a data set."""
    fields = {field: getattr(options, field) for field in AXES}
    own = options.experiments[name].labels
    foreign = [str(base / path.expanduser()) for path in options.foreign or []]
    return fields | {"labels": own or options.labels, "foreign": foreign or None}


@contextmanager
def _gathering(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Keep what is wrong, and go on."""
    try:
        yield
    except ConfigError as error:
        problems += [f"{prefix}{text}" for text in error.problems or [error.message]]


def _mistakes_in(source: Path) -> str:
    return f"There are mistakes in the study {source}:"


def _found(name: str, base: Path) -> str:
    """A backbone's name; of a folder its whole path, since adapters name their backbone."""
    for folder in (Path(name).expanduser(), base / name):
        if (folder / "backbone.json").is_file() and not (EMBEDDED / name).is_dir():
            return str(folder.resolve())
    return name


def _on_backbone(experiment: Experiment, name: str) -> Experiment:
    """The experiment on another backbone, whose options are its own."""
    if not name or name == experiment.backbone.name:
        return experiment
    return experiment.model_copy(update={"backbone": BackboneOptions(name=name)})

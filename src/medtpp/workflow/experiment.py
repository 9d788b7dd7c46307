"""Experiment files: read strictly with line numbers, written fully resolved and commented."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from medtpp.config import Experiment, experiment_schema
from medtpp.errors import ConfigError
from medtpp.files import write_text

_METHODS = ("tuner", "pretext", "task")
M = TypeVar("M", bound=BaseModel)


def load_experiment(source: Path, settings: Sequence[str] = (), unlabelled: Sequence[Path] = ()) -> Experiment:
    """An experiment from a YAML file, or with defaults from a data folder or manifest.

    Args:
        source: A .yaml or .yml file, or what `data.path` would say.
        settings: `field.field=value` texts that override the file.
        unlabelled: Further folders of images without labels.

    Raises:
        ConfigError: All mistakes of the file and the settings, with line numbers.
    """
    is_file = source.suffix.lower() in (".yaml", ".yml")
    values = _read_yaml(source) if is_file else CommentedMap({"data": CommentedMap({"path": str(source)})})
    values = apply_settings(values, settings)
    if unlabelled:
        data = values.setdefault("data", CommentedMap())
        data["unlabelled"] = [*data.get("unlabelled", []), *map(str, unlabelled)]
    for name in _METHODS:  # `tuner: ssf` is short for `tuner: {name: ssf}`
        if isinstance(values.get(name), str):
            values[name] = CommentedMap({"name": values[name]})
        elif isinstance(values.get(name), Mapping):
            values[name].setdefault(
                "name", experiment_schema().model_fields[name].get_default(call_default_factory=True).name
            )
    experiment = validate(experiment_schema(), values, str(source) if is_file else "the settings")
    return _with_paths(experiment, source.parent if is_file else Path())


def validate(model: type[M], values: Mapping[str, Any], what: str) -> M:
    """Check values against a model.

    Raises:
        ConfigError: All mistakes, with fields and, where the values come from a file, lines.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_describe(model, values, dict(item)) for item in error.errors()]
        raise ConfigError(f"There are mistakes in {what}:", problems) from error


def apply_settings(values: Mapping[str, Any], settings: Sequence[str]) -> CommentedMap:
    """Override fields by `field.field=value` texts.

    Raises:
        ConfigError: A text is not of this form.
    """
    changed = values if isinstance(values, CommentedMap) else CommentedMap(values)
    for setting in settings:
        _apply(changed, setting)
    return changed


def _with_paths(experiment: Experiment, base: Path) -> Experiment:
    """Paths in a file are relative to it, where they exist there and not here."""

    def found(path: Path) -> Path:
        path = path.expanduser()
        return base / path if not path.exists() and (base / path).exists() else path

    data = experiment.data
    paths = {"path": found(data.path), "unlabelled": [found(path) for path in data.unlabelled]}
    return experiment.model_copy(update={"data": data.model_copy(update=paths)})


def _read_yaml(path: Path) -> CommentedMap:
    if not path.is_file():
        raise ConfigError(f"There is no experiment file {path}. `medtpp init DATA -o {path.name}` writes one.")
    try:
        values = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, CommentedMap):
        raise ConfigError(f"{path} holds no experiment: it should begin with a field such as `data:`.")
    return values


def _apply(values: CommentedMap, setting: str) -> None:
    name, equals, text = setting.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting!r} is not of the form field.field=value, such as tuner.rank=16.")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else ""
    except YAMLError as error:
        raise ConfigError(f"The value of --set {setting!r} cannot be read: {error}") from error
    node: Any = values
    for key in keys[:-1]:
        child = node.get(key)
        if isinstance(child, str) and key in _METHODS:
            child = CommentedMap({"name": child})
        if not isinstance(child, CommentedMap):
            child = CommentedMap()
        node[key] = child
        node = child
    if keys[-1] == "name" and len(keys) == 2 and keys[0] in _METHODS and node.get("name") != value:
        node.clear()  # options of another method would not fit
    node[keys[-1]] = value


def _describe(model: type[BaseModel], values: Any, error: dict[str, Any]) -> str:
    """One mistake: where (line and field), what is wrong, and which name may have been meant."""
    location = [part for index, part in enumerate(error["loc"]) if not (index == 1 and error["loc"][0] in _METHODS)]
    field = ".".join(map(str, location))
    line = _line(values, location)
    where = f"line {line}, {field}" if line is not None else field
    if error["type"] == "extra_forbidden":
        known = _known_fields(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{where}: there is no such field; {hint}"
    given = "" if error["type"] == "missing" else f" (it is {error['input']!r})"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}{given}"


def _line(values: Any, location: Sequence[str | int]) -> int | None:
    line = None
    for part in location:
        try:
            line = values.lc.data[part][0] + 1
            values = values[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line


def _known_fields(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    model: Any = root
    for part in location:
        if part in _METHODS:
            from medtpp.config import PRETEXTS, TASKS, TUNERS

            registry = {"tuner": TUNERS, "pretext": PRETEXTS, "task": TASKS}[str(part)]
            return sorted({field for entry in registry.values() for field in entry.Options.model_fields})
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def write_experiment(path: Path, experiment: Experiment) -> None:
    """Write an experiment with a comment for each field that has a description, and with absolute paths."""
    data = experiment.data
    paths = {"path": data.path.resolve(), "unlabelled": [path.resolve() for path in data.unlabelled]}
    experiment = experiment.model_copy(update={"data": data.model_copy(update=paths)})
    stream = io.StringIO()
    yaml = YAML(typ="rt")
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(_commented(experiment), stream)
    write_text(path, "# A medtpp experiment. Run it with: medtpp run THIS_FILE --out runs/NAME\n" + stream.getvalue())


def _commented(model: BaseModel) -> CommentedMap:
    node = CommentedMap()
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        node[name] = _commented(value) if isinstance(value, BaseModel) else _plain(value)
        if field.description:
            node.yaml_add_eol_comment(field.description, name, column=0)
    return node


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

"""Experiment files: read strictly with line numbers, written fully resolved and commented."""

from __future__ import annotations

import difflib
import functools
import io
import operator
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from medtpp.backbones.folder import EMBEDDED
from medtpp.backbones.transformers_weights import PREFIX
from medtpp.config import PRETEXTS, TASKS, TUNERS, AutoPretext, Experiment, experiment_schema
from medtpp.data.download import is_name
from medtpp.errors import ConfigError
from medtpp.files import write_text
from medtpp.registry import Registry

_METHODS: dict[str, Registry[Any]] = {"tuner": TUNERS, "pretext": PRETEXTS, "task": TASKS}
_KINDS = {  # the first word of pydantic's names of mistakes, in a user's words
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list such as [a, b]",
    "tuple": "a list such as [a, b]",
    "dict": "a section with fields of its own",
    "model": "a section with fields of its own",
}
M = TypeVar("M", bound=BaseModel)
Location = tuple[str | int, ...]


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
    values = read_yaml(source) if is_file else CommentedMap({"data": CommentedMap({"path": str(source)})})
    values = apply_settings(values, settings)
    for name in [name for name, value in values.items() if value is None]:
        del values[name]  # a section of which nothing is left but comments
    if unlabelled and isinstance(values.get("data"), CommentedMap):
        values["data"]["unlabelled"] = [*(values["data"].get("unlabelled") or []), *map(str, unlabelled)]
    for name in _METHODS:  # `tuner: ssf` is short for `tuner: {name: ssf}`
        if isinstance(values.get(name), str):
            values[name] = CommentedMap({"name": values[name]})
        elif isinstance(values.get(name), Mapping):
            values[name].setdefault(
                "name", experiment_schema().model_fields[name].get_default(call_default_factory=True).name
            )
    experiment = validate(experiment_schema(), values, str(source) if is_file else "the settings")
    return _with_paths(experiment, source.parent if is_file else Path())


def read_yaml(path: Path, kind: str = "experiment", field: str = "data") -> CommentedMap:
    """The fields of a file, with their lines, not checked.

    Args:
        path: The file.
        kind: What it is, for messages.
        field: One that it might begin with.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        hint = f" `medtpp init DATA -o {path.name}` writes one." if kind == "experiment" else ""
        raise ConfigError(f"There is no {kind} file {path}.{hint}")
    try:
        values = YAML(typ="rt").load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8. Save it as UTF-8.") from error
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_mistake(error)}.") from error
    if not isinstance(values, CommentedMap):
        raise ConfigError(f"{path} holds no {kind}: it should begin with a field such as `{field}:`.")
    return values


def validate(model: type[M], values: Mapping[str, Any], what: str) -> M:
    """Check values against a model. Where text is meant, a number that YAML read is taken for its digits.

    Raises:
        ConfigError: All mistakes, with fields and, where the values come from a file, lines.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        if _numbers_to_text(values, found):
            return validate(model, values, what)
        raise ConfigError(f"There are mistakes in {what}:", _mistakes(model, values, found)) from error


def apply_settings(values: Mapping[str, Any], settings: Sequence[str]) -> CommentedMap:
    """Override fields by `field.field=value` texts.

    Raises:
        ConfigError: Texts are not of this form; all of them are listed.
    """
    changed = values if isinstance(values, CommentedMap) else CommentedMap(values)
    problems = []
    for setting in settings:
        try:
            _apply(changed, setting)
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("Some settings cannot be read:", problems)
    return changed


def _with_paths(experiment: Experiment, base: Path) -> Experiment:
    """Paths in a file are relative to it, where they exist there and not here; those of a backbone become absolute.

    An adapter names its backbone, and is used from other folders than it was made in.
    """

    def found(path: Path) -> Path:
        path = path.expanduser()
        return base / path if not path.exists() and (base / path).exists() else path

    data, backbone = experiment.data, experiment.backbone
    weights = {}
    prefix = PREFIX if backbone.name.startswith(PREFIX) else ""
    folder, file = found(Path(backbone.name.removeprefix(prefix))), found(Path(backbone.weights))
    needed = "config.json" if prefix else "backbone.json"
    if (folder / needed).is_file() and not (EMBEDDED / backbone.name).is_dir():
        weights["name"] = f"{prefix}{folder.resolve()}"
    if backbone.weights not in ("pretrained", "random") and file.is_file():
        weights["weights"] = str(file.resolve())
    paths = {"path": found(data.path), "unlabelled": [found(path) for path in data.unlabelled]}
    return experiment.model_copy(
        update={"data": data.model_copy(update=paths), "backbone": backbone.model_copy(update=weights)}
    )


def _yaml_mistake(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    context = f"{error.context}, " if error.context else ""
    problem = str(error.problem).split(" with value ")[0]  # of a doubled key, with all that stands under it
    return f"line {error.problem_mark.line + 1}: {context}{problem}"


def _apply(values: CommentedMap, setting: str) -> None:
    name, equals, text = setting.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting!r} is not of the form field.field=value, such as tuner.rank=16.")
    try:
        # A single mark, such as a separator, is itself; YAML would take | for the beginning of a text.
        value = text if len(text) == 1 and not text.isalnum() else YAML(typ="safe").load(text) if text.strip() else ""
    except YAMLError as error:
        reason = error.problem if isinstance(error, MarkedYAMLError) else error
        raise ConfigError(
            f"The value of --set {setting!r} is not valid YAML: {reason}. Text with special characters goes in quotes: "
            f"--set '{name}=\"{text}\"'."
        ) from error
    node: Any = values
    for key in keys[:-1]:
        child = node.get(key)
        if isinstance(child, str) and key in _METHODS:
            child = CommentedMap({"name": child})
        if not isinstance(child, CommentedMap):
            child = CommentedMap(child if isinstance(child, Mapping) else {})  # such as of --set 'tpp={steps: 9}'
        _put(node, key, child)
        node = child
    if keys[-1] == "name" and len(keys) == 2 and keys[0] in _METHODS and node.get("name") != value:
        node.clear()  # options of another method would not fit
    _put(node, keys[-1], value)


def _put(node: CommentedMap, key: str, value: Any) -> None:
    if node.get(key) is not value and isinstance(node.lc.data, dict):
        node.lc.data.pop(key, None)  # what is set does not stand in a line of the file
    node[key] = value


def _numbers_to_text(values: Any, errors: Sequence[ErrorDetails]) -> bool:
    """Put "32" in the place of 32 where text is expected, in place; whether there was such a place."""
    changed = False
    for error in errors:
        given = error["input"]
        if type(given) is not int:
            continue
        if error["type"] in ("string_type", "path_type") or repr(str(given)) in error.get("ctx", {}).get(
            "expected", ""
        ):
            *above, last = _location(values, error)
            functools.reduce(operator.getitem, above, values)[last] = str(given)
            changed = True
    return changed


def _mistakes(model: type[BaseModel], values: Any, errors: Sequence[ErrorDetails]) -> list[str]:
    """A line for each mistake: where (line and field), what is wrong, and which name may have been meant."""
    expected: dict[Location, list[str]] = {}  # a union tells what each of its kinds expects
    given: dict[Location, Any] = {}
    texts: dict[Location, str] = {}
    for error in errors:
        location = _location(values, error)
        given[location] = error["input"]
        text = _unknown_name(model, values, location, error)
        if error["type"] == "missing":
            text = "is missing"
        elif not text and error["type"] == "literal_error":
            expected.setdefault(location, []).append(error["ctx"]["expected"])
        elif not text and (kind := _KINDS.get(error["type"].split("_")[0])):
            expected.setdefault(location, []).append(kind)
        elif not text and error["msg"].startswith("Input should be "):
            expected.setdefault(location, []).append(error["msg"].removeprefix("Input should be "))
        elif not text:
            said = error["msg"].removeprefix("Value error, ")
            text = said[0].lower() + said[1:]
        if text:
            texts[location] = text
    for location, kinds in expected.items():
        texts[location] = f"should be {' or '.join(dict.fromkeys(kinds))}, not {reprlib.repr(given[location])}"
    inside = {location[:-1] for location in texts if isinstance(location[-1], int)}
    lines = {location: _line(values, location) for location in texts if location not in inside}
    return [
        (f"line {line}, " if line else "") + f"{'.'.join(map(str, location))}: {texts[location]}"
        for location, line in sorted(lines.items(), key=lambda item: item[1])
    ]


def _location(values: Any, error: ErrorDetails) -> Location:
    """The field of a mistake, without what pydantic adds for the members of unions."""
    parts = list(error["loc"])
    if len(parts) > 1 and parts[0] in _METHODS and parts[1] in (*_METHODS[parts[0]].names(), "auto"):
        del parts[1]
    for depth, part in enumerate(parts):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return tuple(parts[: depth + (error["type"] == "missing")])
    return tuple(parts)


def _line(values: Any, location: Location) -> int:
    """The line of a field, or of the section that lacks it; 0 for what no file says."""
    line = 0
    for part in location:
        try:
            line = values.lc.data[part][0] + 1
            values = values[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            return 0 if isinstance(values, Mapping) and part in values else line
    return line


def _unknown_name(model: type[BaseModel], values: Any, location: Location, error: ErrorDetails) -> str:
    """What to say of a field or method that does not exist, "" for another mistake."""
    registry = _METHODS.get(str(location[0])) if location else None
    if registry and (error["type"] == "union_tag_invalid" or location[1:] == ("name",)):
        method = values[location[0]]["name"]
        try:
            registry.get(str(method))
        except ConfigError as unknown:
            return unknown.message
    if error["type"] != "extra_forbidden":
        return ""
    name = str(location[-1])
    if registry and len(location) == 2:
        method = values[location[0]]["name"]
        owners = [other for other, entry in registry.items() if name in entry.Options.model_fields]
        if owners:
            have = f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'}"
            return f"{method} has no such option; {have}. Choose it with --set {location[0]}.name=..."
        known = sorted(registry.get(method).Options.model_fields) if method != "auto" else ["name"]
    else:
        known = _known_fields(model, location[:-1])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"there is no such field; {hint}"


def _known_fields(model: Any, location: Location) -> list[str]:
    for part in location:
        is_mapping = get_origin(model) is dict  # of names to sections
        model = get_args(model)[1] if is_mapping else model.model_fields[part].annotation
    return list(model.model_fields)


def write_experiment(path: Path, experiment: Experiment) -> None:
    """Write an experiment with a comment for each field that has a description, and with absolute paths."""
    data = experiment.data
    source = data.path if is_name(data.path) else data.path.resolve()
    paths = {"path": source, "unlabelled": [path.resolve() for path in data.unlabelled]}
    experiment = experiment.model_copy(update={"data": data.model_copy(update=paths)})
    stream = io.StringIO()
    yaml = YAML(typ="rt")
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    node = _commented(experiment)
    node["pretext"].yaml_add_eol_comment(AutoPretext.model_fields["name"].description, "name", column=0)
    yaml.dump(node, stream)
    write_text(path, "# A medtpp experiment. Run it with: medtpp run THIS_FILE --out runs/NAME\n" + stream.getvalue())


def _commented(model: BaseModel) -> CommentedMap:
    node = CommentedMap()
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        node[name] = _commented(value) if isinstance(value, BaseModel) else _plain(value)
        if field.description:
            node.yaml_add_eol_comment(field.description, name, column=0)
    for name, value in (model.model_extra or {}).items():
        node[name] = _plain(value)
    return node


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

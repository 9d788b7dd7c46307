"""Writes what the documentation takes from the code: docs/experiment.md, and the tables of methods in README.md.

Run it after a method or a field was added: `python docs/generate.py`. `tests/test_docs.py` fails until then.
"""

from __future__ import annotations

import copy
import functools
import re
import textwrap
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import medtpp
from medtpp import backbones
from medtpp.config import BACKBONES, PRETEXTS, TASKS, TUNERS, experiment_schema
from medtpp.training.tpp import AUTO_PRETEXT, refusal

ROOT = Path(__file__).parents[1]
# Counted at 224 pixels. Only `full` depends on the size, by its positions.
ARCHITECTURES = {"ViT-Ti": "vit_tiny_patch16_224", "ViT-S": "vit_small_patch16_224"}
METHODS = {"tuner": TUNERS, "pretext": PRETEXTS, "task": TASKS}

INTRODUCTION = """# The experiment file

<!-- Written by docs/generate.py: do not edit. -->

`medtpp init DATA -o experiment.yaml` writes this file with every field filled in and explained. A field that is left
out has its default; only `data.path` must be given. A field that does not exist is an error, and all mistakes are
reported together. Paths are taken from the current folder, or from the file's own folder where they exist there alone.

```yaml
data:
  path: data/
  modality: xray
tuner: ssf            # short for `tuner: {name: ssf}`
finetune:
  steps: 500
```

On the command line, `--set` overrides a field of the file, and works without a file too:

```bash
medtpp run experiment.yaml --out runs/small --set tuner.rank=4 --set data.labels=100
medtpp run data/ --out runs/prompts --set tuner=vpt_deep --set tuner.prompts=16
medtpp check data/ --set 'data.exclude=["images/17.png", "*_copy.png"]'
```

A tuner's options go with the tuner: naming another one with `--set tuner.name=...` drops the options of the file's. The
same holds for pretext tasks.
"""

# What the fields' own descriptions do not say.
PROSE = {
    "seed": "The root of every random draw: the split, the labels drawn, initial parameters, order, masks, crops.",
    "data": "See [data](data.md).",
    "backbone": "See [backbones](backbones.md).",
    "tpp": "The pretext stage. `auto`: 40 passes over the images, within 200 to 2,000 steps; batches of 64, or of all "
    "images where there are fewer, smaller for images of more than 196 patches; a resume file ten times. Both learning "
    "rates are peaks. See [TPP](tpp.md).",
    "finetune": "The supervised stage. `auto`: 30 passes over the training cases, within 200 to 2,000 steps; batches "
    "of 32, or of all cases where there are fewer; a resume file ten times, a validation twenty times. With masks 60 "
    "passes, within 600 to 3,000 steps, in batches of up to 16 that hold at most 2^20 voxels.",
    "hardware": "`auto` takes CUDA, Apple's MPS or the CPU, in this order, and bfloat16 where the processor has it "
    "built in; `medtpp doctor` shows the choice. Evaluation is always in float32. A run may be "
    "resumed with other values, on another machine.",
    "logging": "Every stage writes `log.csv`. MLflow and Weights & Biases need `pip install 'medtpp[mlflow]'` or "
    "`'medtpp[wandb]'`; the latter sends what it logs to its server.",
    "tuner": "One of the following, chosen by `name`.",
    "pretext": "One of the following, chosen by `name`. `auto`, the default, follows what the backbone was pre-trained "
    f"for: {AUTO_PRETEXT} Options that are given without a name go to the task that it chooses. The choice is shown, "
    "and written into the run's `experiment.yaml`. See [TPP](tpp.md#which-pretext-task).",
    "task": "One of the following, chosen by `name`. `auto`, the default, is segmentation where there are masks and no "
    "labels, and classification where there are labels and no masks. See [masks and volumes](segmentation.md).",
}


# The same for single fields; a description in the code goes before.


def experiment_page() -> str:
    """The text of docs/experiment.md."""
    schema = experiment_schema()
    parts = [INTRODUCTION]
    for name, field in schema.model_fields.items():
        parts.append(f"## `{name}`\n\n{textwrap.fill(PROSE[name], 120, break_on_hyphens=False)}\n")
        if name in METHODS:
            for method, entry in METHODS[name].items():
                default = ", the default" if method == field.get_default(call_default_factory=True).name else ""
                parts.append(f"### `{name}.name: {method}`{default}\n\n{_sentence(entry.summary)}\n")
                parts.append(_fields(entry.Options, without=("name",)) or "No options.\n")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts.append(_fields(field.annotation))
        else:
            parts.append(f"{_values(field).capitalize()}; default `{field.default}`.\n")
    return "\n".join(parts)


def tuner_table() -> str:
    """Tuners with their number of target parameters, counted on networks with random weights."""
    rows = [["tuner", "what it trains", *ARCHITECTURES, "merges"]]
    for name, entry in TUNERS.items():
        counts = [_count(architecture, name) for architecture in ARCHITECTURES.values()]
        rows.append([f"`{name}`", _linked(entry.summary), *counts, "yes" if entry.merges else "no"])
    return _table(rows, right=(2, 3))


def pretext_table() -> str:
    """Pretext tasks."""
    rows = [["pretext task", "what it does"]]
    return _table(rows + [[f"`{name}`", _linked(entry.summary)] for name, entry in PRETEXTS.items()])


def backbone_table() -> str:
    """Families of backbones, each with a name."""
    rows = [["for example", "what there is"]]
    return _table(rows + [[f"`{family.examples[0]}`", family.summary] for _, family in BACKBONES.items()])


def exceptions() -> str:
    """The pairs of tuner and pretext task that TPP refuses, and what does not go with each kind of backbone."""
    found: dict[str, list[str]] = {}
    for tuner in TUNERS.names():
        for name, pretext in PRETEXTS.items():
            reason = refusal(tuner, pretext.needs)
            if reason:
                found.setdefault(reason, []).append(f"`{name}`")
    lines = [
        f"- {reason}: not with {'any task' if len(tasks) == len(PRETEXTS.names()) else ', '.join(tasks)}"
        for reason, tasks in found.items()
    ]
    lacking: dict[tuple[str, str], list[str]] = {}
    every = frozenset.intersection(*backbones.kinds().values())
    for name, method in (*TUNERS.items(), *PRETEXTS.items()):
        without = [kind for kind, capabilities in backbones.kinds().items() if not method.needs <= capabilities]
        if without:
            words = backbones.describe_lacking(method.needs, every)
            lacking.setdefault((words, ", ".join(without)), []).append(f"`{name}`")
    lines += [
        f"- {', '.join(names)} need{'s' if len(names) == 1 else ''} {words}: not with {kinds}"
        for (words, kinds), names in lacking.items()
    ]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines) + "\n"


def readme(text: str) -> str:
    """README.md with its tables, each between `<!-- name -->` and `<!-- end -->`, as the code has them now."""
    tables = {
        "tuners": tuner_table(),
        "pretexts": pretext_table(),
        "backbones": backbone_table(),
        "exceptions": exceptions(),
    }
    for name, table in tables.items():
        block = f"<!-- {name} -->\n\n{table}\n<!-- end -->".replace("\\", r"\\")
        text, found = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md has {found} places for the table of {name}")
    return text


def _fields(model: type[BaseModel], without: tuple[str, ...] = ()) -> str:
    rows = [[f"`{name}`", *cells] for name, *cells in _rows(model) if name.rpartition(".")[2] not in without]
    return _table([["field", "values", "default", "meaning"], *rows]) if rows else ""


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[list[str]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, f"{prefix}{name}.")
        else:
            yield [prefix + name, _values(field), _default(field), field.description or ""]


def _values(field: FieldInfo) -> str:
    return ", ".join([_kind(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "a multiple of", "min_length": "at least"}
    return [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]


def _kind(annotation: Any) -> str:
    names = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
        types.NoneType: "",
        Any: "any value",
    }
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in _bounds(getattr(item, "metadata", [item]))]
        return ", ".join([_kind(arguments[0]), *inner])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return ", ".join(filter(None, map(_kind, arguments)))
    if origin is dict:
        return f"names with: {_kind(arguments[1])}"
    if origin in (list, tuple):
        return f"list of: {_kind(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{{{', '.join(f'{name}: …' for name in annotation.model_fields)}}}`"
    return names[annotation]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "none"
    if isinstance(value, tuple) and value == get_args(get_args(field.annotation)[0]):
        return "all"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


@functools.cache
def _load(architecture: str) -> Any:
    return medtpp.load(architecture, weights="random")


def _count(architecture: str, tuner: str) -> str:
    if not TUNERS.get(tuner).needs <= _load(architecture).spec.capabilities:
        return ""
    model = medtpp.attach(copy.deepcopy(_load(architecture)), tuner)
    return f"{sum(parameter.numel() for parameter in model.targets.values()):,}"


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", text)


def _sentence(text: str) -> str:
    return text[0].upper() + _linked(text[1:]) + "."


def _table(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(rows[0]))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [rows[0], rule, *rows[1:]])


if __name__ == "__main__":
    (ROOT / "docs" / "experiment.md").write_text(experiment_page(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")

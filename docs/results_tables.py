"""Tables of docs pages, made from the raw results in results/: `python docs/results_tables.py` enters them.

A block `<!-- KIND: NAME -->` ... `<!-- end -->` holds the table of kind
- `comparison` of results/NAME/comparison.json,
- `differences` of results/NAME/comparison.json,
- `gains` of all comparisons in the folder results/NAME,
- `arms` of all comparisons in the folder results/NAME,
- `segmentation` of results/NAME/evaluation.json,
- `settings` of results/NAME.json (benchmarks/tpp_defaults.py),
- `features` of results/NAME.json (benchmarks/start_features.py),
- `starts` of results/NAME.json (benchmarks/finetune_defaults.py),
- `penalties` of all files results/NAME_*.json (benchmarks/head_penalty.py),
- `contract` of results/NAME.csv (benchmarks/contract.py),
- `costs` of results/NAME.json (medtpp bench).

`tests/test_docs.py` fails while one is not current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("results.md", "bench.md", "design.md"))


def with_tables(text: str) -> str:
    """The text of a page with its tables as results/ has them now."""

    def fill(block: re.Match[str]) -> str:
        kind, name = block.groups()
        return f"<!-- {kind}: {name} -->\n\n{_TABLES[kind](ROOT / 'results' / name)}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(_TABLES)}): (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def comparison_table(folder: Path) -> str:
    """A row for each label count and tuner, then the other arms; `linear` from results/linear, where it was run again.

    In results/comparisons the head of that arm had a fifth of the rate that it needs.
    """
    found = _read(folder / "comparison.json")
    title = found["metric_title"]
    lines = [
        f"| labels | tuner | {title}, standard | {title}, TPP | TPP - standard, points | p (Holm) | verdict |",
        "|---:|---|---|---|---|---:|---|",
    ]
    shown: set[tuple[str, str]] = set()
    for row, tuner, means in _pairs(found):
        shown |= {(mean["arm"], mean["labels"]) for mean in means}
        values = " | ".join(_value(mean) for mean in means)
        told = f"{row['p_holm']:.3f} | {row['verdict']}"
        lines.append(f"| {row['labels']} | {tuner} | {values} | {_gain(row)} | {told} |")
    alone = ROOT / "results" / "linear" / folder.name / "comparison.json"
    again = _read(alone)["means"] if alone.is_file() else []
    others = [mean for mean in found["means"] if (mean["arm"], mean["labels"]) not in shown and mean["arm"] != "linear"]
    others += again
    lines += [f"| {mean['labels']} | {mean['arm']} | {_value(mean)} | | | | |" for mean in others]
    groups = f"{found['n_patients']} patients" if found["unit"] == "patient" else f"{found['n_cases']} cases"
    return "\n".join([*lines, "", f"{len(found['seeds'])} seeds, intervals over seeds and {groups} of the test."])


def differences_table(folder: Path) -> str:
    """A row for each two arms that were compared: TPP against each other start."""
    found = _read(folder / "comparison.json")
    title, means = found["metric_title"], {(row["arm"], row["labels"]): row for row in found["means"]}
    lines = [
        f"| labels | TPP against | its {title} | TPP's | TPP - other, points | p (Holm) | verdict |",
        "|---:|---|---:|---:|---|---:|---|",
    ]
    for row in found["differences"]:
        other, its = (f"{means[row[side], row['labels']]['value']:.3f}" for side in ("baseline", "arm"))
        told = f"{_gain(row)} | {row['p_holm']:.3f} | {row['verdict']}"
        lines.append(f"| {row['labels']} | {row['baseline']} | {other} | {its} | {told} |")
    return "\n".join(lines)


def gains_table(folder: Path) -> str:
    """A row for each pair of all comparisons."""
    lines = [
        "| task | tuner | labels | AUC, standard | AUC, TPP | TPP - standard, points | verdict |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for path in sorted(folder.glob("*/comparison.json")):
        found = _read(path)
        for row, tuner, means in _pairs(found):
            values = " | ".join(f"{mean['value']:.3f}" for mean in means)
            lines.append(
                f"| `{found['data']}` | {tuner} | {row['labels']} | {values} | {_gain(row)} | {row['verdict']} |"
            )
    return "\n".join(lines)


def arms_table(folder: Path) -> str:
    """A row for each arm of some comparisons without differences."""
    comparisons = {path.parent.name: _read(path) for path in sorted(folder.glob("*/comparison.json"))}
    lines = ["| | arm | labels | mean [95% interval] |", "|---|---|---:|---|"]
    for name, found in comparisons.items():
        rows = [f"{row['arm']} | {row['labels']} | {_value(row)}" for row in found["means"]]
        lines += [f"| {name.replace('_', ' ')} | {row} |" for row in rows]
    return "\n".join(lines)


def segmentation_table(folder: Path) -> str:
    """A row for the mean of all structures, then one for each; a single one has the mean's."""
    found = _read(folder / "evaluation.json")
    lines = [f"| | Dice | HD95, {found['unit']} | NSD at {found['tolerance']:g} {found['unit']} |", "|---|---|---|---|"]
    structures = found["structures"]
    for name, its in ({"mean": found, **structures} if len(structures) > 1 else structures).items():
        values = [_value(its["metrics"][metric]) for metric in ("dice", "hd95", "nsd")]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join([*lines, "", f"{found['n_cases']} cases, 95% intervals over them."])


def settings_table(path: Path) -> str:
    """A row for each setting: gain over no TPP, seed by seed."""
    rows = _read(path.with_suffix(".json"))["rows"]
    base = {row["seed"]: row["auc"] for row in rows if row["setting"] == "no TPP"}
    lines = ["| setting | AUC | gain over no TPP, points | of each seed |", "|---|---:|---:|---|"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        its = [row for row in rows if row["setting"] == name]
        gains = [100 * (row["auc"] - base[row["seed"]]) for row in its]
        shown = f"`{name}`" if "=" in name else name
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"| {shown} | {fmean(row['auc'] for row in its):.3f} | {fmean(gains):+.1f} | {each} |")
    return "\n".join(lines)


def features_table(path: Path) -> str:
    """A row for each start: what its frozen features are worth more than the backbone's."""
    rows = pd.DataFrame(_read(path.with_suffix(".json"))["rows"])
    base = rows["auc"][rows["seed"].isna()].iloc[0]
    lines = ["| start | AUC of a probe | gain, points | of each seed | features moved by |", "|---|---:|---:|---|---:|"]
    lines.append(f"| standard | {base:.3f} | | | |")
    for start, its in rows.dropna(subset="seed").groupby("start", sort=False):
        gains = 100 * (its["auc"] - base)
        drift = its["feature_drift"].mean()
        moved = "" if pd.isna(drift) else f"{drift:.2f}"
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        name = {"lora": "tpp"}.get(str(start), str(start).split("/")[0].removeprefix("lora-"))
        lines.append(f"| {name} | {its['auc'].mean():.3f} | {gains.mean():+.1f} | {each} | {moved} |")
    return "\n".join(lines)


def starts_table(path: Path) -> str:
    """A row for each setting of fine-tuning: both starts, and what TPP gains, seed by seed."""
    rows = pd.DataFrame(_read(path.with_suffix(".json"))["rows"])
    lines = ["| setting | AUC, standard | AUC, TPP | gain, points | of each seed |", "|---|---:|---:|---:|---|"]
    for setting, its in rows.groupby("settings", sort=False):
        auc = its.pivot(index="seed", columns="start", values="auc")
        gains = 100 * (auc["tpp"] - auc["standard"])
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        shown = "<br>".join(f"`{part}`" if "=" in part else part for part in str(setting).split())
        means = f"{auc['standard'].mean():.3f} | {auc['tpp'].mean():.3f} | {gains.mean():+.1f}"
        lines.append(f"| {shown} | {means} | {each} |")
    return "\n".join(lines)


def penalties_table(path: Path) -> str:
    """A row for each number of labels of each task, a column for each strength."""
    lines: list[str] = []
    for file in sorted(path.parent.glob(f"{path.name}_*.json")):
        found = _read(file)
        means = pd.DataFrame(found["rows"]).pivot_table(index="labels", columns="strength", values="auc")
        if not lines:
            lines = [f"| task | labels | {' | '.join(f'{strength:g}' for strength in means.columns)} |"]
            lines.append(f"|---|---:|{'---:|' * len(means.columns)}")
        task = found["task"].removesuffix("-development")
        lines += [
            f"| `{task}` | {labels} | {' | '.join(f'{value:.3f}' for value in its)} |"
            for labels, its in means.iterrows()
        ]
    return "\n".join(lines)


def contract_table(path: Path) -> str:
    """A row for each tuner: combinations, tests, and how many failed."""
    rows = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
    lines = ["| tuner | kinds of backbone | pretext tasks | combinations | tests passed | failed |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for tuner, its in [*rows.groupby("tuner"), ("all", rows)]:
        kinds, tasks = its["backbone"].nunique(), its["pretext"][its["pretext"] != ""].nunique()
        counts = kinds, tasks, len(its), its["passed"].sum(), its["failed"].sum()
        lines.append(f"| {tuner} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


def costs_table(path: Path) -> str:
    """A row for each tuner: parameters, speed and memory in both stages."""
    found = _read(path.with_suffix(".json"))
    lines = ["| tuner | parameters | TPP, images/s | TPP, MiB | fine-tuning, images/s | fine-tuning, MiB |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, stages in found["tuners"].items():
        cells = [f"{next(cost['parameters'] for cost in stages.values()):,}"]
        for stage in ("tpp", "finetune"):
            cost = stages.get(stage)
            cells += ["", ""] if cost is None else [f"{cost['images_per_second']:.1f}", f"{cost['memory_mib']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _pairs(found: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[dict[str, Any]]]]:
    """Of a comparison, each difference between TPP and a tuner's own start, the tuner, and the means of both."""
    means = {(row["arm"], row["labels"]): row for row in found["means"]}
    for row in found["differences"]:
        tuner = row["arm"].split()[0]
        arms = [f"{tuner} standard", f"{tuner} tpp"]
        if [row["baseline"], row["arm"]] == arms:
            yield row, tuner, [means[arm, row["labels"]] for arm in arms]


def _gain(row: dict[str, Any]) -> str:
    return f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _value(mean: dict[str, Any]) -> str:
    return "failed" if mean["value"] is None else f"{mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"


_TABLES = {
    "comparison": comparison_table,
    "differences": differences_table,
    "gains": gains_table,
    "arms": arms_table,
    "segmentation": segmentation_table,
    "settings": settings_table,
    "features": features_table,
    "starts": starts_table,
    "penalties": penalties_table,
    "contract": contract_table,
    "costs": costs_table,
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")

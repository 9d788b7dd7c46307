"""Tables of docs/results.md, made from the raw results in results/: `python docs/results_tables.py` enters them.

A block `<!-- KIND: NAME -->` ... `<!-- end -->` holds the table of kind `comparison` of results/NAME/comparison.json,
of kind `arms` of all comparisons in the folder results/NAME, of kind `segmentation` of results/NAME/evaluation.json, of
kind `settings` of results/NAME.json (benchmarks/tpp_defaults.py). `tests/test_docs.py` fails while one is not current.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
_BLOCK = re.compile(r"<!-- (comparison|arms|segmentation|settings): (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def results_page(text: str) -> str:
    """The text of docs/results.md with its tables as results/ has them now."""

    def fill(block: re.Match[str]) -> str:
        kind, name = block.groups()
        path = ROOT / "results" / name
        if kind == "arms":
            table = arms_table({file.parent.name: _read(file) for file in sorted(path.glob("*/comparison.json"))})
        elif kind == "comparison":
            table = comparison_table(_read(path / "comparison.json"))
        elif kind == "segmentation":
            table = segmentation_table(_read(path / "evaluation.json"))
        else:
            table = settings_table(_read(path.with_suffix(".json")))
        return f"<!-- {kind}: {name} -->\n\n{table}\n\n<!-- end -->"

    return _BLOCK.sub(fill, text)


def comparison_table(found: dict[str, Any]) -> str:
    """A row for each label count and tuner, then the other arms."""
    means = {(row["arm"], row["labels"]): row for row in found["means"]}
    title, points = found["metric_title"], 100
    lines = [
        f"| labels | tuner | {title}, standard | {title}, TPP | TPP - standard, points | p (Holm) | verdict |",
        "|---:|---|---|---|---|---:|---|",
    ]
    shown: set[tuple[str, str]] = set()
    for row in found["differences"]:
        tuner, labels = row["arm"].split()[0], row["labels"]
        arms = f"{tuner} standard", f"{tuner} tpp"
        if (row["baseline"], row["arm"]) != arms:
            continue
        shown |= {(arm, labels) for arm in arms}
        values = [_value(means[arm, labels]) for arm in arms]
        gap = f"{points * row['value']:+.1f} [{points * row['low']:+.1f}, {points * row['high']:+.1f}]"
        lines.append(f"| {labels} | {tuner} | {' | '.join(values)} | {gap} | {row['p_holm']:.3f} | {row['verdict']} |")
    for (arm, labels), mean in means.items():
        if (arm, labels) not in shown:
            lines.append(f"| {labels} | {arm} | {_value(mean)} | | | | |")
    groups = f"{found['n_patients']} patients" if found["unit"] == "patient" else f"{found['n_cases']} cases"
    return "\n".join([*lines, "", f"{len(found['seeds'])} seeds, intervals over seeds and {groups} of the test."])


def arms_table(comparisons: dict[str, dict[str, Any]]) -> str:
    """A row for each arm of some comparisons without differences."""
    lines = ["| | arm | labels | mean [95% interval] |", "|---|---|---:|---|"]
    for name, found in comparisons.items():
        rows = [f"{row['arm']} | {row['labels']} | {_value(row)}" for row in found["means"]]
        lines += [f"| {name.replace('_', ' ')} | {row} |" for row in rows]
    return "\n".join(lines)


def segmentation_table(found: dict[str, Any]) -> str:
    """A row for the mean of all structures, then one for each."""
    lines = [f"| | Dice | HD95, {found['unit']} | NSD at {found['tolerance']:g} {found['unit']} |", "|---|---|---|---|"]
    for name, its in {"mean": found, **found["structures"]}.items():
        values = [_value(its["metrics"][metric]) for metric in ("dice", "hd95", "nsd")]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join([*lines, "", f"{found['n_cases']} cases, 95% intervals over them."])


def settings_table(found: dict[str, Any]) -> str:
    """A row for each setting: gain over no TPP, seed by seed."""
    rows = found["rows"]
    base = {row["seed"]: row["auc"] for row in rows if row["setting"] == "no TPP"}
    lines = ["| setting | AUC | gain over no TPP, points | of each seed |", "|---|---:|---:|---|"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        its = [row for row in rows if row["setting"] == name]
        gains = [100 * (row["auc"] - base[row["seed"]]) for row in its]
        shown = f"`{name}`" if "=" in name else name
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"| {shown} | {fmean(row['auc'] for row in its):.3f} | {fmean(gains):+.1f} | {each} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _value(mean: dict[str, Any]) -> str:
    return "failed" if mean["value"] is None else f"{mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"


if __name__ == "__main__":
    PAGE.write_text(results_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

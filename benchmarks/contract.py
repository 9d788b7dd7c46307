"""The whole contract matrix: every tuner x pretext task x kind of backbone, and what became of each.

    python benchmarks/contract.py --out results/contract.csv [--processes 2] [--only lora]

Runs all of `tests/test_matrix.py`, of which `make test` runs a cover of pairs, and writes a row for each combination:
tests passed and failed, and their seconds. Combinations without sense are refused when they are configured, with the
reason, and have no row (`medtpp list matrix` shows them).
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIELDS = ("pretext", "tuner", "backbone", "passed", "failed", "seconds")


class Cells:
    """A pytest plugin that counts results by the parameters of a test, [pretext-]tuner-backbone."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, ...], int] = defaultdict(int)
        self.failed: dict[tuple[str, ...], int] = defaultdict(int)
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test: set-up, call, clean-up."""
        name = report.nodeid.rpartition("[")[2].removesuffix("]")
        parts = tuple(name.split("-"))
        if "[" not in report.nodeid or len(parts) not in (2, 3):
            return
        cell = parts if len(parts) == 3 else ("", *parts)
        self.seconds[cell] += report.duration
        if report.failed:
            self.failed[cell] += 1
        elif report.passed and report.when == "call":
            self.passed[cell] += 1

    def rows(self) -> list[dict[str, object]]:
        """A row for each combination, sorted."""
        cells = sorted(self.seconds)
        return [
            dict(
                zip(
                    FIELDS,
                    (*cell, self.passed[cell], self.failed[cell], round(self.seconds[cell], 2)),
                    strict=True,
                )
            )
            for cell in cells
            if self.passed[cell] or self.failed[cell]
        ]


def main() -> None:
    """Run the matrix and write the table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import pytest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="a part of the names, as pytest's -k takes it")
    options = parser.parse_args()
    cells = Cells()
    arguments = [str(ROOT / "tests" / "test_matrix.py"), "-m", "slow or not slow", "-p", "no:cacheprovider"]
    arguments += ["-n", str(options.processes)] + (["-k", options.only] if options.only else [])
    status = pytest.main(arguments, plugins=[cells])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(cells.rows())
    print(f"{len(cells.rows())} combinations, {sum(map(bool, cells.failed.values()))} with failures")
    sys.exit(status)


if __name__ == "__main__":
    main()

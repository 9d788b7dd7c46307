"""The whole contract matrix: every tuner x pretext task x kind of backbone, and what became of each.

    python benchmarks/contract.py --out results/contract.csv [--processes 2]

Runs all of `tests/test_matrix.py` and `tests/test_matrix_resume.py`, of which `make test` runs a cover, one kind of
backbone after another, and writes a row for each combination: tests passed and failed, and their seconds. A file that
is there is gone on with: kinds that it has are not run again. Combinations without sense are refused when they are
configured, with the reason, and have no row (`medtpp list matrix` shows them).
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
TESTS = tuple(str(ROOT / "tests" / name) for name in ("test_matrix.py", "test_matrix_resume.py"))
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
    sys.path.insert(0, str(ROOT / "tests"))
    import pytest

    import matrix  # type: ignore[import-not-found]  # of the tests

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    if options.out.is_file():
        with options.out.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for variant in (*matrix.VARIANTS, *matrix.VOLUMES):
        if any(row["backbone"] == variant for row in rows):
            continue
        longer = [name for name in matrix.VARIANTS if variant in name and name != variant]
        chosen = " and ".join([variant, *(f"not {name}" for name in longer)])
        cells = Cells()
        arguments = [*TESTS, "-m", "slow or not slow", "-p", "no:cacheprovider"]
        status = pytest.main([*arguments, "-n", str(options.processes), "-k", chosen], plugins=[cells])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(status)
        rows += cells.rows()
        with options.out.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    failed = [row for row in rows if int(str(row["failed"]))]
    print(f"{len(rows)} combinations, {len(failed)} with failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

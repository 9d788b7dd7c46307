"""Reading and writing tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from medtpp.errors import DataError

_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class RawTable:
    """The cells of a CSV file.

    Attributes:
        lines: (n,) where each row starts in the file.
        header: (c,) names of the columns.
        rows: (n,) of c cells each.
    """

    lines: list[int]
    header: list[str]
    rows: list[list[str]]


class UnixLines:
    """Ends rows with a line feed alone.

    `csv.writer` quotes the characters of its own line end only: told to end rows so, it would leave a carriage return
    in a file name unquoted, and the file unreadable.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, row: str) -> int:
        """Write one row as `csv.writer` makes it."""
        return self.stream.write(row.removesuffix("\r\n") + "\n")


def read_table(path: Path, kind: str, find_header_problems: Callable[[Sequence[str]], list[str]]) -> RawTable:
    """Read a CSV file of at least one row, in which every row is as long as the header.

    Args:
        path: The file.
        kind: What it holds, in the plural, for messages: "predictions".
        find_header_problems: What is wrong with the names of the columns.

    Raises:
        DataError: The file is missing or malformed; all problems are listed by line and column.
    """
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        # Spreadsheet programs put a byte-order mark in front.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            if problems := find_header_problems(header):
                raise invalid_table(path, kind, [f"line 1, {problem}" for problem in problems])
            last = reader.line_num
            for cells in reader:
                if cells:
                    lines.append(last + 1)
                    rows.append(cells)
                last = reader.line_num
    except OSError as error:
        raise DataError(f"Cannot read the {kind} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text. Save it as CSV in UTF-8.") from error
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. Write it as plain comma-separated values."
        ) from error
    wrong = [
        f"line {line}, column {header[len(cells)] if len(cells) < len(header) else len(header) + 1}: "
        f"{len(cells)} cells instead of {len(header)}"
        for line, cells in zip(lines, rows, strict=True)
        if len(cells) != len(header)
    ]
    if wrong or not rows:
        raise invalid_table(path, kind, wrong or ["it has no rows"])
    return RawTable(lines, header, rows)


def invalid_table(path: Path, kind: str, problems: Sequence[str]) -> DataError:
    """The error that lists the problems of a file."""
    return DataError(f"{path} is not a valid table of {kind}.", shortened(problems))


def shortened(problems: Sequence[str]) -> list[str]:
    """The first 20 problems, and how many more there are."""
    more = len(problems) - _MOST_PROBLEMS
    return list(problems[:_MOST_PROBLEMS]) + ([f"and {more} more"] if more > 0 else [])

"""The words in which problems of a data set are told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Sized
from itertools import islice

from medtpp.data.case import Problem


def error(code: str, text: str, cases: Iterable[str] = ()) -> Problem:
    """Something that stops a run; see `Problem`."""
    return Problem("error", code, text, tuple(cases))


def warning(code: str, text: str, cases: Iterable[str] = ()) -> Problem:
    """Something that is shown; see `Problem`."""
    return Problem("warning", code, text, tuple(cases))


def count(items: Sized | int, noun: str) -> str:
    """How many, such as "1 image" and "2 images"."""
    return f"{_number(items)} {noun}{agree(items, '', 's')}"


def agree(items: Sized | int, one: str, several: str) -> str:
    """The word that goes with a number of items, such as "is" or "are"."""
    return one if _number(items) == 1 else several


def _number(items: Sized | int) -> int:
    return items if isinstance(items, int) else len(items)


def first_few(items: Iterable[object], limit: int = 5) -> str:
    """The first items as text with the number of the rest: "a, b and 7 more"."""
    rest = iter(items)
    text = ", ".join(str(item) for item in islice(rest, limit))
    left = sum(1 for _ in rest)
    return f"{text} and {left} more" if left else text


def listed(items: Iterable[object], limit: int) -> str:
    """The first items and the number of the rest, each on a line of its own."""
    rest = [str(item) for item in items]
    lines = rest[:limit] + ([f"and {len(rest) - limit} more"] if len(rest) > limit else [])
    return "\n".join(f"- {line}" for line in lines)


def exclude_option(ids: Sequence[str]) -> str:
    """The option that leaves some cases out; where they are many, its form with the first."""
    shown = json.dumps(list(ids) if len(ids) <= 10 else [*ids[:2], "..."], ensure_ascii=False)
    return f"--set 'data.exclude={shown}'"

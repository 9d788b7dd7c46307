"""From sections to one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

NONE = "–"
_FINEST = 0.001  # differences are shown with three digits


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def whole(value: float | None) -> str:
    """A whole number with thousands set apart."""
    return NONE if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str, many: str = "") -> str:
    """A count and its noun: 1 case, 2 cases."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


@dataclass(frozen=True)
class Scale:
    """An axis for the small horizontal plots in table rows, which stretch with the page.

    Attributes:
        low, high: What the ends stand for.
        ticks: Values to mark.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> str:
        """Where a value is, in per cent of the width; the ends are a little inside, so that marks are not cut."""
        share = (value - self.low) / (self.high - self.low)
        return f"{2.5 + 95 * min(1.0, max(0.0, share)):.2f}%"

    def span(self, low: float, high: float) -> str:
        """The width from one value to another, in per cent."""
        return f"{float(self.at(high)[:-1]) - float(self.at(low)[:-1]):.2f}%"

    def label(self, tick: float) -> str:
        """A tick's value, as short as it can be."""
        return f"{tick:g}".replace("-", "−")


UNIT = Scale(0, 1, (0, 0.25, 0.5, 0.75, 1))


def scale_over(values: Iterable[float]) -> Scale:
    """A scale that holds all the values."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < _FINEST:
        low, high = low - _FINEST, high + _FINEST
    located = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    ticks = (np.round(located, 10) + 0.0).tolist()  # no -0
    return Scale(ticks[0], ticks[-1], tuple(ticks))


def render(template: str, **context: object) -> str:
    """A page from a template and what it shows."""
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    # The page may load nothing and run this one script: a class name that got through as HTML could do no harm.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = _environment().get_template(template)
    return page.render(
        **context,
        style=Markup(style),
        script=Markup(script),
        script_hash=script_hash,
    )


def _asset(name: str) -> str:
    return (files("medtpp.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("medtpp.report"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    filters = {one.__name__: one for one in (number, signed, percent, whole, duration, plural)}
    environment.filters.update(filters)
    return environment

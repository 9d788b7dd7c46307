"""Plots as inline SVG that takes its colours and its font from the page.

A plot is drawn with placeholder colours, which become CSS variables: it follows the reader's light or dark ground
without being drawn twice. No text of the user is drawn (names are in HTML legends), so that nothing has to be escaped,
long names wrap, and a `$` in a name starts no formula. Names of arms, which are the code's own, may stand in a plot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, GROUND = "#010101", "#010102", "#010103", "#010104"
COLOURS = 8  # as many as style.css has
_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--line", GROUND: "--ground"} | {
    f"#02020{number}": f"--series-{number}" for number in range(COLOURS)
}
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RC: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Series:
    """How the line with a number looks: a colour, and a dash and a marker for who cannot tell the colours apart.

    Attributes:
        number: From 0 on; the key of `data-series` in the page.
        name: For the legend.
    """

    number: int
    name: str

    @property
    def colour(self) -> str:
        """The placeholder in plots."""
        return f"#02020{self.number % COLOURS}"

    @property
    def variable(self) -> str:
        """The CSS variable in the page."""
        return f"--series-{self.number % COLOURS}"

    @property
    def dashes(self) -> tuple[float, ...]:
        """Lengths of dash and gap in line widths; () for a solid line. Another round of colours has other dashes."""
        return _DASHES[(self.number + self.number // COLOURS) % len(_DASHES)]

    @property
    def dash_array(self) -> str:
        """The same for SVG, at the width of the legend's lines."""
        return " ".join(f"{2 * length:g}" for length in self.dashes) or "none"

    @property
    def marker(self) -> str:
        """Of matplotlib."""
        return _MARKERS[self.number % len(_MARKERS)]

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "solid", "gid": self.gid}

    @property
    def gid(self) -> str:
        """What becomes `data-series` in the page."""
        return f"series-{self.number}"


@contextmanager
def plotting() -> Iterator[None]:
    """The look of all plots."""
    with mpl.rc_context(_RC):
        yield


def panels(rows: int = 1, width: float = 4.6, height: float = 2.7, ratios: tuple[float, ...] | None = None) -> Any:
    """A figure and its axes, one above the other on the same x; sizes in inches, small enough to be read on a phone."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    return figure, list(axes)


def square(axes: Axes) -> None:
    """Both axes from 0 to 1, at the same scale."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)


def to_svg(figure: Figure, key: str) -> Markup:
    """A figure as an SVG element to stand in a page.

    Args:
        figure: Drawn inside `plotting`.
        key: Unique in the page; goes before all ids.
    """
    stream = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": key}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="--width: \2" aria-hidden="true"', text)
    text = re.sub(r' ?font-family: [^;"]*;?', "", text)
    text = re.sub(r'id="series-(\d+)"', r'data-series="\1"', text)
    text = re.sub(r' id="(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|\w*Collection)_\d+"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    for placeholder, variable in _COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))

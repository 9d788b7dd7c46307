"""What a person sees of training: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A context that shows steps, loss, images per second, share of time waiting for data, and time left.

    Args:
        title: What is being trained.
        start, total: First step and number of steps.
        visible: False on all processes but the first.
    """

    def __init__(self, title: str, start: int, total: int, *, visible: bool = True) -> None:
        self.title, self.start, self.total, self.visible = title, start, total, visible
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.began = time.monotonic()
        self.next_line = start + self._interval()

    def _interval(self) -> int:
        return max(1, self.total // 5)

    def __enter__(self) -> Self:
        if self.visible and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Show that `step` steps are done; `row` holds the newest figures, where there are new ones."""
        if not self.visible:
            return
        if self.bar is not None:
            if row is not None:
                self.bar.update(self.task, figures=_figures(row))
            self.bar.update(self.task, completed=step)
        elif row is not None and (step >= self.next_line or step == self.total):
            left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
            self.console.print(
                f"{self.title}: step {step}/{self.total}, {_figures(row)}, {left / 60:.1f} min left", highlight=False
            )
            self.next_line = step + self._interval()


def _figures(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s, data {row['waiting']:.0%}"

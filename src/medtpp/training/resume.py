"""What a killed run leaves behind, and what a finished one tells."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medtpp.errors import WeightsError
from medtpp.files import atomic, write_text

RESUME = "resume.pt"
LOG = "log.csv"


@dataclass
class Record:
    """What training told.

    Attributes:
        rows: The log, one row for each logged step.
        best: Best validation score with its step, or None.
        seconds: Of training, with the warm-up of heads and what a resumed run did before its last checkpoint.
        images_per_second: Over all steps of this process's run.
        waiting: Share of the time spent waiting for data.
        peak_memory: MiB, see `PeakMemory`.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, int] | None = None
    seconds: float = 0.0
    images_per_second: float = 0.0
    waiting: float = 0.0
    peak_memory: float = 0.0

    def without_gain(self, name: str, step: int) -> int:
        """How many scores of this name there were since the best one, with that of `step`, which has no row yet."""
        if self.best is None or self.best[1] == step:
            return 0
        return 1 + sum(name in row and row["step"] > self.best[1] for row in self.rows)


class RunState:
    """What a resume file holds: trained parameters, buffers, optimiser, best parameters so far, the log."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: Any, buffers: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.buffers = dict(buffers)
        self.best: dict[str, Tensor] | None = None

    def keep_best(self, score: float, step: int, record: Record) -> None:
        """Remember the parameters if this score is the best so far."""
        if record.best is None or score > record.best[0]:
            record.best = (score, step)
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore_best(self, record: Record) -> None:
        """Put the best parameters back, where there was a validation."""
        if self.best is not None and record.best is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])

    def save(self, path: Path, step: int, record: Record, fabric: Fabric) -> None:
        """Write the resume file after `step` steps."""
        if fabric.global_rank:
            return
        with atomic(path) as temporary:
            torch.save(
                {
                    "step": step,
                    "parameters": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
                    "buffers": {name: buffer.cpu() for name, buffer in self.buffers.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "precision": fabric.strategy.precision.state_dict(),  # the scale of 16-bit gradients
                    "best": self.best,
                    "record": {"rows": record.rows, "best": record.best, "seconds": record.seconds},
                },
                temporary,
            )

    def resume(self, path: Path, record: Record, fabric: Fabric) -> int:
        """Take up a resume file. Gives the steps already done, 0 without a file.

        Raises:
            WeightsError: The file is broken or of another experiment.
        """
        if not path.is_file():
            return 0
        try:
            saved = torch.load(path, map_location=fabric.device, weights_only=True)
            keys = ("step", "parameters", "buffers", "optimizer", "precision", "best")
            step, parameters, buffers, optimizer, precision, best = (saved[key] for key in keys)
            rows, best_score, seconds = (saved["record"][name] for name in ("rows", "best", "seconds"))
            shapes = {name: value.shape for name, value in (parameters | buffers).items()}
        except Exception as error:  # torch raises whatever the broken bytes lead to
            raise WeightsError(
                f"{path} cannot be read ({type(error).__name__}). Delete it to begin this stage anew."
            ) from error
        own = {**self.parameters, **self.buffers}
        if shapes != {name: value.shape for name, value in own.items()}:
            raise WeightsError(f"{path} is of another experiment. Start anew with --overwrite.")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_((parameters | buffers)[name])
        self.optimizer.load_state_dict(optimizer)
        fabric.strategy.precision.load_state_dict(precision)
        self.best = best
        record.rows = list(rows)
        record.best = best_score
        record.seconds = seconds
        return int(step)


def finish(folder: Path) -> None:
    """Remove the resume file of a stage whose results are written."""
    (folder / RESUME).unlink(missing_ok=True)


def write_log(folder: Path, record: Record, fabric: Fabric) -> None:
    """Write `log.csv`, a column for every value that was logged."""
    if fabric.global_rank:
        return
    columns = list(dict.fromkeys(key for row in record.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record.rows)
    write_text(folder / LOG, text.getvalue())

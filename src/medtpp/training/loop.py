"""The one training loop: AdamW on parameter groups, warm-up and cosine in steps, resumable, on any device.

What a stage trains is a module whose forward gives a loss; what it sees is a stream of batches that are a pure function
of the step. So nothing but parameters and optimiser state has to be remembered to resume in the same bits, and
micro-batches after an out-of-memory error compute the same average gradient.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medtpp.data.batches import Batch
from medtpp.errors import MedtppError
from medtpp.training.memory import PeakMemory
from medtpp.training.progress import TrainingProgress
from medtpp.training.resume import RESUME, Record, RunState, write_log
from medtpp.training.thin import exact_thin_convolutions


class Stream(Protocol):
    """Batches by step; `BatchStream` is one."""

    waited: float

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps start .. stop - 1."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: "tuner", "head" or "pretext".

    Attributes:
        name: For the log.
        parameters: By name; the names are those of the resume file.
        learning_rate: At its peak.
        weight_decay: AdamW's.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Hooks:
    """What a method needs of the loop beside its gradients.

    Attributes:
        after_step: Called with (steps done, steps in all) after each step, while its gradients are there.
        buffers: Gives what training changes beside the parameters, in place; a resumed run finds it.
        divisible: Whether a batch may be computed in parts: not where its images are compared with each other.
    """

    after_step: Callable[[int, int], None] | None = None
    buffers: Callable[[], Mapping[str, Tensor]] = dict
    divisible: bool = True


@dataclass(frozen=True)
class Schedule:
    """How long and how the loop trains; all numbers are optimiser steps.

    Attributes:
        steps: In all.
        warmup: Share of the steps in which the learning rate rises linearly; a cosine to zero follows.
        accumulate: Micro-batches per step.
        clip: Largest norm of the gradient, 0 for none.
        checkpoint_every: Steps between resume files, 0 for none.
        validate_every: Steps between validations.
        patience: Validations in a row without gain after which training ends, 0 for none.
    """

    steps: int
    warmup: float = 0.1
    accumulate: int = 1
    clip: float = 1.0
    checkpoint_every: int = 0
    validate_every: int = 0
    patience: int = 0

    def factor(self, step: int) -> float:
        """Learning rate of step (from 0) as a share of its peak."""
        warmup = max(1, round(self.steps * self.warmup))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def fit(
    fabric: Fabric,
    module: nn.Module,
    groups: Sequence[Group],
    stream: Stream,
    schedule: Schedule,
    *,
    folder: Path | None = None,
    title: str = "training",
    hooks: Hooks | None = None,
    validate: Callable[[], float] | None = None,
    score_name: str = "validation",
    choose: bool = True,
    spent: float = 0.0,
) -> Record:
    """Train the parameters of `groups`.

    Args:
        fabric: Launched. Its loggers get every row.
        module: Called with (images, targets, visits) of a batch; gives (loss, values to log).
        groups: What to train. Nothing else may require gradients.
        stream: The batches.
        schedule: Steps and learning rates.
        folder: For `log.csv` and the resume file; nothing is written without. A resume file found there is taken up.
        title: For the progress display.
        hooks: What the method needs beside.
        validate: Gives a score, higher is better. It may draw from no random stream.
        score_name: Of the score, in the log.
        choose: The parameters of the best score are kept in the end; else scores are logged, and the last ones kept.
        spent: Seconds that heads took to warm up or to be fitted; they count.

    Raises:
        MedtppError: The loss is not finite, or a parameter gets no gradient in two steps.
    """
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters.values()), "lr": 0.0, "weight_decay": g.weight_decay} for g in groups],
        betas=(0.9, 0.999),
    )
    model, wrapped = fabric.setup(module, optimizer)
    wrapped.zero_grad()  # of gradients that a user's script left
    hooks = hooks or Hooks()
    state = RunState(parameters, wrapped, hooks.buffers())  # after `setup`, which moves buffers to new places
    record = Record(seconds=spent)
    start = state.resume(folder / RESUME, record, fabric) if folder else 0
    reached: set[str] = set()
    taken = 2 if start else 0  # of the first two steps, after which every parameter must have had a gradient
    micro, before = schedule.accumulate, record.seconds
    began, seen, waited_before, memory = time.perf_counter(), 0, stream.waited, PeakMemory(fabric.device)
    every = max(1, schedule.steps // 200)
    recent = _Window(stream)
    shown = TrainingProgress(title, start, schedule.steps, visible=fabric.global_rank == 0)
    with exact_thin_convolutions(module), shown as progress:
        for step, batch in enumerate(stream.iterate(start, schedule.steps), start=start):
            for group, options in zip(groups, wrapped.param_groups, strict=True):
                options["lr"] = group.learning_rate * schedule.factor(step)
            loss, logs, micro = _backward(fabric, model, wrapped, batch, micro, hooks.divisible)
            norm = (
                fabric.clip_gradients(module, wrapped, max_norm=schedule.clip, error_if_nonfinite=False)
                if schedule.clip
                else None
            )
            # A gradient scaler (16 bits) leaves out steps whose gradient overflows: they do not count.
            if taken < 2 and (norm is None or bool(norm.isfinite())):
                taken += 1
                reached |= {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
                if taken == 2:
                    _check_reached(parameters, reached)
            wrapped.step()
            if hooks.after_step:
                hooks.after_step(step + 1, schedule.steps)
            wrapped.zero_grad()
            seen += len(batch) * fabric.world_size
            recent.count(len(batch) * fabric.world_size)
            row, ends = None, False
            done = step + 1
            if done % every == 0 or done == schedule.steps:
                row = {"step": done, "loss": _finite(fabric, loss, done), **recent.figures()}
                row |= {f"lr_{group.name}": group.learning_rate * schedule.factor(step) for group in groups}
                row |= {key: float(value) for key, value in logs.items()}
                if norm is not None:
                    row["gradient_norm"] = float(norm)
            if validate and (done % schedule.validate_every == 0 or done == schedule.steps):
                score = validate()
                row = (row or {"step": done, "loss": _finite(fabric, loss, done), **recent.figures()}) | {
                    score_name: score
                }
                if choose:
                    state.keep_best(score, done, record)
                ends = 0 < schedule.patience <= record.without_gain(score_name, done)
            if row is not None:
                record.rows.append(row)
                fabric.log_dict({key: value for key, value in row.items() if key != "step"}, step=done)
            progress.update(done, row)
            if ends:  # before a resume file is written, from which training would go on
                break
            if folder and schedule.checkpoint_every and done % schedule.checkpoint_every == 0 and done < schedule.steps:
                record.seconds = before + time.perf_counter() - began
                _check_finite(parameters, done)  # or every resumed run would begin with what is broken
                state.save(folder / RESUME, done, record, fabric)
                write_log(folder, record, fabric)
    state.restore_best(record)
    _check_finite(parameters, schedule.steps)
    took = max(time.perf_counter() - began, 1e-9)
    record.seconds = before + took
    record.images_per_second = seen / took
    record.waiting = (stream.waited - waited_before) / took
    record.peak_memory = memory.mib()
    if folder:
        write_log(folder, record, fabric)
    return record


def _backward(
    fabric: Fabric, model: Any, optimizer: Any, batch: Batch, micro: int, divisible: bool
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Gradients of one step in `micro` equal parts; twice as many parts when memory runs out, if it may have parts."""
    batch = batch.to(fabric.device)
    while True:
        try:
            total = torch.zeros((), device=fabric.device)
            logs: dict[str, Tensor] = {}
            parts = _parts(len(batch), micro)
            for index, rows in enumerate(parts):
                share = (rows.stop - rows.start) / len(batch)
                targets = None if batch.targets is None else batch.targets[rows]
                with fabric.no_backward_sync(model, enabled=index < len(parts) - 1):
                    loss, part_logs = model(batch.images[rows], targets, batch.draws[rows].visits)
                    fabric.backward(loss * share)
                total += loss.detach() * share
                logs = {key: logs.get(key, 0) + value.detach() * share for key, value in part_logs.items()}
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or micro >= len(batch) or fabric.world_size > 1:
                raise
            if not divisible:
                raise MedtppError(
                    "Out of memory, and this pretext task compares the images of a batch with each other, so that a "
                    f"batch cannot be computed in parts. Lower tpp.batch_size (now {len(batch)})."
                ) from error
            optimizer.zero_grad()
            micro *= 2
            if fabric.device.type == "cuda":
                torch.cuda.empty_cache()
            fabric.print(f"Out of memory: going on with {micro} micro-batches per step (the same gradient).")
        else:
            return total, logs, micro


def _parts(size: int, count: int) -> list[slice]:
    count = min(count, size)
    bounds = [round(index * size / count) for index in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _finite(fabric: Fabric, loss: Tensor, step: int) -> float:
    value = float(fabric.all_reduce(loss, reduce_op="mean"))
    if not math.isfinite(value):
        raise MedtppError(
            f"The loss is {value} at step {step}. Lower the learning rate, or compute in float32 "
            "(--set hardware.precision=32); if it stays, look for broken images with `medtpp check`."
        )
    return value


def _check_finite(parameters: dict[str, nn.Parameter], step: int) -> None:
    broken = [name for name, parameter in parameters.items() if not bool(parameter.isfinite().all())]
    if broken:
        raise MedtppError(
            f"{len(broken)} parameters are not finite after step {step}. Lower the learning rate, or compute in "
            "float32 (--set hardware.precision=32).",
            broken[:5],
        )


def _check_reached(parameters: dict[str, nn.Parameter], reached: set[str]) -> None:
    unreached = sorted(parameters.keys() - reached)
    if unreached:
        raise MedtppError(
            "Some parameters that should be trained get no gradient. The tuner does not reach them in this backbone.",
            unreached[:20],
        )


class _Window:
    """Images per second and share of waiting since the last row."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._restart()

    def _restart(self) -> None:
        self.began, self.waited, self.images = time.perf_counter(), self.stream.waited, 0

    def count(self, images: int) -> None:
        self.images += images

    def figures(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        figures = {"images_per_second": self.images / seconds, "waiting": (self.stream.waited - self.waited) / seconds}
        self._restart()
        return figures

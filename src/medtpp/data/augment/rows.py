"""Which cases of a batch an effect meets, and small helpers that shapes and intensities share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from medtpp.seeds import Draws


def number(value: float | Literal["auto"]) -> float:
    """The value of a resolved option. Raises ValueError for "auto"."""
    if value == "auto":
        raise ValueError("options must be resolved first: see medtpp.data.augment.resolve")
    return float(value)


def chosen(draws: Draws, effect: str, probability: float) -> Tensor:
    """(B,) bool: the cases that meet an effect."""
    return draws.uniform(f"{effect}?") < probability


def change_rows(images: Tensor, draws: Draws, rows: Tensor | None, change: Callable[[Tensor, Draws], Tensor]) -> Tensor:
    """Change some cases and keep the others' bits.

    Args:
        images: (B, C, *spatial).
        draws: Of the B cases.
        rows: (B,) bool, or None for all.
        change: From images (R, C, *spatial) and their draws to such images.
    """
    if rows is None:
        return change(images, draws)
    index = rows.nonzero()[:, 0]
    if len(index) == 0:
        return images
    return images.index_copy(0, index, change(images[index], Draws(draws.visits[index])))


def along_each_axis(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A separable linear map: one matrix for each axis of each case.

    Args:
        values: (B, C, *spatial).
        matrices: For each spatial axis (B, new length, old length).

    Returns:
        (B, *new lengths, C).
    """
    batch, channels = values.shape[:2]
    lengths = [matrix.shape[1] for matrix in matrices]
    for matrix in reversed(matrices):
        lines = values.reshape(batch, -1, matrix.shape[2])
        values = torch.bmm(matrix, lines.transpose(1, 2))  # the axis that was last comes first: no copies in between
    return values.reshape(batch, *lengths, channels)

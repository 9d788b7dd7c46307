"""Random draws made from their names, never from a shared stream.

`Seeds(root).generator("head")` depends on the root seed and the name alone. A batch draws through `Draws`: each case's
numbers depend on (root, purpose, epoch, case) and on nothing else, so that two arms of a comparison, one process or
many, a resumed run or not, see the same masks and the same augmentation. The draws are a counter-based generator
(SplitMix64; Steele, Lea & Flood, OOPSLA 2014) computed for the whole batch at once, the same bits on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def name_key(*names: str | int) -> int:
    """A signed 64-bit key of a sequence of names and numbers; stable across machines and versions of Python."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts signed numbers arithmetically; SplitMix64 wants zeros shifted in.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


@dataclass(frozen=True)
class Seeds:
    """All randomness of an experiment, from one root number."""

    root: int

    def child(self, *names: str | int) -> Seeds:
        """Seeds of their own for a part of the experiment, such as one stage."""
        return Seeds(name_key(self.root, *names))

    def number(self, *names: str | int) -> int:
        """A seed between 0 and 2**63 - 1 for libraries that want a number."""
        return name_key(self.root, *names) & (2**63 - 1)

    def generator(self, *names: str | int) -> torch.Generator:
        """A CPU generator for `torch` functions."""
        return torch.Generator().manual_seed(self.number(*names))

    def numpy(self, *names: str | int) -> np.random.Generator:
        """A generator for NumPy and SciPy."""
        return np.random.default_rng(self.number(*names))

    @contextmanager
    def scope(self, *names: str | int) -> Iterator[None]:
        """Inside, the global torch generator starts from this name; afterwards it is as it was.

        For libraries that draw from the global stream, such as the initialisation of layers.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.number(*names))
            yield

    def draws(self, epochs: Tensor, cases: Tensor) -> Draws:
        """Draws for a batch.

        Args:
            epochs: (B,) int64, which pass over the data each row belongs to.
            cases: (B,) int64, the key of each row's case (`name_key` of its id).
        """
        visits = _mix(_mix(cases + _GOLDEN) ^ (epochs * _GOLDEN + self.root_key))
        return Draws(visits)

    @property
    def root_key(self) -> int:
        """The root as a signed 64-bit number."""
        return name_key("root", self.root)


class Draws:
    """Random numbers for a batch of B cases, each row from its own visit key.

    Args:
        visits: (B,) int64 keys. The draws are made on their device.
    """

    def __init__(self, visits: Tensor) -> None:
        self.visits = visits

    def __len__(self) -> int:
        return len(self.visits)

    def to(self, device: torch.device) -> Draws:
        """The same draws on another device."""
        return Draws(self.visits.to(device))

    def child(self, name: str) -> Draws:
        """Other draws of the same cases, such as those of one of two views."""
        return Draws(_mix(self.visits ^ name_key(name)))

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.visits[rows])

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1), in steps of 2**-24."""
        count = math.prod(shape)
        counters = torch.arange(1, count + 1, device=self.visits.device) * _GOLDEN
        state = (self.visits ^ name_key(name))[:, None] + counters[None, :]
        return (_shift_right(_mix(state), 40).float() * 2.0**-24).reshape(len(self.visits), *shape)

    def between(self, name: str, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape) uniform in [low, high)."""
        return low + (high - low) * self.uniform(name, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) standard normal, by the Box-Muller transform."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(f"{name}/radius", *shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(f"{name}/angle", *shape))

    def permutation(self, name: str, length: int) -> Tensor:
        """(B, length) int64: a random order of 0 .. length - 1 for each case."""
        return self.uniform(name, length).argsort(dim=1, stable=True)

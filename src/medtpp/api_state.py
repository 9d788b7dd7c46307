"""A model, and the global random state, as they were before a library call."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from medtpp.seeds import Seeds


@contextmanager
def restored(model: nn.Module, wanted: Mapping[str, nn.Parameter], seeds: Seeds) -> Iterator[None]:
    """Modes, requires_grad, gradients, buffers and random state as they were; after an exception the wanted, too.

    Buffers, since a network of one's own may change some whenever it is called. Inside, no parameter has a gradient at
    first: training would add to what is there, and clip it in place.

    Args:
        model: Whose state is kept.
        wanted: Its parameters that are trained inside.
        seeds: Inside, the global random state depends on these alone.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    values = {name: parameter.detach().clone() for name, parameter in wanted.items()}
    with random_state(seeds):
        try:
            for parameter in flags:
                parameter.grad = None
            yield
        except BaseException:
            with torch.no_grad():
                for name, parameter in wanted.items():
                    parameter.copy_(values[name])
            raise
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes.items():
                module.training = training
            for parameter, (requires_grad, gradient) in flags.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


@contextmanager
def random_state(seeds: Seeds) -> Iterator[None]:
    """Inside, the global generators, from which a user's loader and augmentation draw, start from the seed."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the user's own global state)
    with torch.random.fork_rng():
        random.seed(seeds.number("python"))
        np.random.seed(seeds.number("numpy") % 2**32)  # noqa: NPY002
        torch.manual_seed(seeds.number("torch"))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002

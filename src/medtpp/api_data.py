"""Images as users of the library have them: a tensor, a Dataset or a DataLoader, in tuples or dicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from medtpp.data.batches import Batch
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds

Images = Tensor | Dataset[Any] | DataLoader[Any]

_FAR = 30.0  # normalised images rarely reach 5; raw grey levels reach 255 or thousands


class UserStream:
    """Batches of a tensor, a Dataset or a DataLoader, as often as needed.

    Args:
        images: Where the images are.
        targets: (N, ...) that go with a tensor of images, or None.
        batch_size: Of what is not a DataLoader; at most the number of images.
        seeds: The order of what is not a DataLoader, and all draws, come from here.

    Attributes:
        waited: Seconds spent waiting for data; not measured.
    """

    def __init__(self, images: Images, targets: Tensor | None, batch_size: int, seeds: Seeds) -> None:
        self.waited = 0.0
        self.seeds = seeds
        if isinstance(images, DataLoader):
            self.loader = images
        else:
            data: Any = images if targets is None else TensorDataset(images, targets)  # type: ignore[arg-type]
            self.loader = DataLoader(
                data,
                batch_size,
                shuffle=True,
                generator=seeds.generator("order"),
                drop_last=count(images) > batch_size,
            )
        self.batch_size = self.loader.batch_size or batch_size
        self.has_targets = targets is not None

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps start .. stop - 1.

        Raises:
            ConfigError: The loader gives no batches, or batches without images.
        """
        step = start
        while step < stop:
            before = step
            for item in self.loader:
                images = find_images(item, 4)
                targets = item[1] if self.has_targets else None
                cases = torch.arange(len(images))
                yield Batch(images, targets, cases, self.seeds.draws(torch.full_like(cases, step), cases))
                step += 1
                if step == stop:
                    return
            if step == before:
                raise ConfigError("The DataLoader gives no batches. Is drop_last on with fewer images than a batch?")


def count(images: Images) -> int:
    """How many images there are.

    Raises:
        ConfigError: None, or nobody knows.
    """
    data: Any = images.dataset if isinstance(images, DataLoader) else images
    try:
        length = len(data)
    except (TypeError, NotImplementedError) as error:
        raise ConfigError("The images have no length (an iterable dataset). Give a Dataset that has one.") from error
    if not length:
        raise ConfigError("There are no images.")
    return length


def first_images(images: Images) -> Tensor:
    """The first few images, (B, C, H, W)."""
    if isinstance(images, Tensor):
        return find_images(images[:8], 4)
    if isinstance(images, DataLoader):
        for item in images:
            return find_images(item, 4)
        raise ConfigError("The DataLoader gives no batches. Is drop_last on with fewer images than a batch?")
    return find_images(images[0], 3)[None]


def find_images(item: Any, dims: int) -> Tensor:
    """The first floating-point tensor with `dims` dimensions in a tensor, tuple, list or dict.

    Raises:
        ConfigError: There is none; integers get a hint.
    """
    found = [value for value in _tensors(item) if value.ndim == dims]
    images = next((value for value in found if value.is_floating_point()), None)
    if images is not None:
        return images
    if found:
        raise ConfigError(
            f"Images are {found[0].dtype}; floating point is expected: in [0, 1] for a model of `medtpp.attach` "
            "(divide by 255), normalised as its own forward takes them for any other."
        )
    shape = "(C, H, W)" if dims == 3 else "(B, C, H, W)"
    raise ConfigError(f"No image tensor {shape} was found in {type(item).__name__} items.")


def check_range(images: Tensor, *, unit: bool) -> None:
    """Refuse values that no model takes.

    Args:
        images: Some images, or all.
        unit: Whether they must be in [0, 1]; otherwise values that look like raw grey levels get a warning.

    Raises:
        ConfigError: They are not finite, or not in [0, 1].
    """
    if not bool(torch.isfinite(images).all()):
        raise ConfigError("The images hold NaN or infinite values.")
    low, high = float(images.min()), float(images.max())
    if unit and not (low >= -0.01 and high <= 1.01):
        raise ConfigError(
            f"Images for a medtpp backbone are in [0, 1]; these range from {low:.3g} to {high:.3g}. "
            "Divide by 255 and do not normalise: the backbone does."
        )
    if max(-low, high) > _FAR:
        warnings.warn(
            f"The images range from {low:.3g} to {high:.3g}, as raw grey levels do. This model is given them as they "
            "are: normalise them as its own forward expects.",
            stacklevel=3,
        )


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, Sequence) and not isinstance(item, str):
        for value in item:
            yield from _tensors(value)

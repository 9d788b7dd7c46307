"""Images as users of the library have them: a tensor, a Dataset or a DataLoader, in tuples or dicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_convert

from medtpp.backbones import tensors_in
from medtpp.data.batches import Batch
from medtpp.data.problems import first_few
from medtpp.errors import ConfigError, DataError
from medtpp.seeds import Seeds

Images = Tensor | Dataset[Any] | DataLoader[Any]

FEW = 8
ITEM, BATCH = (3, 4), (4, 5)  # dimensions of one image or volume with its channels, and of several
_NAMES = ("pixel_values", "image", "images")  # of transformers, of MONAI
_PICTURE = "PIL.Image"
_FAR = 30.0  # normalised images rarely reach 5; raw grey levels reach 255 or thousands


class UserStream:
    """Batches of a tensor, a Dataset or a DataLoader, as often as needed.

    Args:
        images: Where the images are.
        targets: (N, ...) that go with a tensor of images, or None.
        batch_size: Of what is not a DataLoader; at most the number of images.
        seeds: The order of what is not a DataLoader, and all draws, come from here.
        values: The lowest and the highest, which become 0 and 1.

    Attributes:
        waited: Seconds spent waiting for data; not measured.
    """

    def __init__(
        self,
        images: Images,
        targets: Tensor | None,
        batch_size: int,
        seeds: Seeds,
        values: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.waited = 0.0
        self.seeds = seeds
        self.values = values
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
                collate_fn=_collate if targets is None else None,
            )
        self.batch_size = self.loader.batch_size or batch_size
        self.has_targets = targets is not None

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps start .. stop - 1.

        Raises:
            ConfigError: The loader gives no batches, or batches without images, or images that are not finite.
            DataError: A Dataset's images have different sizes.
        """
        step = start
        while step < stop:
            before = step
            for item in self.loader:
                images = scaled(find_images(item, BATCH), *self.values)
                if not images.sum().isfinite():  # in one pass: NaN and infinity stay in a sum
                    raise ConfigError(f"The images hold NaN or infinite values: some of step {step + 1} do.")
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
    """A few images, (B, C, *spatial), by which a model and the range of values are judged.

    Of a tensor and a DataLoader the first, of a Dataset some from the whole.

    Raises:
        ConfigError: There are no images.
        DataError: They have different sizes.
    """
    if isinstance(images, Tensor):
        return find_images(images[:FEW], BATCH)
    if isinstance(images, DataLoader):
        batches: list[Tensor] = []
        for item in images:
            batches.append(find_images(item, BATCH))
            if sum(map(len, batches)) >= FEW:
                break
        if not batches:
            raise ConfigError("The DataLoader gives no batches. Is drop_last on with fewer images than a batch?")
        return _joined(batches)[:FEW]
    length = count(images)
    places = torch.linspace(0, length - 1, min(FEW, length)).round().int().tolist()
    return _collate([images[place] for place in places])


def find_images(item: Any, dims: tuple[int, int]) -> Tensor:
    """The first floating-point tensor with as many dimensions as images have, in a tensor, tuple, list or dict.

    Of a dict, values whose names say that they are images come first.

    Arrays of NumPy become tensors, as a DataLoader makes them.

    Args:
        item: What a Dataset or a DataLoader gives.
        dims: `ITEM` or `BATCH`.

    Raises:
        ConfigError: There is none; integers, pictures and images without a channel get a hint.
    """
    given, item = item, default_convert(item)  # type: ignore[no-untyped-call]
    found = [value for value in tensors_in(_images_first(item)) if value.ndim in dims]
    images = next((value for value in found if value.is_floating_point()), None)
    if images is not None:
        return images.as_subclass(Tensor)  # without what MONAI's carry along
    if found:
        raise ConfigError(
            f"Images are {found[0].dtype}; floating point is expected: in [0, 1] for a model of `medtpp.attach` "
            "(divide by 255), normalised as its own forward takes them for any other."
        )
    shape = "(C, H, W)" if dims == ITEM else "(B, C, H, W)"
    what = _described(given)
    hint = ""
    if _PICTURE in what:
        hint = " Add ToTensor() to the Dataset's transform."
    elif any(value.ndim == dims[0] - 1 for value in tensors_in(item)):
        hint = " Add a channel: x[None]." if dims == ITEM else " One image is a batch of one: x[None]."
    raise ConfigError(f"No image tensor {shape}, of volumes with D before H, was found. Items are: {what}.{hint}")


def check_range(images: Tensor, *, unit: bool) -> tuple[float, float]:
    """The lowest and the highest value of images; (0, 1) where all lie between.

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
    return (0.0, 1.0) if unit or (low >= 0 and high <= 1) else (low, max(high, low + 1e-3))


def scaled(images: Tensor, low: float, high: float) -> Tensor:
    """Images with the values low to high brought to [0, 1], where pretext tasks change them."""
    return images if (low, high) == (0.0, 1.0) else (images.float() - low) / (high - low)


def _collate(items: list[Any]) -> Tensor:
    """(B, C, *spatial): the images of a Dataset's items, and nothing else of them."""
    return _joined([find_images(item, ITEM)[None] for item in items])


def _joined(images: Sequence[Tensor]) -> Tensor:
    """Batches as one.

    Raises:
        DataError: Their images have different sizes.
    """
    sizes = dict.fromkeys("x".join(map(str, batch.shape[1:])) for batch in images)
    if len(sizes) > 1:
        raise DataError(
            f"The images have different sizes: {first_few(sizes, 3)}. Resize or crop them to one size in the "
            "Dataset's transform."
        )
    return torch.cat(list(images))


def _described(value: Any) -> str:
    """What a Dataset gave, in words."""
    name = type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        return f"{'tensor' if isinstance(value, Tensor) else 'array'} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{name} of {first_few(f'{key}: {_described(part)}' for key, part in value.items())}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"{name} of {first_few(map(_described, value))}"
    return _PICTURE if type(value).__module__.partition(".")[0] == "PIL" else name


def _images_first(item: Any) -> Any:
    """A dict with the values first whose names say that they are images, a mask before them being an image, too."""
    if not isinstance(item, Mapping):
        return item
    return [item[name] for name in _NAMES if name in item] + list(item.values())

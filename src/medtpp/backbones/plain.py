"""Any network of one's own: images in, tensors out, and nothing else is known of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from medtpp.backbones.base import Backbone, Features, Layout, Spec
from medtpp.errors import ConfigError


class PlainBackbone(Backbone):
    """A network that is run as it is, from its images to its output or to that of one of its modules.

    Args:
        network: Called with (B, C, *spatial) images alone.
        spec: What was found out about it; "dense" where the output is a map.
        module: Path of the module whose output is taken, "" for the network itself.
        number: Which of the tensors in that output.
        channels_last: Whether that tensor is (B, *grid, D).
        shape: Of that tensor, for messages.
    """

    def __init__(
        self, network: nn.Module, spec: Spec, module: str, number: int, channels_last: bool, shape: Sequence[int]
    ) -> None:
        super().__init__(network, spec, Layout((), {}))
        self.module = module
        self.number = number
        self.channels_last = channels_last
        self.advice = (
            f"Its output is (B, {', '.join(map(str, shape[1:]))}) for images of {_by(spec.image_size)} pixels. With "
            "features=NAME the output of another of its modules is taken; a map whose sides divide the image's is a "
            "grid of features."
        )

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,  # noqa: ARG002  (of no use without a mask)
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        if keep is not None or mask is not None or taps:
            raise ConfigError(
                f"{self.spec.name} is run as it is: patches are neither dropped nor masked, and no maps are tapped."
            )
        x = outputs_of(self.encoder, self.module, self.normalise(images))[self.number]
        if x.ndim == 2:
            x = x[:, None]  # (B, D) is one token
        elif x.ndim > 3:
            x = (x.movedim(-1, 1) if self.channels_last else x).flatten(2).transpose(1, 2)  # (B, N, D)
        return Features(images, x, 0, self.spec.grid)


def wrap_plain(network: nn.Module, image_size: tuple[int, ...], channels: int, features: str = "") -> PlainBackbone:
    """A backbone around any network that takes normalised images; two images of zeros show what it gives.

    Where the output holds several tensors, the one that depends on most of the parameters that require gradients is
    taken, the first of these: the last map of an encoder, the full mask of a network with deep supervision. Of outputs
    of `transformers` it is `last_hidden_state`.

    Args:
        network: Called with images alone.
        image_size: Spatial size of the images it will see.
        channels: Of these images.
        features: Name of the module whose output is taken: its path, or the end of its path. "": the network itself.

    Raises:
        ConfigError: There is no such module, the network cannot be run on such images, or its output is no features.
    """
    check_float32(network)
    module = _locate(network, features)
    kind = type(network).__name__
    name = f"{features} of {kind}" if features else kind
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    device = next((parameter.device for parameter in network.parameters()), None)
    images = torch.zeros(2, channels, *image_size, device=device)
    network.eval()
    try:
        with torch.enable_grad():
            outputs = outputs_of(network, module, images)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{kind} cannot be run on images {tuple(images.shape)}: {error}. It is called with such images alone, of "
            "the size and the channels of those that are given here."
        ) from error
    if not outputs:
        raise ConfigError(
            f"{name} gives no tensor of floating point with an entry for each of the {len(images)} images that it "
            "was given. With features=NAME the output of one of its modules is taken."
        )
    number = 0
    if len(outputs) > 1:
        number = max(range(len(outputs)), key=lambda place: _count_behind(outputs[place], parameters))
    shape = outputs[number].shape
    grid, channels_last = _grid_of(shape, image_size, name)
    spec = Spec(
        name=name,
        family="plain",
        architecture=kind,
        dims=len(image_size),
        channels=channels,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        image_size=image_size,
        patch=tuple(size // side for size, side in zip(image_size, grid, strict=True)),
        width=shape[1] if len(shape) > 3 and not channels_last else shape[-1],
        depth=0,
        prefix=0,
        pooling="mean",
        objective="unknown",
        capabilities=frozenset({"dense"} if math.prod(grid) > 1 else ()),
        source="in memory",
        sha256="",
    )
    return PlainBackbone(network, spec, module, number, channels_last, shape)


def check_float32(network: nn.Module) -> None:
    """Raise ConfigError where weights are in another precision, such as bfloat16, in which many were downloaded."""
    values = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    found = next((dtype for dtype in values if dtype != torch.float32), None)
    if found is None:
        return
    mixed = {
        torch.bfloat16: " precision='bf16' computes in bfloat16.",
        torch.float16: " precision='16' computes in float16.",
    }
    raise ConfigError(
        f"The model is in {found}; training here needs float32 weights: model.float() first, and model.to({found}) "
        f"afterwards.{mixed.get(found, '')}"
    )


class _Enough(BaseException):
    """The module whose output was wanted has run. No `except Exception` on the way up holds it."""


def outputs_of(network: nn.Module, module: str, images: Tensor) -> list[Tensor]:
    """The floating-point tensors with an entry for each image in what a module of the network gives for (B, C, *sides).

    The network runs no further than that module.

    Raises:
        ConfigError: The network does not run it.
    """
    found: list[Any] = []
    if module:

        def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
            found.append(output)
            raise _Enough

        hook = network.get_submodule(module).register_forward_hook(stop)
        try:
            with suppress(_Enough):
                network(images)
        finally:
            hook.remove()
        if not found:
            raise ConfigError(f"{type(network).__name__} does not call {module} when it is given images.")
    else:
        found.append(network(images))
    output = found[0]
    if isinstance(output, Mapping) and "last_hidden_state" in output:
        output = output["last_hidden_state"]
    return [x for x in tensors_in(output) if x.is_floating_point() and x.ndim > 1 and len(x) == len(images)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, or in tuples, lists and dicts of such."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors_in(part)


def _locate(network: nn.Module, features: str) -> str:
    """The path of the module that is meant: libraries such as peft put prefixes before names."""
    paths: list[str] = [path for path, _ in network.named_modules(remove_duplicate=False)]
    if features in paths:
        return features
    ends = [path for path in paths if path.endswith(f".{features}")]
    if len(ends) == 1:
        return ends[0]
    raise ConfigError(
        f"features={features!r} names {'several modules' if ends else 'no module'} of this {type(network).__name__}. "
        "Names are those of model.named_modules(); near it are:",
        ends or difflib.get_close_matches(features, paths, 5, 0.3) or paths[1:6],
    )


def _count_behind(output: Tensor, parameters: Sequence[nn.Parameter]) -> int:
    """On how many of the parameters an output depends."""
    if not output.requires_grad:
        return 0
    gradients = torch.autograd.grad(output.sum(), parameters, retain_graph=True, allow_unused=True)
    return sum(gradient is not None for gradient in gradients)


def _grid_of(shape: Sequence[int], image_size: tuple[int, ...], name: str) -> tuple[tuple[int, ...], bool]:
    """The grid of a tensor of this shape, one cell where it has none, and whether its channels come last.

    Of the two ways to read a map, the one whose steps are nearest to squares is taken, (B, D, *grid) if both are.
    """
    whole = (1,) * len(image_size)
    if len(shape) in (2, 3):  # vectors, or a sequence of tokens whose places are not known
        return whole, False
    if len(shape) != 2 + len(image_size):
        raise ConfigError(
            f"The output of {name} is (B, {', '.join(map(str, shape[1:]))}). For images of {len(image_size)} "
            "dimensions it must be vectors (B, D), tokens (B, N, D), or a map (B, D, *sides). With features=NAME the "
            "output of one of its modules is taken."
        )

    def stretch(grid: Sequence[int]) -> float:
        steps = [size / side for size, side in zip(image_size, grid, strict=True)]
        return max(steps) / min(steps)

    first, last = tuple(shape[2:]), tuple(shape[1:-1])
    readings = [
        (grid, grid is last)
        for grid in (first, last)
        if all(size % side == 0 for size, side in zip(image_size, grid, strict=True))
    ]
    return min(readings, key=lambda reading: stretch(reading[0]), default=(whole, False))


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))

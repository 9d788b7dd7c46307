"""Hierarchical networks: a stem, then stages of falling resolution, each of which gives a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones.base import Backbone, Features, Inflation, Layout, Spec, Stage, per_channel
from medtpp.backbones.inflate import require_whole, sides
from medtpp.errors import ConfigError


@dataclass(frozen=True)
class Anatomy:
    """Which modules of a network run one after the other; each step names some by their paths.

    Attributes:
        stem: From the image to what the first stage gets.
        stages: Of each stage.
        final: After the last stage.
        channels_last: Whether maps are (B, *grid, C) inside.
        cuts_patches: Whether the stem cuts the image into patches that do not overlap, so that masked ones are replaced
            after it. Otherwise they are replaced in the image.
        normalised: Whether maps, the last one too, leave through a layer norm without weights.
        reversed: Whether the network has the axes of volumes as (width, height, depth).
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    final: tuple[str, ...] = ()
    channels_last: bool = False
    cuts_patches: bool = False
    normalised: bool = False
    reversed: bool = False


class Pyramid(Backbone):
    """A hierarchical network whose last map is its tokens.

    Args:
        encoder: The bare network.
        spec: What it is; `spec.pyramid` has its stages.
        layout: Where its parts are.
        anatomy: How it runs.
        inflation: What is new in the encoder, where it takes images of other channels than its weights were made for.
    """

    def __init__(
        self, encoder: nn.Module, spec: Spec, layout: Layout, anatomy: Anatomy, inflation: Inflation | None = None
    ) -> None:
        super().__init__(encoder, spec, layout, inflation)
        self.anatomy = anatomy

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        if keep is not None:
            raise ConfigError(
                f"{self.spec.name} cannot drop patches, since its layers look at neighbours. Mask them instead: use a "
                "pretext task such as simmim."
            )
        self.check_taps(None, taps)
        anatomy = self.anatomy
        x = self._turn(self.normalise(images))
        if mask is not None and not anatomy.cuts_patches:
            x = self._replace(x, mask, mask_token)
        x = self._run(x, anatomy.stem)
        if mask is not None and anatomy.cuts_patches:
            x = self._last(self._replace(self._first(x), mask, mask_token))
        maps = []
        for index, paths in enumerate(anatomy.stages):
            x = self._run(x, paths)
            if index in taps:
                maps.append(self._leave(x))
        tokens = self._leave(self._run(x, anatomy.final)).flatten(2).transpose(1, 2)  # (B, N, D)
        strides = tuple(self.spec.stages[tap].stride for tap in sorted(taps))
        return Features(images, tokens, 0, self.spec.grid, tuple(maps), strides)

    def _run(self, x: Tensor, paths: Sequence[str]) -> Tensor:
        for path in paths:
            x = self.encoder.get_submodule(path)(x)
        return x

    def _leave(self, x: Tensor) -> Tensor:
        """A map as it leaves, (B, C, *grid)."""
        x = self._first(x)
        if self.anatomy.normalised:
            x = F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        return self._turn(x)

    def _turn(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the network's order of axes, or back."""
        return x.transpose(2, 4).contiguous() if self.anatomy.reversed else x

    def _first(self, x: Tensor) -> Tensor:
        """Channels first, (B, C, *grid)."""
        return x.movedim(-1, 1) if self.anatomy.channels_last else x

    def _last(self, x: Tensor) -> Tensor:
        """As the network has them, from (B, C, *grid)."""
        return x.movedim(1, -1) if self.anatomy.channels_last else x

    def _replace(self, x: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
        """Put the token, zeros by default, in the place of masked patches (B, N) of (B, C, *sides)."""
        hidden = self._turn(mask.reshape(len(mask), 1, *self.spec.grid))
        for axis, side in enumerate(x.shape[2:], start=2):
            hidden = hidden.repeat_interleave(side // hidden.shape[axis], dim=axis)
        filled = x.new_zeros(x.shape[1]) if token is None else token.to(x.dtype)
        return torch.where(hidden, filled.view(-1, *[1] * self.spec.dims), x)


def inside(blocks: Sequence[str], *parts: str) -> tuple[str, ...]:
    """Paths of parts in each of some blocks."""
    return tuple(f"{block}.{part}" for block in blocks for part in parts)


def existing(encoder: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths under which the encoder has a module that does something."""
    modules: dict[str, Any] = dict(encoder.named_modules())
    return tuple(path for path in paths if not isinstance(modules.get(path), nn.Identity | None))


def bare(encoder: nn.Module, path: str) -> Any:
    """The module at a path, also where peft has wrapped it in a network of one's own."""
    module: Any = encoder.get_submodule(path)
    return getattr(module, "base_layer", module)


def capabilities_of(encoder: nn.Module, layout: Layout) -> frozenset[str]:
    """What a pyramid has, read off its layout."""
    found = {"dense", "masks"}
    if layout.paths("attention.qkv"):
        found.add("attention")
    elif layout.paths("conv", "conv.depthwise"):
        found.add("convolutions")
    inner = layout.paths("attention.qkv", "attention.projection", "mlp.in", "mlp.out")
    if any(isinstance(bare(encoder, path), nn.Linear) for path in inner):
        found.add("linear")
    if not any(isinstance(bare(encoder, path), nn.Conv3d) for path in layout.paths("conv")):
        found.add("flat_layers")
    return frozenset(found)


def pyramid_spec(
    encoder: nn.Module,
    layout: Layout,
    anatomy: Anatomy,
    stages: tuple[Stage, ...],
    *,
    name: str,
    family: str,
    architecture: str,
    image_size: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
    objective: str,
    source: str,
    sha256: str,
) -> Spec:
    """The specification of a pyramid: what `Spec` says, read off the network as far as it tells.

    Raises:
        ConfigError: The images have other dimensions, or are not made of whole patches.
    """
    patch = stages[-1].stride
    sides(image_size, len(patch))
    require_whole(image_size, patch)
    first = bare(encoder, layout.paths("embed.patch")[0])
    return Spec(
        name=name,
        family=family,
        architecture=architecture,
        dims=len(patch),
        channels=first.in_channels,
        mean=per_channel(mean, first.in_channels),
        std=per_channel(std, first.in_channels),
        image_size=image_size,
        patch=patch,
        width=stages[-1].width,
        depth=len(stages),
        prefix=0,
        pooling="mean",
        objective=objective,
        capabilities=capabilities_of(encoder, layout),
        source=source,
        sha256=sha256,
        pyramid=stages,
        mask_width=first.out_channels if anatomy.cuts_patches else first.in_channels,
    )

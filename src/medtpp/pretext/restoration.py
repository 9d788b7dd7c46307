"""Restoration (Models Genesis; Zhou et al., arXiv 2004.07882): undo changes of intensity, shuffling and painting."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec, match_channels
from medtpp.config import PRETEXTS, MethodOptions, Probability
from medtpp.pretext.base import Pretext
from medtpp.pretext.mae import patchify, unpatchify
from medtpp.seeds import Draws, Seeds

BOXES = 4  # that are painted over, at most a third of each side
SHUFFLED = 0.3  # share of the small windows whose pixels are shuffled


class RestorationOptions(MethodOptions):
    """Options of restoration."""

    name: Literal["restoration"] = "restoration"
    intensity: Probability = Field(0.9, description="how often an image gets another curve of intensities")
    shuffling: Probability = Field(0.5, description="how often pixels are shuffled inside small windows")
    painting: Probability = Field(0.8, description="how often boxes, or what is outside of them, are painted over")


@PRETEXTS.register("restoration")
class Restoration(Pretext):
    """The network sees a changed image and predicts the original; a linear layer makes pixels of the features."""

    Options: ClassVar[type[MethodOptions]] = RestorationOptions
    summary: ClassVar[str] = "undo changed intensities, shuffled pixels and painted boxes (arXiv 2004.07882)"
    needs = frozenset({"dense"})

    def __init__(self, options: RestorationOptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.options = options
        self.patch = spec.patch
        self.channels = spec.channels
        with seeds.scope("pretext", "restoration"):
            self.predict = nn.Linear(spec.width, math.prod(spec.patch) * spec.channels)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error on standardised images, averaged over the batch."""
        images = match_channels(images, self.channels).float()
        mean, deviation = moments(images)
        target = patchify((images - mean) / deviation, self.patch)  # (B, N, p*C)
        predicted = self.predict(backbone.encode(self.change(images, draws)).patches).float()
        return (predicted - target).square().mean(), {}

    @torch.no_grad()
    def change(self, images: Tensor, draws: Draws) -> Tensor:
        """What the network sees of (B, C, *spatial) images in [0, 1]."""
        each = (len(images), *[1] * (images.ndim - 1))
        for name, how, often in (
            ("intensity", bend, self.options.intensity),
            ("shuffling", shuffle, self.options.shuffling),
            ("painting", paint, self.options.painting),
        ):
            chosen = draws.uniform(f"restoration/{name}") < often
            images = torch.where(chosen.view(each), how(images, draws), images)
        return images

    @torch.no_grad()
    def preview(self, backbone: Backbone, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The changed images and the restored ones."""
        images = match_channels(images, self.channels).float()
        changed = self.change(images, draws)
        mean, deviation = moments(images)
        restored = unpatchify(self.predict(backbone.encode(changed).patches).float(), self.patch, images.shape[2:])
        return {"changed": changed, "restored": (restored * deviation + mean).clamp(0, 1)}


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each image of (B, C, *spatial), over all of it; a flat one's is 0.001."""
    axes = tuple(range(1, images.ndim))
    mean = images.mean(dim=axes, keepdim=True)
    return mean, (images - mean).square().mean(dim=axes, keepdim=True).sqrt().clamp(min=1e-3)


def bend(images: Tensor, draws: Draws) -> Tensor:
    """Intensities through a monotone Bezier curve from 0 to 1, which falls for half of the images."""
    t = torch.linspace(0, 1, 256, device=images.device)
    points = draws.uniform("restoration/curve", 2, 2).sort(dim=1).values  # (B, 2 control points, x and y)
    inner = points[:, 0, :, None] * (3 * t * (1 - t) ** 2) + points[:, 1, :, None] * (3 * t**2 * (1 - t)) + t**3
    x, y = inner.unbind(dim=1)  # (B, 256) each, both rising
    y = torch.where(draws.uniform("restoration/falling")[:, None] < 0.5, 1 - y, y)
    values = images.flatten(1).contiguous()
    right = torch.searchsorted(x.contiguous(), values).clamp(1, len(t) - 1)
    x0, x1, y0, y1 = x.gather(1, right - 1), x.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
    share = ((values - x0) / (x1 - x0).clamp(min=1e-6)).clamp(0, 1)
    return (y0 + share * (y1 - y0)).reshape(images.shape)


def shuffle(images: Tensor, draws: Draws) -> Tensor:
    """Pixels in some windows of about a sixteenth of each side in another order; all channels alike."""
    spatial, channels = images.shape[2:], images.shape[1]
    window = tuple(_divisor(size, max(2, size // 16)) for size in spatial)
    pixels = patchify(images, window)  # (B, N, p*C), channels last
    count, each = pixels.shape[1], pixels.shape[2] // channels
    order = draws.uniform("restoration/order", count, each).argsort(dim=2)  # (B, N, p)
    parted = pixels.reshape(len(images), count, each, channels)
    moved = parted.gather(2, order[..., None].expand_as(parted)).flatten(2)
    chosen = draws.uniform("restoration/windows", count, 1) < SHUFFLED
    return unpatchify(torch.where(chosen, moved, pixels), window, spatial)


def paint(images: Tensor, draws: Draws) -> Tensor:
    """Some boxes filled with one grey each, or for a third of the images what is outside of two large ones."""
    spatial = images.shape[2:]
    outside = draws.uniform("restoration/outside") < 1 / 3
    within: list[Tensor] = []
    for box in range(BOXES):
        inside = torch.ones(len(images), 1, *spatial, dtype=torch.bool, device=images.device)
        for axis, size in enumerate(spatial):
            share = draws.between(f"restoration/side {box} {axis}", 1 / 6, 1 / 3)
            share = torch.where(outside, share + 0.4, share)  # two large boxes are what is left to see
            start = draws.uniform(f"restoration/start {box} {axis}") * (1 - share)
            place = torch.arange(size, device=images.device) / size
            along = (place >= start[:, None]) & (place < (start + share)[:, None])  # (B, size)
            inside &= along.view(len(images), 1, *[1] * axis, size, *[1] * (len(spatial) - 1 - axis))
        within.append(inside)
    each = (len(images), *[1] * (images.ndim - 1))
    hidden = torch.where(outside.view(each), ~(within[0] | within[1]), torch.stack(within).any(dim=0))
    return torch.where(hidden, draws.uniform("restoration/grey").view(each), images)


def _divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, but 1 only for a size without others."""
    divisors = [number for number in range(2, size + 1) if size % number == 0] or [1]
    return min(divisors, key=lambda number: abs(number - wanted))

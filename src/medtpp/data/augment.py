"""Random crops, flips and intensity changes for a whole batch at once, in two or three dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medtpp.config import AugmentOptions, Modality
from medtpp.seeds import Draws

MAX_ASPECT = 4 / 3  # of a crop, as in torchvision's RandomResizedCrop

# Left and right mean something in a body scan (heart, liver, a side marker), above and below in all but a slide.
_MIRRORED: tuple[Modality, ...] = ("ultrasound", "pathology", "microscopy", "retina", "photo")
_WITHOUT_UP: tuple[Modality, ...] = ("pathology", "microscopy")


def resolve(options: AugmentOptions, modality: Modality) -> AugmentOptions:
    """The options with each "auto" answered for this modality."""
    answers = {"flip_horizontal": modality in _MIRRORED, "flip_vertical": modality in _WITHOUT_UP}
    return options.model_copy(
        update={name: value for name, value in answers.items() if getattr(options, name) == "auto"}
    )


class Augmenter:
    """Random resized crop, flips, brightness, contrast and gamma. Each case's result depends on its own draws alone.

    Where both flips are allowed, an image has no up, and quarter turns are allowed too (in the plane of the last two
    axes, if they are equally long).
    """

    def __init__(self, options: AugmentOptions, modality: Modality) -> None:
        self.options = resolve(options, modality)

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: Draws, *, geometric_only: bool = False) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
            draws: The random numbers of the B cases, on the images' device.
            geometric_only: Leave the intensities alone.

        Returns:
            The same shape, type and range.
        """
        options = self.options
        result = images.float()
        if options.crop_min < 1 or options.flip_horizontal or options.flip_vertical:
            grid = self._grid(result, draws)
            result = F.grid_sample(result, grid, align_corners=False).clamp_(0, 1)
        if options.intensity and not geometric_only:
            result = _change_intensity(result, draws, options.intensity)
        return result.to(images.dtype)

    def _grid(self, images: Tensor, draws: Draws) -> Tensor:
        """(B, *spatial, n): where to sample, in grid_sample's coordinates (-1 .. 1, last axis first)."""
        batch, _, *spatial = images.shape
        dims = len(spatial)
        sides = _crop_sides(draws, self.options.crop_min, dims)  # (B, n), first axis first
        centres = (1 - sides) * draws.between("crop_place", -1, 1, dims)
        flips = {dims - 2: self.options.flip_vertical, dims - 1: self.options.flip_horizontal}
        turns = all(flips.values()) and spatial[-2] == spatial[-1]
        turned = (draws.uniform("turn") < 0.5).reshape(batch, *[1] * dims)
        grid = images.new_empty(batch, *spatial, dims)
        for axis, length in enumerate(spatial):
            side = sides[:, axis]
            if flips.get(axis):
                side = side * torch.where(draws.uniform(f"flip_{axis - dims}") < 0.5, -1.0, 1.0)
            inner = (torch.arange(length, device=images.device) * 2 + 1) / length - 1  # pixel centres in -1 .. 1
            edge = 1 - 1 / length  # the outermost pixel centre; like padding_mode="border", which MPS lacks
            along = (centres[:, axis, None] + side[:, None] * inner).clamp(-edge, edge)  # (B, length)
            place = along.reshape(batch, *[length if other == axis else 1 for other in range(dims)])
            if turns and axis in flips:
                place = torch.where(turned, place.transpose(-1, -2), place)
            grid[..., dims - 1 - axis] = place
        return grid


def _crop_sides(draws: Draws, smallest: float, dims: int) -> Tensor:
    """(B, n) side lengths of the crops as shares of the image's; their product is uniform in [smallest, 1)."""
    volume = draws.between("crop_area", smallest, 1).log()
    # Tilts sum to zero, so that the aspect changes and the volume does not; bounded so that no side exceeds 1.
    tilt = draws.between("crop_aspect", -1, 1, dims)
    tilt = (tilt - tilt.mean(dim=1, keepdim=True)) * (dims / (2 * (dims - 1)))
    bound = (-volume / dims).clamp(max=math.log(MAX_ASPECT) / 2)
    return (volume[:, None] / dims + bound[:, None] * tilt).exp()


def _change_intensity(images: Tensor, draws: Draws, strength: float) -> Tensor:
    shape = (-1,) + (1,) * (images.ndim - 1)
    contrast = draws.between("contrast", 1 - strength, 1 + strength).reshape(shape)
    brightness = draws.between("brightness", 1 - strength, 1 + strength).reshape(shape)
    gamma = draws.between("gamma", -strength, strength).exp().reshape(shape)
    mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    changed = images * (contrast * brightness)  # then in place: on CPUs new memory costs more than the arithmetic
    return changed.add_(mean * (1 - contrast) * brightness).clamp_(0, 1).pow_(gamma)

"""Blur, low resolution, noise, brightness, contrast and gamma."""

from __future__ import annotations

import torch
from torch import Tensor

from medtpp.config import AugmentOptions
from medtpp.data.augment.rows import along_each_axis, change_rows, chosen, number
from medtpp.seeds import Draws

_OFF = 1e-3  # pixels: a Gaussian as narrow as this is the identity to the bit


class IntensityChanges:
    """What the scanner and the window do to an image: first its sharpness, then noise, then grey levels.

    Args:
        options: Resolved.
    """

    def __init__(self, options: AugmentOptions) -> None:
        self.blur = number(options.blur)
        self.low_resolution = number(options.low_resolution)
        self.noise = number(options.noise)
        self.intensity = number(options.intensity)
        self.blur_probability = options.blur_probability
        self.low_resolution_probability = options.low_resolution_probability
        self.noise_probability = options.noise_probability
        self.intensity_probability = number(options.intensity_probability)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """(B, C, *spatial) float32 in [0, 1] to the same; a case that no effect meets keeps its bits."""
        if self.blur or self.low_resolution:
            rows = self._blurred(draws) | self._coarsened(draws)
            images = change_rows(images, draws, rows, self._unsharpen)
        if self.noise:
            images = change_rows(images, draws, chosen(draws, "noise", self.noise_probability), self._add_noise)
        if self.intensity:
            images = change_rows(images, draws, self._relit(draws), self._relight)
        return images

    def _blurred(self, draws: Draws) -> Tensor:
        return chosen(draws, "blur", self.blur_probability if self.blur else 0)

    def _coarsened(self, draws: Draws) -> Tensor:
        return chosen(draws, "low_resolution", self.low_resolution_probability if self.low_resolution else 0)

    def _relit(self, draws: Draws) -> Tensor | None:
        if self.intensity_probability == 1:
            return None
        contrast, brightness, gamma = (
            chosen(draws, name, self.intensity_probability) for name in ("contrast", "brightness", "gamma")
        )
        return contrast | brightness | gamma

    def _unsharpen(self, images: Tensor, draws: Draws) -> Tensor:
        """Blur and coarsen. Both are linear and separable, so that one matrix for each axis does both."""
        sigma = self.blur * draws.between("blur", 0.5, 1)
        sigma = torch.where(self._blurred(draws), sigma, _OFF)
        zoom = 1 - self.low_resolution * draws.uniform("low_resolution")
        zoom = torch.where(self._coarsened(draws), zoom, 1)
        spatial = images.shape[2:]
        matrices = [torch.bmm(_coarsening(zoom, length), _gaussian(sigma, length)) for length in spatial]
        return along_each_axis(images, matrices).movedim(-1, 1).clamp_(0, 1)

    def _add_noise(self, images: Tensor, draws: Draws) -> Tensor:
        sigma = _as_column(draws.between("noise", 0, self.noise), images)
        return draws.normal("noise_values", *images.shape[1:]).mul_(sigma).add_(images).clamp_(0, 1)

    def _relight(self, images: Tensor, draws: Draws) -> Tensor:
        contrast = self._factor(draws, "contrast", draws.between("contrast", *self._range), images)
        brightness = self._factor(draws, "brightness", draws.between("brightness", *self._range), images)
        exponents = draws.between("gamma", -self.intensity, self.intensity).exp()
        gamma = self._factor(draws, "gamma", exponents, images)
        mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
        changed = images * (contrast * brightness)  # then in place: on CPUs new memory costs more than the arithmetic
        return changed.add_(mean * (1 - contrast) * brightness).clamp_(0, 1).pow_(gamma)

    @property
    def _range(self) -> tuple[float, float]:
        return 1 - self.intensity, 1 + self.intensity

    def _factor(self, draws: Draws, name: str, values: Tensor, images: Tensor) -> Tensor:
        """The values as a column, 1 for cases that this effect does not meet."""
        return _as_column(torch.where(chosen(draws, name, self.intensity_probability), values, 1.0), images)


def _as_column(values: Tensor, images: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, ...), to go with images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _gaussian(sigma: Tensor, length: int) -> Tensor:
    """(B, length, length): Gaussian smoothing along an axis; at the borders the weights inside are made to sum to 1."""
    places = torch.arange(length, device=sigma.device)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma[:, None, None]) ** 2)
    return weights / weights.sum(dim=2, keepdim=True)


def _coarsening(zoom: Tensor, length: int) -> Tensor:
    """(B, length, length): nearest sampling to `zoom` times the pixels, and linear interpolation back."""
    pixels = torch.arange(length, device=zoom.device)
    count = (zoom * length).round().clamp(min=1)[:, None]  # (B, 1) coarse pixels
    places = ((pixels + 0.5) * (count / length) - 0.5).clamp(min=0)  # (B, length) in coarse pixels
    places = torch.minimum(places, count - 1)
    lower = places.floor()
    upper = torch.minimum(lower + 1, count - 1)
    share = (places - lower)[..., None]
    below, above = (((coarse + 0.5) * (length / count)).floor()[..., None] == pixels for coarse in (lower, upper))
    return below * (1 - share) + above * share

"""Crops, flips, quarter turns, affine and elastic maps, composed into one sampling grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medtpp.config import AugmentOptions
from medtpp.data.augment.rows import along_each_axis, chosen, number
from medtpp.seeds import Draws

MAX_ASPECT = 4 / 3  # of a crop, as in torchvision's RandomResizedCrop
CELLS = 4  # of the elastic control grid along each axis
THICK = 3  # times the finest spacing: such an axis is not mixed with others (nnU-Net's threshold of anisotropy)
_ASPECT_SHARE = 0.25  # of a scaling's logarithm: what the axes have of their own


class ShapeChanges:
    """Where each output pixel is sampled in its image.

    A position passes the elastic map, then scaling, shear and rotation about the centre, then flips and the crop, and
    is at last held within the outermost pixel centres: what lies outside the field takes the border's value, in images
    and masks alike, so that a mask still belongs to what its image shows there. Lengths are those in the patient
    where the spacing is known: rotating thick slices does not shear anatomy.

    Args:
        options: Resolved.
        spacing: Of the spatial axes, first axis first; None: equal.
    """

    def __init__(self, options: AugmentOptions, spacing: Sequence[float] | None = None) -> None:
        self.crop_min = number(options.crop_min)
        self.flips = (bool(options.flip_vertical), bool(options.flip_horizontal))  # of the last two axes
        self.rotation = math.radians(number(options.rotation))
        self.scaling = math.log1p(number(options.scaling))
        self.shear = number(options.shear)
        self.elastic = number(options.elastic)
        self.affine_probability = options.affine_probability
        self.elastic_probability = options.elastic_probability
        self.spacing = None if spacing is None else tuple(map(float, spacing))

    def rows(self, draws: Draws) -> Tensor | None:
        """(B,) bool: the cases that are resampled; None for all."""
        if self.crop_min < 1 or any(self.flips):
            return None
        rows = torch.zeros(len(draws), dtype=torch.bool, device=draws.visits.device)
        for name in ("rotation", "scaling", "shear"):
            if getattr(self, name):
                rows |= chosen(draws, name, self.affine_probability)
        return rows | chosen(draws, "elastic", self.elastic_probability) if self.elastic else rows

    def grid(self, spatial: Sequence[int], draws: Draws) -> Tensor:
        """(B, *spatial, n): where to sample, in grid_sample's coordinates (-1 .. 1, last axis first)."""
        batch, dims, device = len(draws), len(spatial), draws.visits.device
        sides = crop_sides(draws, self.crop_min, dims)  # (B, n), first axis first, as all until the grid
        centres = (1 - sides) * draws.between("crop_place", -1, 1, dims)
        for axis, flip in zip((dims - 2, dims - 1), self.flips, strict=True):
            if flip:
                sides[:, axis] *= torch.where(draws.uniform(f"flip_{axis - dims}") < 0.5, -1.0, 1.0)
        affine = self._affine(spatial, draws) if self.rotation or self.scaling or self.shear else None
        linear = torch.diag_embed(sides) if affine is None else sides[:, :, None] * affine  # (B, n, n)
        moves = self._displacements(spatial, draws, linear) if self.elastic else None
        turns = all(self.flips) and spatial[-2] == spatial[-1]
        turned = (draws.uniform("turn") < 0.5).reshape(batch, *[1] * dims)

        ramps = [
            # pixel centres in -1 .. 1, shaped to vary along their own axis
            ((torch.arange(length, device=device) * 2 + 1) / length - 1).reshape([-1] + [1] * (dims - 1 - axis))
            for axis, length in enumerate(spatial)
        ]
        grid = torch.empty(batch, *spatial, dims, device=device)
        for axis, length in enumerate(spatial):
            place = centres[:, axis].reshape(batch, *[1] * dims)
            for other in [axis] if affine is None else [axis, *(o for o in range(dims) if o != axis)]:
                place = place + linear[:, axis, other].reshape(batch, *[1] * dims) * ramps[other]
            if moves is not None:
                place = place + moves[..., axis]
            edge = 1 - 1 / length  # the outermost pixel centre; like padding_mode="border", which MPS lacks
            place = place.clamp(-edge, edge)
            if turns:
                place = torch.where(turned, place.transpose(-1, -2), place)
            grid[..., dims - 1 - axis] = place
        return grid

    def _affine(self, spatial: Sequence[int], draws: Draws) -> Tensor:
        """(B, n, n): rotation @ shear @ scaling, from -1 .. 1 to -1 .. 1; the identity for cases not chosen."""
        dims, device = len(spatial), draws.visits.device
        rotated, scaled, sheared = (
            chosen(draws, name, self.affine_probability).float() for name in ("rotation", "scaling", "shear")
        )
        common, own = draws.between("scaling", -1, 1, 1), draws.between("scaling_axis", -1, 1, dims)
        logarithms = ((1 - _ASPECT_SHARE) * common + _ASPECT_SHARE * own) * (self.scaling * scaled[:, None])
        thin = self._thin(dims)
        pairs = torch.tensor(
            [[i != j and thin[i] and thin[j] for j in range(dims)] for i in range(dims)], device=device
        )
        shears = draws.between("shear", -self.shear, self.shear, dims, dims) * pairs * sheared[:, None, None]
        matrix = (torch.eye(dims, device=device) + shears) * logarithms.exp()[:, None, :]
        angles = draws.between("rotation", -self.rotation, self.rotation, dims, dims) * rotated[:, None, None]
        for first in range(dims):
            for second in range(first + 1, dims):
                if thin[first] and thin[second]:
                    matrix = _plane_rotation(angles[:, first, second], first, second, dims) @ matrix
        spacing = self.spacing or (1.0,) * dims
        extent = torch.tensor([n * step for n, step in zip(spatial, spacing, strict=True)], device=device)
        return matrix * (extent[None, :] / extent[:, None])

    def _thin(self, dims: int) -> list[bool]:
        """For each axis whether it may be mixed with others."""
        spacing = self.spacing or (1.0,) * dims
        return [step <= THICK * min(spacing) for step in spacing]

    def _displacements(self, spatial: Sequence[int], draws: Draws, linear: Tensor) -> Tensor:
        """(B, *spatial, n): what the elastic map adds to positions, through the linear map.

        Uniform moves of the control points of cubic B-splines (Rueckert et al., IEEE TMI 1999). Below 0.48 (2D) and
        0.40 (3D) of their distance nothing folds (Choi & Lee, Graphical Models 2000).
        """
        dims, batch = len(spatial), len(draws)
        points = CELLS + 3
        reach = self.elastic * 2 / CELLS * torch.tensor(self._thin(dims), device=linear.device)
        reach = reach * chosen(draws, "elastic", self.elastic_probability)[:, None]
        moves = draws.between("elastic", -1, 1, points**dims, dims) * reach[:, None, :]
        moves = torch.bmm(linear, moves.transpose(1, 2)).reshape(batch, dims, *[points] * dims)
        return along_each_axis(moves, [_spline(n, linear.device).expand(batch, n, points) for n in spatial])


def crop_sides(draws: Draws, smallest: float, dims: int) -> Tensor:
    """(B, n) side lengths of the crops as shares of the image's; their product is uniform in [smallest, 1)."""
    volume = draws.between("crop_area", smallest, 1).log()
    # Tilts sum to zero, so that the aspect changes and the volume does not; bounded so that no side exceeds 1.
    tilt = draws.between("crop_aspect", -1, 1, dims)
    tilt = (tilt - tilt.mean(dim=1, keepdim=True)) * (dims / (2 * (dims - 1)))
    bound = (-volume / dims).clamp(max=math.log(MAX_ASPECT) / 2)
    return (volume[:, None] / dims + bound[:, None] * tilt).exp()


def _plane_rotation(angles: Tensor, first: int, second: int, dims: int) -> Tensor:
    matrix = torch.eye(dims, device=angles.device).repeat(len(angles), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angles.cos()
    matrix[:, first, second] = -angles.sin()
    matrix[:, second, first] = angles.sin()
    return matrix


def _spline(length: int, device: torch.device) -> Tensor:
    """(length, CELLS + 3): weights of the control points at each pixel centre."""
    places = (torch.arange(length, device=device) + 0.5) * (CELLS / length)
    distance = (places[:, None] - torch.arange(-1, CELLS + 2, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)

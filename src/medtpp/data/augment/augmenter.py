"""The augmentation that a training stage calls, and its defaults for each use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from medtpp.config import AugmentOptions, Modality
from medtpp.data.augment.intensities import IntensityChanges
from medtpp.data.augment.shapes import ShapeChanges
from medtpp.seeds import Draws

Use = Literal["classification", "classification in mm", "segmentation"]

# Left and right mean something in a body scan (heart, liver, a side marker), above and below in all but a slide.
_MIRRORED: tuple[Modality, ...] = ("ultrasound", "pathology", "microscopy", "retina", "photo")
_WITHOUT_UP: tuple[Modality, ...] = ("pathology", "microscopy")

# Random resized crops, as usual for vision transformers. A class is seen at any scale.
_CLASSIFICATION = {
    "crop_min": 0.5,
    "rotation": 0.0,
    "scaling": 0.0,
    "shear": 0.0,
    "elastic": 0.0,
    "blur": 0.0,
    "low_resolution": 0.0,
    "noise": 0.0,
    "intensity": 0.15,
    "intensity_probability": 1.0,
}
_DEFAULTS: dict[Use, dict[str, float]] = {
    "classification": _CLASSIFICATION,
    # On a grid in millimetres a finding's size may tell the class, as that of a lung nodule does: nothing is rescaled.
    "classification in mm": {**_CLASSIFICATION, "crop_min": 1.0, "rotation": 30.0},
    # Near nnU-Net's (Isensee et al., arXiv 1904.08128): sizes are kept, many effects, each seldom.
    "segmentation": {
        "crop_min": 1.0,
        "rotation": 30.0,
        "scaling": 0.4,
        "shear": 0.05,
        "elastic": 0.3,
        "blur": 1.0,
        "low_resolution": 0.5,
        "noise": 0.07,
        "intensity": 0.25,
        "intensity_probability": 0.2,
    },
}


def resolve(options: AugmentOptions, modality: Modality, use: Use = "classification") -> AugmentOptions:
    """The options with each "auto" answered for this modality and use."""
    answers: dict[str, Any] = {
        "flip_horizontal": modality in _MIRRORED,
        "flip_vertical": modality in _WITHOUT_UP,
        **_DEFAULTS[use],
    }
    return options.model_copy(
        update={name: value for name, value in answers.items() if getattr(options, name) == "auto"}
    )


class Augmenter:
    """Augments a batch in two or three dimensions. Each case's result depends on its own draws alone.

    All changes of shape make one sampling, linear for images and nearest for masks; see `ShapeChanges` for their order
    and for what lies outside the field. Where both flips are allowed, an image has no up, and quarter turns are
    allowed too (in the plane of the last two axes, if they are equally long). A case that no effect meets keeps its
    bits.

    Args:
        options: Those that are "auto" are answered by modality and use.
        modality: Decides about flips.
        use: Decides about the rest.
        spacing: Of the spatial axes, first axis first, in any unit; None: equal. An axis more than 3 times coarser
            than the finest is left out of rotation, shear and elastic deformation.
    """

    def __init__(
        self,
        options: AugmentOptions,
        modality: Modality,
        use: Use = "classification",
        spacing: Sequence[float] | None = None,
    ) -> None:
        self.options = resolve(options, modality, use)
        self._shapes = ShapeChanges(self.options, spacing)
        self._intensities = IntensityChanges(self.options)

    @overload
    def __call__(self, images: Tensor, draws: Draws, masks: None = None, *, geometric_only: bool = False) -> Tensor: ...

    @overload
    def __call__(
        self, images: Tensor, draws: Draws, masks: Tensor, *, geometric_only: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, images: Tensor, draws: Draws, masks: Tensor | None = None, *, geometric_only: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
            draws: The random numbers of the B cases, on the images' device.
            masks: (B, H, W) or (B, D, H, W), uint8 (or other integers below 2**24) on the images' device.
            geometric_only: Leave the intensities alone.

        Returns:
            The images, with masks a pair of both: the same shapes, types and range.

        Raises:
            ValueError: Masks and images differ in shape.
        """
        if masks is not None and masks.shape != (len(images), *images.shape[2:]):
            raise ValueError(f"Masks {tuple(masks.shape)} do not fit images {tuple(images.shape)}.")
        # The coordinates need all their bits, whatever precision the network computes in.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            result, masks = self._reshape(images.float(), draws, masks)
            if not geometric_only:
                result = self._intensities(result, draws)
            result = result.to(images.dtype)
        return result if masks is None else (result, masks)

    def _reshape(self, images: Tensor, draws: Draws, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self._shapes.rows(draws)
        if rows is None:
            return self._sample(images, draws, masks)
        index = rows.nonzero()[:, 0]
        if len(index) == 0:
            return images, masks
        chosen_masks = None if masks is None else masks[index]
        changed, changed_masks = self._sample(images[index], Draws(draws.visits[index]), chosen_masks)
        if masks is not None and changed_masks is not None:
            masks = masks.index_copy(0, index, changed_masks)
        return images.index_copy(0, index, changed), masks

    def _sample(self, images: Tensor, draws: Draws, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        grid = self._shapes.grid(images.shape[2:], draws)
        if masks is not None:
            moved = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
            masks = moved[:, 0].to(masks.dtype)
        return F.grid_sample(images, grid, align_corners=False).clamp_(0, 1), masks

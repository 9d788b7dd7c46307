"""Two random views of each image, for tasks that ask for the same features of both."""

from __future__ import annotations

from torch import Tensor

from medtpp.config import AugmentOptions
from medtpp.data.augment import Augmenter
from medtpp.seeds import Draws

# Strong crops and changes of intensity, as SimCLR's (arXiv 2002.05709). Images come here flipped as their modality
# allows, so that no view is.
_VIEW = Augmenter(
    AugmentOptions(
        crop_min=0.3,
        flip_horizontal=False,
        flip_vertical=False,
        rotation=0.0,
        scaling=0.0,
        shear=0.0,
        elastic=0.0,
        blur=1.0,
        low_resolution=0.0,
        noise=0.05,
        intensity=0.4,
        intensity_probability=0.8,
    ),
    "unknown",
)


def two_views(images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(B, C, *spatial) in [0, 1], twice: other crops, contrasts, blur and noise in each."""
    return _VIEW(images, draws.child("view 1")), _VIEW(images, draws.child("view 2"))

"""Images and volumes with something to learn."""

import torch
from torch.nn import functional as F

from medtpp.seeds import Seeds


def pictures(size: tuple[int, ...], count: int = 4, channels: int = 1) -> torch.Tensor:
    """(count, channels, *size) in [0, 1]: random corners, what lies between, some noise. `size` has two or three."""
    generator = Seeds(1).generator("images")
    corners = torch.rand(count, channels, *[2] * len(size), generator=generator)
    mode = "trilinear" if len(size) == 3 else "bilinear"
    smooth = F.interpolate(corners, size=size, mode=mode, align_corners=True)
    return (smooth + 0.01 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)

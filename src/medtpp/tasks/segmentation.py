"""Segmentation in two and three dimensions: structures that exclude each other, or regions that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Features, Spec
from medtpp.config import TASKS, MethodOptions, Rate
from medtpp.data.case import Case
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tasks.base import Task
from medtpp.tasks.decoders import UNETR, resize


class SegmentationOptions(MethodOptions):
    """Options of segmentation."""

    name: Literal["segmentation"] = "segmentation"
    head: Literal["unetr", "light"] = Field(
        "unetr", description="unetr: a decoder over the image and inner blocks; light: linear on the last tokens"
    )
    feature_size: int = Field(16, ge=1, description="unetr: channels at the image's resolution")
    image_skip: bool = Field(True, description="unetr: whether the decoder sees the image beside the backbone's maps")
    class_weights: tuple[Rate, ...] = Field(
        (),
        description="in the cross-entropy, of the background and each structure (of each structure where they "
        "overlap); empty: all 1",
    )


@TASKS.register("segmentation")
class Segmentation(Task):
    """Dice + cross-entropy: softmax over background and structures, or a sigmoid for each where they overlap.

    Args:
        options: Its options.
        spec: Of the backbone.
        classes: Names of the K structures.
        multilabel: Whether structures overlap.
        seeds: The initial decoder and head depend on these alone.

    Raises:
        ConfigError: The backbone has no grid of tokens, or the class weights are too few or too many.
    """

    Options: ClassVar[type[MethodOptions]] = SegmentationOptions
    options: SegmentationOptions
    dense: ClassVar[bool] = True
    summary: ClassVar[str] = "masks of structures or regions: a light head, or a UNETR decoder (arXiv 2103.10504)"

    def __init__(
        self, options: SegmentationOptions, spec: Spec, classes: tuple[str, ...], multilabel: bool, seeds: Seeds
    ) -> None:
        nn.Module.__init__(self)
        self.options = options
        self.classes = classes
        self.multilabel = multilabel
        outputs = classes if multilabel else ("background", *classes)
        problems = []
        if "dense" not in spec.capabilities:
            problems.append(f"the backbone {spec.name} has no grid of tokens; choose a vision transformer")
        given = len(options.class_weights)
        if given not in (0, len(outputs)):
            problems.append(f"task.class_weights has {given} weights; give {len(outputs)}: {', '.join(outputs)}")
        if problems:
            raise ConfigError("Segmentation cannot be set up like this.", problems)
        self.decoder: UNETR | None = None
        self.head: nn.Module
        if options.head == "unetr":
            self.decoder = UNETR(spec, seeds, options.feature_size, options.image_skip)
            self.taps = self.decoder.taps
        with seeds.scope("head"):
            if self.decoder is None:
                self.head = LightHead(spec, len(outputs))
            else:
                self.head = (nn.Conv2d if spec.dims == 2 else nn.Conv3d)(self.decoder.width, len(outputs), 1)
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(options.class_weights or [1.0] * len(outputs)), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """Logits of the images' size: (B, K + 1, *spatial), the background first; (B, K, *spatial) with overlap."""
        logits: Tensor = self.head(features if self.decoder is None else self.decoder(features))
        return logits

    def targets(self, cases: Sequence[Case]) -> None:
        """None: `loss` is given the masks that come with a batch."""

    def from_masks(self, masks: Tensor) -> Tensor:
        """(B, *spatial) as they are; with overlap, where each bit is a structure, (B, K, *spatial) zeros and ones."""
        if not self.multilabel:
            return masks
        return torch.stack([masks >> bit & 1 for bit in range(len(self.classes))], dim=1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of soft Dice loss and cross-entropy, in float32.

        Both are means over cases, so that a batch cut in equal parts has the same loss as a whole one.

        Args:
            logits: As `forward` gives them.
            targets: (B, *spatial) whole numbers, 0 the background and i the i-th structure; with overlap
                (B, K, *spatial) zeros and ones.
        """
        logits = logits.float()
        if self.multilabel:
            truth = targets.float()
            weights = self.weights.view(-1, *[1] * (logits.ndim - 2))
            entropy = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights)
            return entropy + soft_dice_loss(logits.sigmoid(), truth)
        targets = targets.long()
        log_probabilities = logits.log_softmax(dim=1)
        # The mean over voxels and not, as torch's for weights, over their weights, which would differ between batches.
        entropy = F.nll_loss(log_probabilities, targets, self.weights, reduction="none").mean()
        truth = torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0)
        return entropy + soft_dice_loss(log_probabilities.exp()[:, 1:], truth[:, 1:])

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K + 1, *spatial) float32 that sum to 1 over background and structures; (B, K, *spatial) with overlap."""
        return logits.float().sigmoid() if self.multilabel else logits.float().softmax(dim=1)

    def balance(self, targets: Tensor) -> None:
        """Nothing: the options give the weights."""


class LightHead(nn.Module):
    """LayerNorm and a linear layer on the patch tokens, which gives logits for parts of each patch.

    A patch of up to 16 pixels is cut in 4 parts along each axis in two dimensions and in 2 in three, a larger one in as
    many parts of 4 (8) pixels. Linear interpolation leads to the image's size.
    """

    def __init__(self, spec: Spec, outputs: int) -> None:
        super().__init__()
        parts, size = (4, 4) if spec.dims == 2 else (2, 8)
        self.parts = max(parts, max(spec.patch) // size)
        self.norm = nn.LayerNorm(spec.width)
        self.linear = nn.Linear(spec.width, outputs * self.parts**spec.dims)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        """(B, K, *spatial) logits of the images' size."""
        x = self.linear(self.norm(features.patches))  # (B, N, K * parts ** dims)
        if len(features.grid) == 2:
            (h, w), pattern = features.grid, "b (h w) (k p q) -> b k (h p) (w q)"
            x = rearrange(x, pattern, h=h, w=w, p=self.parts, q=self.parts)
        else:
            (d, h, w), pattern = features.grid, "b (d h w) (k o p q) -> b k (d o) (h p) (w q)"
            x = rearrange(x, pattern, d=d, h=h, w=w, o=self.parts, p=self.parts, q=self.parts)
        return resize(x, features.images.shape[2:])


def soft_dice_loss(probabilities: Tensor, truth: Tensor) -> Tensor:
    """One minus soft Dice (Milletari et al., arXiv 1606.04797, with plain sums below), per case and structure.

    Structures that a case does not show are left out of its mean: their Dice is 0 whatever is predicted, so that they
    would add a constant and no gradient. What is there makes the denominator at least 1, so that nothing has to be
    smoothed. A case that shows none of the structures has a loss of 0 and learns from the cross-entropy alone.

    Args:
        probabilities: (B, K, *spatial).
        truth: (B, K, *spatial) zeros and ones.

    Returns:
        A scalar: the mean over structures of each case, then over cases.
    """
    shared = (probabilities * truth).flatten(2).sum(dim=2)  # (B, K)
    sizes = truth.flatten(2).sum(dim=2)
    dice = 2 * shared / (probabilities.flatten(2).sum(dim=2) + sizes).clamp(min=1.0)
    present = (sizes > 0).float()
    return (((1 - dice) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1.0)).mean()

"""Classification: binary, multi-class, multi-label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Features, Spec
from medtpp.config import TASKS, MethodOptions
from medtpp.data.case import Case
from medtpp.seeds import Seeds
from medtpp.tasks.base import Task


class ClassificationOptions(MethodOptions):
    """Options of classification."""

    name: Literal["classification"] = "classification"
    pooling: Literal["auto", "mean", "cls"] = Field("auto", description="auto: as the backbone was trained")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over the other classes")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes weigh more in the loss"
    )


@TASKS.register("classification")
class Classification(Task):
    """Pooled tokens, LayerNorm, linear. Softmax over classes; a sigmoid for each with several labels."""

    Options: ClassVar[type[MethodOptions]] = ClassificationOptions
    options: ClassificationOptions
    summary: ClassVar[str] = "one label per image, or several: pooled tokens, LayerNorm, linear"

    def __init__(
        self, options: ClassificationOptions, spec: Spec, classes: tuple[str, ...], multilabel: bool, seeds: Seeds
    ) -> None:
        nn.Module.__init__(self)
        self.options = options
        self.classes = classes
        self.multilabel = multilabel
        self.pooling = spec.pooling if options.pooling == "auto" else options.pooling
        self.norm = nn.LayerNorm(spec.width)
        with seeds.scope("head"):
            self.linear = nn.Linear(spec.width, len(classes))
        with torch.no_grad():
            self.linear.weight.normal_(std=0.02, generator=seeds.generator("head"))
            self.linear.bias.zero_()
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(len(classes)), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """(B, K) logits."""
        logits: Tensor = self.linear(self.norm(features.pooled(self.pooling)))
        return logits

    def targets(self, cases: Sequence[Case]) -> Tensor:
        """(n,) int64 class indices; (n, K) zeros and ones with several labels."""
        index = {name: number for number, name in enumerate(self.classes)}
        if not self.multilabel:
            return torch.tensor([index[case.labels[0]] for case in cases])
        return torch.tensor([[float(name in case.labels) for name in self.classes] for case in cases])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with targets (B,) int64; binary cross-entropy with targets (B, K) in {0, 1}."""
        logits, smoothing = logits.float(), self.options.label_smoothing
        if self.multilabel:
            soft = targets.float() * (1 - smoothing) + 0.5 * smoothing
            return F.binary_cross_entropy_with_logits(logits, soft, pos_weight=self.weights)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        # Weights have mean 1 over the training set: a batch cut in parts has the same loss as a whole one.
        return (each * self.weights[targets]).mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) float32: rows sum to 1, or independent probabilities with several labels."""
        return logits.float().sigmoid() if self.multilabel else logits.float().softmax(dim=-1)

    def balance(self, targets: Tensor) -> None:
        """Weights n / (K n_k) from class frequencies; with several labels negatives over positives, at most 100."""
        if self.options.class_weights == "none":
            return
        if self.multilabel:
            positive = targets.float().sum(dim=0)
            self.weights = ((len(targets) - positive) / positive.clamp(min=1)).clamp(max=100.0).to(self.weights)
        else:
            counts = torch.bincount(targets, minlength=len(self.classes)).float()
            present = (counts > 0).sum()
            self.weights = (len(targets) / (present * counts.clamp(min=1))).to(self.weights)

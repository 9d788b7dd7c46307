"""Classification: binary, multi-class, multi-label."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Features, Spec
from medtpp.config import TASKS, MethodOptions
from medtpp.data.case import Case
from medtpp.seeds import Seeds
from medtpp.tasks.base import FittedTask

STRENGTH = 50.0  # weight of all cases' losses against half the squared weights, for features of unit length


class ClassificationOptions(MethodOptions):
    """Options of classification."""

    name: Literal["classification"] = "classification"
    pooling: Literal["auto", "mean", "cls"] = Field("auto", description="auto: as the backbone was trained")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over the other classes")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes weigh more in the loss"
    )


@TASKS.register("classification")
class Classification(FittedTask):
    """Pooled tokens, LayerNorm, linear. Softmax over classes; a sigmoid for each with several labels.

    A head that starts fitted is a logistic regression with an L2 penalty; the penalty stays while everything trains.
    """

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
        self.penalised = 0.0  # weight of half the squared norm of a fitted head in the loss
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(len(classes)), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """(B, K) logits."""
        logits: Tensor = self.linear(self.read(features))
        return logits

    def read(self, features: Features) -> Tensor:
        """(B, width) pooled and normalised: sqrt(width) long before the norm is trained."""
        read: Tensor = self.norm(features.pooled(self.pooling))
        return read

    def fit(self, read: Tensor, targets: Tensor) -> None:
        """Logistic regression by L-BFGS in float64, from zero: STRENGTH * n * loss + |w|^2 / 2 for w of unit features.

        The bias is penalised, too, as the weight of one more feature, so that a class without a case stays finite.

        Args:
            read: (n, width) of the training cases.
            targets: Theirs, as for `loss`.
        """
        terms = len(self.classes) if self.multilabel else 1  # that the loss is the mean of; each label is a regression
        self.penalised = read.shape[1] / (STRENGTH * len(read) * terms)
        head = copy.deepcopy(self).cpu().double().requires_grad_(True)
        nn.init.zeros_(head.linear.weight)
        nn.init.zeros_(head.linear.bias)
        inputs, wanted = read.detach().cpu().double(), targets.cpu()
        parameters = list(head.linear.parameters())
        optimizer: Any = torch.optim.LBFGS(
            parameters, max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            value = head.loss(head.linear(inputs), wanted) + head._squared_norm()
            torch.autograd.backward(value, inputs=parameters)
            return value

        with torch.enable_grad():
            optimizer.step(objective)
        with torch.no_grad():
            self.linear.weight.copy_(head.linear.weight)
            self.linear.bias.copy_(head.linear.bias)

    def penalty(self) -> Tensor | None:
        """That of `fit`, of a fitted head."""
        return self._squared_norm() if self.penalised else None

    def _squared_norm(self) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        return self.penalised / 2 * (weight.square().sum() + bias.square().sum() / weight.shape[1])

    def targets(self, cases: Sequence[Case]) -> Tensor:
        """(n,) int64 class indices; (n, K) zeros and ones with several labels."""
        index = {name: number for number, name in enumerate(self.classes)}
        if not self.multilabel:
            return torch.tensor([index[case.labels[0]] for case in cases])
        return torch.tensor([[float(name in case.labels) for name in self.classes] for case in cases])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with targets (B,) int64; binary cross-entropy with targets (B, K) in {0, 1}."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.options.label_smoothing
        if self.multilabel:
            soft = targets.to(logits.dtype) * (1 - smoothing) + 0.5 * smoothing
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

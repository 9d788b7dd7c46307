"""What a downstream task is: a head on a backbone's features, a loss, and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from medtpp.backbones import Features, Spec
from medtpp.config import MethodOptions
from medtpp.data.case import Case
from medtpp.seeds import Seeds


class Task(nn.Module, ABC):
    """A task. Its parameters are the head.

    Class attributes:
        Options: Its pydantic options.
        summary: One line for lists.

    Args:
        options: Its options.
        spec: Of the backbone.
        classes: Names of the classes, in the order of the logits.
        multilabel: Whether a case may have several labels.
        seeds: The initial head depends on these alone.
    """

    Options: ClassVar[type[MethodOptions]]
    summary: ClassVar[str]
    options: MethodOptions
    classes: tuple[str, ...]
    multilabel: bool

    @abstractmethod
    def __init__(
        self, options: MethodOptions, spec: Spec, classes: tuple[str, ...], multilabel: bool, seeds: Seeds
    ) -> None: ...

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits of a batch."""

    @abstractmethod
    def targets(self, cases: Sequence[Case]) -> Tensor:
        """What `loss` compares with, from the labels of some cases: (n, ...)."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar: the mean over the batch."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """What predictions are made of, in float32."""

    @abstractmethod
    def balance(self, targets: Tensor) -> None:
        """Take class frequencies from the training targets, where the options ask for it."""

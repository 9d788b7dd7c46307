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
    """A task. Its parameters are the head, and those of a submodule called `decoder` where it has one.

    Class attributes:
        Options: Its pydantic options.
        summary: One line for lists.
        dense: Whether it predicts for every pixel and learns from masks.

    Attributes:
        taps: The blocks whose maps `forward` needs, for `Backbone.encode`.

    Args:
        options: Its options.
        spec: Of the backbone.
        classes: Names of the classes or structures, in the order of the logits.
        multilabel: Whether a case may have several labels, a pixel several structures.
        seeds: The initial head depends on these alone.
    """

    Options: ClassVar[type[MethodOptions]]
    summary: ClassVar[str]
    dense: ClassVar[bool] = False
    options: MethodOptions
    classes: tuple[str, ...]
    multilabel: bool
    taps: tuple[int, ...] = ()

    @abstractmethod
    def __init__(
        self, options: MethodOptions, spec: Spec, classes: tuple[str, ...], multilabel: bool, seeds: Seeds
    ) -> None: ...

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits of a batch."""

    @abstractmethod
    def targets(self, cases: Sequence[Case]) -> Tensor | None:
        """What `loss` compares with, from the labels of some cases: (n, ...). None: the masks of a batch."""

    def from_masks(self, masks: Tensor) -> Tensor:
        """What `loss` compares with, from masks (B, *spatial) as `label_mask` numbers them."""
        return masks

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar: the mean over the batch."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """What predictions are made of, in float32."""

    @abstractmethod
    def balance(self, targets: Tensor) -> None:
        """Take class frequencies from the training targets, where the options ask for it."""

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to the loss, or None."""
        return None

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Its parameters as "head" and "decoder", each with a learning rate and a file of its own; no empty group."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault("decoder" if name.startswith("decoder.") else "head", {})[name] = parameter
        return groups


class FittedTask(Task):
    """A task whose head can start where it fits features that stand still best (`finetune.head_start: fitted`)."""

    @abstractmethod
    def read(self, features: Features) -> Tensor:
        """(B, D) what the last layer of the head takes."""

    @abstractmethod
    def fit(self, read: Tensor, targets: Tensor) -> None:
        """Put that layer where loss and penalty are least for what it reads (n, D) of the training cases."""

"""What a pretext task is: a self-supervised loss on images, with a head of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec
from medtpp.config import MethodOptions
from medtpp.seeds import Draws, Seeds


class Pretext(nn.Module, ABC):
    """A self-supervised task. Its own parameters are the pretext head, which no adapter keeps.

    Class attributes:
        Options: Its pydantic options.
        summary: One line for lists, with the paper.
        needs: Capabilities that a backbone must have.

    Args:
        options: Its options.
        spec: Of the backbone that it will be used with.
        seeds: The initial head depends on these alone.
    """

    Options: ClassVar[type[MethodOptions]]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __init__(self, options: MethodOptions, spec: Spec, seeds: Seeds) -> None: ...

    @abstractmethod
    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            backbone: Tuned or plain.
            images: (B, C, *spatial) in [0, 1].
            draws: Random numbers of the batch.

        Returns:
            A scalar, and values worth logging.
        """

    def preview(self, backbone: Backbone, images: Tensor, draws: Draws) -> dict[str, Tensor]:  # noqa: ARG002
        """Pictures of what the task does, (B, C, *spatial) in [0, 1] by name; none by default."""
        return {}

    def load_head(self, state: Mapping[str, Tensor]) -> bool:
        """Start from a trained head. False, and nothing changes, where its shapes are other than this one's."""
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
            return False
        self.load_state_dict(state)
        return True

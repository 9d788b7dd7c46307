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
        couples_images: Whether the loss of an image depends on the others in its batch, so that a batch cannot be
            computed in parts.
        least_batch: Images that a batch must have at least.

    What training changes beside its parameters must be persistent buffers, changed in place: a resumed run finds them.

    Args:
        options: Its options.
        spec: Of the backbone that it will be used with.
        seeds: The initial head depends on these alone.
    """

    Options: ClassVar[type[MethodOptions]]
    summary: ClassVar[str]
    needs: frozenset[str] = frozenset()
    couples_images: bool = False
    least_batch: int = 1

    @abstractmethod
    def __init__(self, options: MethodOptions, spec: Spec, seeds: Seeds) -> None: ...

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:  # noqa: ARG003  (of a sum, its parts decide)
        """Capabilities that a backbone must have for the task with these options."""
        return cls.needs

    @property
    def name(self) -> str:
        """Under which the task is registered."""
        name: str = self.Options.model_fields["name"].default
        return name

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

    def begin(self, backbone: Backbone) -> None:
        """Called once before training, with what requires gradients in the backbone known."""

    def after_step(self, backbone: Backbone, step: int, total: int) -> None:
        """Called after each optimiser step, for tasks with averages of parameters or queues.

        Args:
            backbone: As given to `loss`.
            step: Steps done.
            total: Steps in all.
        """

    def preview(self, backbone: Backbone, images: Tensor, draws: Draws) -> dict[str, Tensor]:  # noqa: ARG002
        """Pictures of what the task does, (B, C, *spatial) in [0, 1] by name; none by default."""
        return {}

    def head_state(self) -> dict[str, Tensor]:
        """What `load_head` takes: the task's own parameters, without averages and queues."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_head(self, heads: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Start from the trained head of this task, if there is one.

        Args:
            heads: States of heads by the name of their task.

        Returns:
            False, and nothing changes, where there is none or its shapes are other than this one's.
        """
        state, own = heads.get(self.name, {}), self.head_state()
        if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
            return False
        for name, parameter in own.items():
            parameter.copy_(state[name])
        return True

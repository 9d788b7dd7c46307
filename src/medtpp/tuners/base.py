"""What a tuner is: a method that adds target parameters to a backbone, or selects some of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from medtpp.backbones import Backbone, Features
from medtpp.config import MethodOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds

O = TypeVar("O", bound=MethodOptions)  # noqa: E741  (the options of a method)


class TunedBackbone(Backbone):
    """A backbone with target parameters; itself a backbone.

    Subclasses set `targets` and implement `bypass`, `fold`, `adapter_config`, `adapter_state` and
    `load_adapter_state`.

    Attributes:
        source: The backbone it tunes. It is changed in place; `source_state()` still gives its own weights.
        targets: The target parameters, by their name among `named_parameters()`.
        embed: What inflation to volumes made new, likewise: target parameters of a group of their own. None where the
            tuner trains them as its own (`full`) or trains nothing (`linear`). Beside `targets`, they alone require
            gradients.
        relative_rates: Learning rates of targets whose own differs from the tuner's, as shares of it.
        tuner: Options of the tuner that attached it.
        start_seed: What the tuner's random parts were drawn from.
        seen_channels: Channels of the images it was trained on through the Python API, if it was.
        seen_seed: Of the last training through the Python API, if there was any.
    """

    targets: dict[str, nn.Parameter]
    embed: dict[str, nn.Parameter]
    relative_rates: dict[str, float]
    tuner: MethodOptions
    start_seed: int
    seen_channels: int | None
    seen_seed: int | None

    def __init__(self, source: Backbone) -> None:
        nn.Module.__init__(self)
        self.source = source
        self.spec = source.spec
        self.layout = source.layout
        self.inflation = source.inflation
        self.pretext_heads = source.pretext_heads
        self.options = source.options
        self.start_seed = 0
        self.seen_channels = None
        self.seen_seed = None
        self.taken = True
        self.targets = {}
        self.embed = {}
        self.relative_rates = {}

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The bare network."""
        return self.source.encoder

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        return self.source.encode(images, keep, mask, mask_token, taps)

    def source_state(self) -> dict[str, Tensor]:
        """See `Backbone.source_state`."""
        return self.source.source_state()

    def train(self, mode: bool = True) -> TunedBackbone:
        """The source decides for its encoder."""
        nn.Module.train(self, mode)
        self.source.train(mode)
        return self

    def start_from(self, losses: Iterator[Tensor], mean: Callable[[Tensor], Tensor]) -> None:
        """Called once before fine-tuning from the tuner's own start, for starts that are made from gradients.

        Args:
            losses: Of the task on some batches, each computed when it is asked for.
            mean: Over all processes, of a tensor.
        """

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss of both stages, if anything."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called after each optimiser step of fine-tuning, with its gradients, for methods that choose among targets.

        Not in TPP: what its pretext task has no use for, the labels may.

        Args:
            step: Steps done.
            total: Steps in all.
        """

    def after_step_buffers(self) -> dict[str, Tensor]:
        """What `after_step` remembers, changed in place, so that a resumed run finds it."""
        return {}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this context, the backbone computes as if there were no tuner and its embedding had just been made."""
        trained = {name: self.encoder.get_parameter(name) for name in self._untrained}
        for name, start in self._untrained.items():
            place(self.encoder, name, nn.Parameter(start.to(trained[name].device), requires_grad=False))
        try:
            with self.bypass():
                yield
        finally:
            for name, parameter in trained.items():
                place(self.encoder, name, parameter)

    @abstractmethod
    def bypass(self) -> AbstractContextManager[None]:
        """Inside this context, the tuner does nothing, for `disabled`; the embedding is not its own."""

    def merged(self) -> Backbone:
        """A plain backbone of its own with the target parameters folded into its weights.

        No name loads such weights, so no adapter can be made for them.

        Raises:
            ConfigError: The method cannot be folded in.
        """
        backbone = self.fold()
        backbone.requires_grad_(False)
        backbone.options = None
        backbone.spec = replace(backbone.spec, sha256="")
        backbone.taken = False
        backbone.settle()
        return backbone

    @abstractmethod
    def fold(self) -> Backbone:
        """A copy of the source with the target parameters in its weights, for `merged`; this one stays as it is."""

    @abstractmethod
    def adapter_config(self) -> dict[str, Any]:
        """The content of adapter_config.json: peft's own where peft has the method."""

    def adapter_state(self) -> dict[str, Tensor]:
        """The content of adapter_model.safetensors."""
        return {name: parameter.detach() for name, parameter in self.targets.items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `adapter_state` gave.

        Raises:
            WeightsError: A key is missing, unexpected or of another shape; all are listed.
        """
        check_keys(state, self.adapter_state())
        for name, parameter in self.targets.items():
            parameter.data.copy_(state[name])

    def embed_state(self) -> dict[str, Tensor]:
        """The content of embed.safetensors, by names of the encoder; empty where there is none to write."""
        return {name: self.encoder.get_parameter(name).detach() for name in self._untrained}

    def load_embed_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `embed_state` gave.

        Raises:
            WeightsError: A key is missing, unexpected or of another shape; all are listed.
        """
        check_keys(state, self.embed_state())
        for name in self._untrained:
            self.encoder.get_parameter(name).data.copy_(state[name])

    def _own(self, targets: Mapping[str, nn.Parameter]) -> None:
        """Enter the target parameters, by identity, under their names here; they and `embed` require gradients."""
        wanted = {id(parameter) for parameter in targets.values()}
        new = {name: self.encoder.get_parameter(name) for name in self.inflation.parameters if targets}
        embed = {id(parameter) for parameter in new.values()} - wanted
        self._untrained = {name: value.detach().clone() for name, value in new.items() if id(value) in embed}
        named = dict(self.named_parameters())
        self.targets = {name: parameter for name, parameter in named.items() if id(parameter) in wanted}
        self.embed = {name: parameter for name, parameter in named.items() if id(parameter) in embed}
        for name, parameter in named.items():
            parameter.requires_grad_(name in self.targets or name in self.embed)


class Tuner(ABC, Generic[O]):
    """A method of parameter-efficient fine-tuning.

    Class attributes:
        Options: Its pydantic options.
        summary: One line for lists, with the paper.
        learning_rate: Its default in both stages.
        merges: Whether `merged()` is exact (1e-5 in float32).
        has_targets: Whether there is anything for TPP to train.
        needs: Capabilities that a backbone must have.
        needs_grid: Whether it needs all patches, so that none may be dropped.
        selects: Whether it trains weights that the backbone has, and adds none, so that TPP is continued pre-training.
    """

    Options: ClassVar[type[MethodOptions]]
    summary: ClassVar[str]
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = True
    has_targets: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    needs_grid: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __init__(self, options: O) -> None:
        self.options = options

    @property
    def needs_images(self) -> bool:
        """Whether the start is made from images, so that `attach` has to get some."""
        return False

    @property
    def own_start(self) -> str | None:
        """A start that takes the place of TPP, and excludes it; by default none."""
        return None

    @abstractmethod
    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:
        """Add target parameters to a backbone, which is taken over and changed in place.

        Args:
            backbone: A plain backbone.
            seeds: The initialisation depends on these alone.
            images: (B, C, *spatial), for data-driven initialisations.

        Raises:
            ConfigError: The method does not fit this backbone.
        """


def paths_of(backbone: Backbone, *roles: str) -> tuple[str, ...]:
    """The paths of all modules with one of these roles.

    Raises:
        ConfigError: The backbone has no module for some of the roles.
    """
    missing = [role for role in roles if not backbone.layout.paths(role)]
    if missing:
        raise ConfigError(f"{backbone.spec.name} has no modules with the roles {', '.join(missing)}.")
    return backbone.layout.paths(*roles)


def parameter_of(encoder: nn.Module, name: str) -> nn.Parameter:
    """The encoder's parameter of this name, also where peft has wrapped its layer."""
    module, leaf = _owner(encoder, name)
    parameter: nn.Parameter = getattr(module, leaf)
    return parameter


def place(encoder: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter where the encoder has one of this name, also where peft has wrapped its layer."""
    module, leaf = _owner(encoder, name)
    setattr(module, leaf, parameter)


def _owner(encoder: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    module: Any = encoder.get_submodule(path)
    return getattr(module, "base_layer", module), leaf


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WeightsError that lists every missing and unexpected key and every other shape."""
    problems = [f"missing: {key}" for key in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected: {key}" for key in sorted(given.keys() - expected.keys())]
    problems += [
        f"shape of {key}: {tuple(given[key].shape)} in the file, {tuple(expected[key].shape)} here"
        for key in sorted(given.keys() & expected.keys())
        if given[key].shape != expected[key].shape
    ]
    if problems:
        raise WeightsError("The adapter does not fit this backbone and tuner.", problems)

"""Methods that train weights the backbone already has: they train copies, so that the source stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.tuners.base import TunedBackbone, parameter_of, place


class SelectedBackbone(TunedBackbone):
    """A backbone some of whose parameters are replaced by trainable copies.

    Args:
        source: The backbone.
        names: Parameters of the encoder to train, by name.
        kind: What adapter_config.json calls the method.
    """

    def __init__(self, source: Backbone, names: tuple[str, ...], kind: str) -> None:
        super().__init__(source)
        self.kind = kind
        self.names = names
        self._originals = {name: parameter_of(source.encoder, name).detach() for name in names}
        for name, original in self._originals.items():
            place(source.encoder, name, nn.Parameter(original.clone()))
        self._own({name: parameter_of(source.encoder, name) for name in names})

    def source_state(self) -> dict[str, Tensor]:
        """See `Backbone.source_state`."""
        known = {**self._originals, **self.inflation.originals}
        return {name: known.get(name, value) for name, value in super().source_state().items()}

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """See `TunedBackbone.bypass`."""
        trained = {name: parameter_of(self.encoder, name) for name in self.names}
        for name, parameter in trained.items():
            original = self._originals[name].to(parameter.device)
            place(self.encoder, name, nn.Parameter(original, requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in trained.items():
                place(self.encoder, name, parameter)

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        return copy.deepcopy(self.source)

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": self.kind, "parameters": list(self.names)}

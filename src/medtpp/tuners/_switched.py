"""Methods whose parts are hooked to modules of the backbone and can be switched off."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from medtpp.tuners.base import TunedBackbone


class SwitchedBackbone(TunedBackbone):
    """A backbone with parts that do nothing while their `enabled` is false."""

    @abstractmethod
    def parts(self) -> Any:
        """The modules with `enabled`, to go through."""

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """See `TunedBackbone.bypass`."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, enabled: bool) -> None:
        for part in self.parts():
            part.enabled = enabled


def unhook(module: nn.Module, part: nn.Module) -> None:
    """Take the forward hooks of a part off a module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is part]:
            del hooks[key]

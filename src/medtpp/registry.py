"""Registries: a new method is one new file in its package, or an entry point of another package.

A registry imports the modules of its package (and the entry points `medtpp.<kind>s`) at the first look-up, so that
naming a method costs nothing until it is used, and a file dropped in the package is found without another edit.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from medtpp.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: What the entries are, in the singular, such as "tuner"; names the entry-point group `medtpp.tuners`.
        package: The package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters a class under `name`. Raises ConfigError when the name is taken."""

        def enter(entry: type[T]) -> type[T]:
            taken = self._entries.get(name)
            if taken is not None and taken.__qualname__ != entry.__qualname__:
                raise ConfigError(f"Two {self.kind}s are called {name!r}: {taken!r} and {entry!r}. Rename one.")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> type[T]:
        """The class called `name`. Raises ConfigError that lists the names and the nearest one."""
        self._discover()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no {self.kind} called {name!r}.{hint} Known: {', '.join(self.names())}.")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, type[T]]]:
        """Pairs of name and class, sorted by name."""
        for name in self.names():
            yield name, self._entries[name]

    def values(self) -> Iterator[type[T]]:
        """The classes, sorted by name."""
        yield from (self._entries[name] for name in self.names())

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=f"medtpp.{self.kind}s"):
            point.load()

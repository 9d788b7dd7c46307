"""Errors that a user can mend: one message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class MedtppError(Exception):
    """A mistake the user can mend. The command line prints the message alone and exits with status 2.

    Args:
        message: What is wrong, in which file or field, and what to do.
        problems: Single findings to list under the message, all reported together.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.message = message
        self.problems = list(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[MedtppError], tuple[str, list[str]]]:
        return type(self), (self.message, self.problems)


class ConfigError(MedtppError):
    """An experiment file, an option or a combination of methods is not valid."""


class DataError(MedtppError):
    """A data set, an image or a manifest cannot be used as it is."""


class WeightsError(MedtppError):
    """Weights do not fit: a missing or unexpected key, another shape, another hash."""


class LeakageError(MedtppError):
    """Test cases were seen in pre-training or training."""


class OutputError(MedtppError):
    """The output folder is not empty, or cannot be written."""

"""A fine-tuned adapter as a network that runs without medtpp, with its preprocessing stated beside it.

Every target gets the same network: backbone and tuner merged where that is exact, the task's head, probabilities out.
What was written is run again and compared with the adapter before the export counts as done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from medtpp.adapter import CARD, Adapter, AdapterCard
from medtpp.config import TUNERS
from medtpp.errors import ConfigError, WeightsError
from medtpp.files import write_json
from medtpp.inference.export.bundle import write_bundle
from medtpp.inference.export.network import TOLERANCE, Written, exported_network
from medtpp.inference.export.programs import write_onnx, write_program
from medtpp.inference.export.statement import STATEMENT, statement
from medtpp.inference.export.timm_folder import no_timm_network, write_timm

TARGETS: Mapping[str, Callable[[Adapter, Path], Written]] = {
    "onnx": write_onnx,
    "torch": write_program,
    "timm": write_timm,
    "monai-bundle": write_bundle,
}
ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What `export` made.

    Attributes:
        files: Paths relative to the folder, the network first.
        merged: Whether the tuner was folded into the backbone's weights.
        batch: Whether the network takes batches of any size; else of one image.
        difference: The largest difference of its outputs from the adapter's, on random images.
    """

    files: tuple[str, ...]
    merged: bool
    batch: bool
    difference: float


def refuse(card: AdapterCard, target: str, name: str) -> None:
    """Raise ConfigError, with all reasons, for an adapter that cannot be exported to a target.

    Args:
        card: Of the adapter.
        target: One of `TARGETS`.
        name: What the message calls the adapter.
    """
    problems = []
    if card.task is None:
        problems.append(
            "it has no head: it was pre-trained (TPP) but not fine-tuned. Export what "
            "`medtpp finetune EXPERIMENT --adapter ADAPTER --out RUN` makes, RUN/adapter"
        )
    if target == "onnx" and (missing := [package for package in ONNX if find_spec(package) is None]):
        problems.append(f"{', '.join(missing)} must be installed: pip install 'medtpp[onnx]'")
    if target == "timm":
        problems += no_timm_network(card)
    if problems:
        raise ConfigError(f"{name} cannot be exported to {target}.", problems)


def export(adapter: Adapter, target: str, folder: Path) -> Exported:
    """Write a fine-tuned adapter as a network of another library.

    Args:
        adapter: Fine-tuned, on the CPU.
        target: One of `TARGETS`.
        folder: An empty folder (`medtpp.files.prepare_folder`). Beside the network it gets `preprocessing.json`, and
            `medtpp.json`, the adapter's card, which tells what was trained and on what.

    Raises:
        ConfigError: See `refuse`; or no such target.
        WeightsError: What was written computes something else than the adapter.
        OutputError: The folder cannot be written.
    """
    if target not in TARGETS:
        raise ConfigError(f"There is no export to {target}. Choose one of {', '.join(TARGETS)}.")
    refuse(adapter.card, target, "The adapter")
    write_json(folder / CARD, adapter.card.model_dump(mode="json"))
    written = TARGETS[target](adapter, folder)
    if not written.difference <= TOLERANCE:
        raise WeightsError(
            f"The network in {folder} differs from the adapter by {written.difference:.2g}, more than {TOLERANCE:g}. "
            "Do not use it. Other versions of torch may do better; see medtpp.json for those of the adapter."
        )
    write_json(folder / STATEMENT, statement(adapter, target, written))
    merges = TUNERS.get(adapter.card.tuner["name"]).merges
    return Exported((*written.files, STATEMENT, CARD), merges, written.batch, written.difference)


__all__ = ["TARGETS", "Exported", "export", "exported_network", "refuse"]

"""Foreign checkpoint files: read safely, unwrapped, matched key by key."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtpp.errors import WeightsError

# Keys under which training scripts keep the weights. DINO's teacher is the better network; MAE and timm say "model".
_WRAPPERS = ("teacher", "model_ema", "ema", "target_encoder", "model", "state_dict", "model_state_dict", "network",
             "student", "module", "backbone", "encoder")  # fmt: skip
_ANCHOR = "patch_embed.proj.weight"


@dataclass(frozen=True)
class KeyReport:
    """How a checkpoint's keys met the network's.

    Attributes:
        loaded: How many tensors were taken.
        unused: Tensors of the file that the network has no place for, such as a decoder or an old head.
    """

    loaded: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        groups: dict[str, int] = defaultdict(int)
        for key in self.unused:
            groups[key.split(".")[0]] += 1
        unused = ", ".join(f"{name} ({count})" for name, count in sorted(groups.items()))
        return f"{self.loaded} tensors loaded" + (f"; not used: {unused}" if unused else "")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a torch file read with `weights_only=True`; wrappers are taken off.

    Raises:
        WeightsError: The file is missing, broken, or holds Python objects that could run code.
    """
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # Training scripts (MAE, DINO) store their argparse options beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except WeightsError:
        raise
    except Exception as error:
        if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
            raise WeightsError(
                f"{path} holds more than tensors (Python objects, which could run code), so it is not read. "
                "Save its state dict alone, best as .safetensors."
            ) from error
        raise WeightsError(
            f"{path} cannot be read as weights; it may be incomplete ({type(error).__name__})."
        ) from error


def _unwrap(value: Any) -> dict[str, Tensor]:
    while isinstance(value, Mapping):
        tensors = {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if tensors and (inner is None or any(_ANCHOR in key for key in tensors)):
            return tensors
        if inner is None:
            break
        value = inner
    raise WeightsError("The file holds no state dict: no tensors under " + ", ".join(_WRAPPERS) + " or at the top.")


def strip_prefix(state: Mapping[str, Tensor], anchor: str = _ANCHOR) -> dict[str, Tensor]:
    """The part of a state that holds the encoder, without its prefix (`module.`, `backbone.`, `teacher.backbone.` …).

    Prefixes are found by the key that ends in `anchor`. Where there are several encoders, a teacher's is taken, and
    otherwise the one with the shortest prefix.
    """
    prefixes = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        return dict(state)
    prefix = min(prefixes, key=lambda name: ("teacher" not in name and "ema" not in name, len(name)))
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    # DINOv2's training code cuts the blocks into chunks: blocks.2.7.norm1 is block 7.
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in inside.items()}


def load_strict(network: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> KeyReport:
    """Copy a state into a network that must get every weight it has.

    Raises:
        WeightsError: Weights are missing or have another shape; all of them are listed.
    """
    own = network.state_dict()
    problems = [f"missing: {line}" for line in _fold(sorted(own.keys() - state.keys()))]
    problems += [
        f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if problems:
        raise WeightsError(
            f"The weights in {path} do not fit this architecture ({len(own.keys() & state.keys())} of {len(own)} names "
            "match). Name the architecture they were trained with.",
            problems,
        )
    network.load_state_dict({key: state[key] for key in own})
    return KeyReport(len(own), tuple(sorted(state.keys() - own.keys())))


def _fold(keys: Iterable[str]) -> list[str]:
    """Keys that differ by a block number alone, on one line."""
    folded: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        folded[re.sub(r"\.\d+\.", ".*.", key)].append(key)
    return [pattern if len(same) > 1 else same[0] for pattern, same in folded.items()]

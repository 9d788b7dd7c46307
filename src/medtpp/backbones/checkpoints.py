"""Foreign checkpoint files: read safely, unwrapped, matched key by key."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from medtpp.errors import WeightsError

# Keys under which training scripts keep the weights. DINO's teacher is the better network; MAE and timm say "model".
_WRAPPERS = ("teacher", "model_ema", "state_dict_ema", "ema", "target_encoder", "model", "state_dict",
             "model_state_dict", "network", "net", "student", "module", "backbone", "encoder")  # fmt: skip
_ANCHOR = "patch_embed.proj.weight"
# Parts that change what an encoder computes: a file that has one of these more than the network is of another network.
# So is one that has more of any part that the network has.
_ENCODER = re.compile(
    r"(blocks|patch_embed|norm_pre|norm|norm_embed)\.|(cls|reg|register|storage|dist)_tokens?$|pos_embed$"
)
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


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
    if path.is_dir():
        raise WeightsError(
            f"{path} is a folder, not a weights file. A folder made by `medtpp pretrain` is named as the backbone: "
            f"--set backbone.name={path} --set backbone.weights=pretrained."
        )
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Training scripts (MAE, DINO) store their argparse options beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise WeightsError(
                f"{path} holds Python objects ({refused[1]}), which could run code, so it is not read. "
                "Save its state dict alone, best as .safetensors."
            ) from error
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is incomplete, or no .safetensors or "
            "PyTorch file. Copy or download it again."
        ) from error
    return _unwrap(content, path)


def _unwrap(value: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(value, Mapping):
        tensors = {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if tensors and (inner is None or any(_ANCHOR in key for key in tensors)):
            return tensors
        if inner is None:
            break
        value = inner
    raise WeightsError(f"{path} holds no state dict: no tensors under {', '.join(_WRAPPERS)} or at the top.")


@contextmanager
def hub_errors(name: str, instead: str) -> Iterator[None]:
    """Turn the errors of a download into ones that say what to do.

    Args:
        name: Of the repository.
        instead: What can be done without a network.

    Raises:
        WeightsError: The repository is gated, unknown or out of reach.
    """
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"{name} asks for a licence to be accepted: do so on its page at huggingface.co, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(f"There is no hub repository {name}, or it is private (`hf auth login`).") from error
    except OSError as error:
        raise WeightsError(
            f"The weights of {name} could not be downloaded ({type(error).__name__}). Without a network, {instead}"
        ) from error


def strip_prefix(state: Mapping[str, Tensor], anchor: str = _ANCHOR) -> dict[str, Tensor]:
    """The part of a state that holds the encoder, without its prefix (`module.`, `backbone.`, `teacher.backbone.` …).

    Prefixes are found by the key that ends in `anchor`. Where there are several encoders, a teacher's is taken, and
    otherwise the one with the shortest prefix.
    """
    prefixes = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        return dict(state)
    prefix = min(prefixes, key=lambda name: ({"teacher", "ema", "model_ema"}.isdisjoint(name.split(".")), len(name)))
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    # DINOv2's training code cuts the blocks into chunks: blocks.2.7.norm1 is block 7.
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in inside.items()}


def load_strict(network: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> KeyReport:
    """Copy a state into a network that must get every weight it has, from a state with no more of an encoder than that.

    Raises:
        WeightsError: Weights are missing, have another shape, or belong to a larger network; all of them are listed.
    """
    own = network.state_dict()
    unused = sorted(state.keys() - own.keys())
    shapes = {
        f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    }
    problems = [f"missing: {line}" for line in fold(own.keys() - state.keys())]
    parts = {key.split(".")[0] for key in own}
    more = [key for key in unused if _ENCODER.match(key) or key.split(".")[0] in parts]
    problems += [f"unexpected: {line}" for line in fold(more)]
    problems += fold(shapes)
    if problems:
        raise WeightsError(
            f"The weights in {path} do not fit this architecture ({len(own.keys() & state.keys())} of {len(own)} names "
            f"match). Name the architecture they were trained with. {describe(state)}".rstrip(),
            problems,
        )
    network.load_state_dict({key: state[key] for key in own})
    return KeyReport(len(own), tuple(unused))


def describe(state: Mapping[str, Tensor]) -> str:
    """Width, depth and patch of the vision transformer in a state, with a timm name of that size; empty if none is."""
    depth = len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})
    if _ANCHOR not in state or not depth:
        return ""
    width, patch = state[_ANCHOR].shape[0], state[_ANCHOR].shape[-1]
    size = _SIZES.get((width, depth))
    scaled, registers = "blocks.0.ls1.gamma" in state, state.get("reg_token")
    name = f"vit_{size}_patch{patch}_224"
    if scaled and patch == 14:
        name = f"vit_{size}_patch14" + ("" if registers is None else f"_reg{registers.shape[1]}") + "_dinov2"
    return f"The file holds {depth} blocks of width {width} for patches of {patch} pixels" + (
        f", such as {name}." if size else "."
    )


def fold(lines: Iterable[str]) -> list[str]:
    """Lines that differ by a block number alone, on one line with their count."""
    folded: dict[str, list[str]] = defaultdict(list)
    for line in sorted(lines):
        folded[re.sub(r"\.\d+\.", ".*.", line)].append(line)
    return [f"{pattern} ({len(same)})" if len(same) > 1 else same[0] for pattern, same in folded.items()]

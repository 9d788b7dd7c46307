"""Networks of Hugging Face `transformers` and their weights: found, read safely, matched key by key."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from medtpp.backbones.checkpoints import fold, hub_errors
from medtpp.errors import ConfigError, WeightsError
from medtpp.files import read_json
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)

PREFIX = "transformers:"
# By the model_type of a config.json: the class that reads its weights. MAE's has a decoder around the encoder.
CLASSES = {
    "vit": "ViTModel",
    "vit_mae": "ViTMAEForPreTraining",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
}
# What `encode` does not call, so that `full` could not train it: what pools, and the mask token of the pre-training.
UNUSED = ("pooler", "head", "embeddings.mask_token")


def fetch(name: str, revision: str | None, *patterns: str) -> Path:
    """The folder that the name is, or files of a hub repository in the hub's cache.

    Raises:
        ConfigError: A revision is asked of a folder.
        WeightsError: The name is neither, or files cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"backbone.revision chooses weights of the hub, and {name} is a folder.")
        return folder
    with hub_errors(name, f"name a folder with its files: --set backbone.name={PREFIX}FOLDER."):
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except HFValidationError as error:
            raise WeightsError(f"There is no folder {name}, and no hub repository can be called so.") from error


def _class_of(folder: Path) -> Any:
    """The class of transformers for a folder's config.json."""
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json, which `save_pretrained` of transformers writes.")
    try:
        kind = read_json(path).get("model_type")
    except ValueError as error:
        raise WeightsError(f"{path} is broken. Make or copy the folder again.") from error
    if kind not in CLASSES:
        raise ConfigError(
            f"{folder} holds a network of the type {kind}. Of transformers, medtpp reads {', '.join(CLASSES)}."
        )
    return getattr(transformers, CLASSES[kind])


def make_random(folder: Path) -> Any:
    """A network with weights that are the same on every load."""
    kind = _class_of(folder)
    with _quiet(), Seeds(0).scope("backbone", kind.__name__):
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True)).eval()


def load_pretrained(name: str, revision: str | None) -> Any:
    """A network with its weights, as 32-bit floats.

    Raises:
        ConfigError: It is of a kind that is not read.
        WeightsError: Weights are missing, broken, of another shape, or of a larger network.
    """
    kind = _class_of(fetch(name, revision, "config.json"))
    folder = fetch(name, revision, "model*.safetensors", "model.safetensors.index.json")
    if not any(folder.glob("*.safetensors")):
        folder = fetch(name, revision, "pytorch_model*.bin", "pytorch_model.bin.index.json")
    try:
        with _quiet():
            network, report = kind.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                weights_only=True,  # of a torch file
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        raise WeightsError(
            f"The weights in {folder} cannot be read ({type(error).__name__}): {error}. Make or copy the folder again."
        ) from error
    missing, unused = report["missing_keys"], report["unexpected_keys"]
    if any(key.startswith("decoder.") for key in missing):
        network.decoder = None  # the file is of a MAE's encoder alone
    parts = {key.removeprefix("vit.").split(".")[0] for key in network.state_dict() if _needed(key)}
    outer = f"{network.base_model_prefix}."
    # Of a head or a text tower the file may have what it likes; of an encoder, no more than there is a place for.
    more = [
        key
        for key in unused
        if any(_needed(name) and name.split(".")[0] in parts for name in (key, key.removeprefix(outer)))
    ]
    problems = [f"missing: {line}" for line in fold(filter(_needed, missing))]
    problems += [f"unexpected: {line}" for line in fold(more)]
    problems += fold(
        f"shape of {key}: {tuple(given)} in the file, {tuple(wanted)} by config.json"
        for key, given, wanted in report["mismatched_keys"]
    )
    if problems:
        raise WeightsError(f"The weights in {folder} do not fit its config.json.", problems)
    groups = sorted({key.split(".")[0] for key in unused})
    log.info("%s: all weights loaded; not used: %s", name, ", ".join(groups) or "none")
    return network


def _needed(name: str) -> bool:
    """Whether a weight has a part in what is encoded. Old files hold the numbers of positions."""
    inside = name.removeprefix("vit.")
    return not inside.startswith((*UNUSED, "decoder.")) and not inside.endswith("position_ids")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows neither its report on keys, which are judged here, nor progress."""
    import transformers

    theirs: Any = transformers.utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation from the settings of the image processor, 0.5 where there are none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        values = values.get("image_processor", values)
        if not values.get("do_normalize", True):
            return (0.0,), (1.0,)
        if "image_mean" in values and "image_std" in values:
            return values["image_mean"], values["image_std"]
    log.warning("%s says nothing of normalisation: mean and deviation are taken to be 0.5.", folder)
    return (0.5,), (0.5,)


def mae_head(network: Any) -> Mapping[str, Tensor]:
    """The decoder of a MAE as the head of the pretext task `mae`; empty where it is none, or predicts other targets.

    Its positions are sines and cosines of columns, then of rows; the pretext task has rows first. So the two halves of
    the decoder's channels are swapped.
    """
    decoder = getattr(network, "decoder", None)
    if decoder is None or not network.config.norm_pix_loss:
        return {}
    width, state = network.config.decoder_hidden_size, decoder.state_dict()
    if decoder.config.num_attention_heads != width // 32:
        return {}

    def linear(name: str, new: str, swapped: int | None) -> dict[str, Tensor]:
        """A layer that gives (0) or gets (1) the decoder's channels."""
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        weight = weight if swapped is None else weight.roll(width // 2, swapped)
        return {f"{new}.weight": weight, f"{new}.bias": bias.roll(width // 2, 0) if swapped == 0 else bias}

    head = {"mask_token": state["mask_token"].flatten().roll(width // 2, 0)}
    head |= linear("decoder_embed", "embed", 0) | linear("decoder_pred", "predict", 1)
    head |= linear("decoder_norm", "norm", 0)
    for index in range(len(decoder.decoder_layers)):
        old, new = f"decoder_layers.{index}", f"blocks.{index}"
        parts = [linear(f"{old}.attention.{part}", "qkv", 1) for part in ("q_proj", "k_proj", "v_proj")]
        head |= {f"{new}.attn.{key}": torch.cat([part[key] for part in parts]) for key in parts[0]}
        head |= linear(f"{old}.attention.o_proj", f"{new}.attn.proj", 0)
        head |= linear(f"{old}.layernorm_before", f"{new}.norm1", 0) | linear(f"{old}.mlp.fc1", f"{new}.mlp.fc1", 1)
        head |= linear(f"{old}.layernorm_after", f"{new}.norm2", 0) | linear(f"{old}.mlp.fc2", f"{new}.mlp.fc2", 0)
    return head

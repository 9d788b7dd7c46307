"""A backbone in a folder, as `medtpp pretrain` writes it: weights, specification, pretext heads, fingerprints.

backbone.json                # versioned: architecture, normalisation, how it was trained
model.safetensors            # the encoder, with timm's names
pretext_<name>.safetensors   # the pretext task's own head, so that TPP starts from a trained one
fingerprints.json            # of the images and patients it was trained on
README.md                    # a model card
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medtpp.backbones.base import Backbone, hash_state
from medtpp.backbones.checkpoints import load_strict
from medtpp.backbones.timm_names import create_network, objective_of
from medtpp.backbones.timm_vit import fit_to, wrap_vit
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.data.fingerprints import Fingerprints
from medtpp.errors import WeightsError
from medtpp.files import atomic, read_json, write_json

SCHEMA = 1
EMBEDDED = Path(__file__).parent / "weights"


@BACKBONES.register("folder")
class FolderFamily:
    """Backbones that `medtpp pretrain` made, and those that come with the package."""

    summary: ClassVar[str] = "a folder made by `medtpp pretrain`, or a backbone that comes with medtpp"
    examples: ClassVar[tuple[str, ...]] = ("medtpp_vit_tiny",)

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name is an embedded backbone or a folder with a backbone.json."""
        return (locate(name) / "backbone.json").is_file()

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Load the folder's backbone; `weights: random` gives its architecture untrained.

        Raises:
            WeightsError: A file is missing, of another schema, or not the one that was written.
        """
        folder = locate(options.name)
        try:
            card = read_json(folder / "backbone.json")
        except ValueError as error:
            raise WeightsError(f"{folder / 'backbone.json'} is broken. Make or copy the folder again.") from error
        if card.get("schema") != SCHEMA:
            raise WeightsError(f"{folder} has backbone schema {card.get('schema')}; this medtpp reads {SCHEMA}.")
        arguments = {"num_classes": 0, "img_size": card["image_size"], "in_chans": card["channels"]}
        encoder: Any = create_network(card["architecture"], arguments)
        if options.weights == "pretrained":
            state = {key: value.float() for key, value in _read(folder / "model.safetensors").items()}
            load_strict(encoder, state, folder)
            if hash_state(encoder.state_dict()) != card["sha256"]:
                raise WeightsError(
                    f"The weights in {folder} are not those its backbone.json names. Copy the folder again."
                )
        elif options.weights != "random":
            raise WeightsError(
                f"{options.name} brings its own weights: leave backbone.weights at pretrained or random."
            )
        sha256 = hash_state(encoder.state_dict())
        encoder.pretrained_cfg = {"mean": card["mean"], "std": card["std"]}
        inflation = fit_to(encoder, options, image_size)
        backbone = wrap_vit(
            encoder,
            options.name,
            card["architecture"],
            str(folder.resolve()),
            sha256,
            family="folder",
            objective=objective_of(card["objective"]) if options.weights == "pretrained" else "unknown",
            inflation=inflation,
        )
        # Heads for patches of images know nothing of patches of volumes, even where they happen to be as many numbers.
        if options.weights == "pretrained" and inflation is None:
            backbone.pretext_heads = {
                path.stem.removeprefix("pretext_"): {key: value.float() for key, value in _read(path).items()}
                for path in sorted(folder.glob("pretext_*.safetensors"))
            }
        return backbone

    @staticmethod
    def around(network: torch.nn.Module, image_size: tuple[int, ...]) -> None:  # noqa: ARG004  (a family's signature)
        """Networks in memory belong to the family of their class."""
        return


def locate(name: str) -> Path:
    """The folder of an embedded backbone, or the folder that the name is."""
    embedded = EMBEDDED / name
    return embedded if name and "/" not in name and embedded.is_dir() else Path(name).expanduser()


def seen_by(options: BackboneOptions) -> Fingerprints:
    """Fingerprints of what a backbone's weights were trained on, where its folder tells."""
    path = locate(options.name) / "fingerprints.json"
    known = options.weights == "pretrained" and path.is_file()
    return Fingerprints.model_validate(read_json(path)) if known else Fingerprints()


def save_backbone(
    folder: Path,
    encoder_state: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    card: Mapping[str, Any],
    fingerprints: Fingerprints,
    *,
    half: bool = False,
) -> None:
    """Write a backbone folder.

    Args:
        folder: Where to.
        encoder_state: timm's names to weights.
        heads: Pretext heads by task name.
        card: architecture, image_size, channels, mean, std, objective and what is worth telling of the training.
        fingerprints: Of the images and patients that were seen.
        half: Store 16-bit floats; half the size, at a relative rounding of 5e-4.
    """
    kind = torch.float16 if half else torch.float32
    stored = {key: value.detach().cpu().to(kind).contiguous() for key, value in encoder_state.items()}
    _write(folder / "model.safetensors", stored)
    for name, head in heads.items():
        kept = {key: value.detach().cpu().to(kind).contiguous() for key, value in head.items()}
        _write(folder / f"pretext_{name}.safetensors", kept)
    write_json(folder / "fingerprints.json", fingerprints.model_dump())
    sha256 = hash_state({key: value.float() for key, value in stored.items()})
    write_json(folder / "backbone.json", {"schema": SCHEMA, **card, "sha256": sha256})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except Exception as error:
        raise WeightsError(
            f"{path} is missing or broken ({type(error).__name__}). Make or copy the folder again."
        ) from error


def _write(path: Path, state: dict[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file(state, temporary)

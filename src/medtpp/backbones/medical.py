"""Published networks for medical images that a timm name does not describe: their layers or normalisation are other.

Their repositories leave these to Python code, so that a name and a file would not be enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import SwiGLUPacked
from torch import nn

from medtpp.backbones.base import Backbone, hash_state
from medtpp.backbones.checkpoints import hub_errors, read_checkpoint, strip_prefix
from medtpp.backbones.timm_names import create_network
from medtpp.backbones.timm_vit import drop_unused, fill, fit_to, wrap_vit
from medtpp.config import BACKBONES, BackboneOptions


@dataclass(frozen=True)
class Published:
    """A network and where its weights are.

    Attributes:
        architecture: timm's name of the nearest network.
        repository: On the Hugging Face hub.
        arguments: What is other than in timm's network.
        file: Of the weights in the repository, of which there may be a safetensors version.
        objective: See `Spec`.
        mean, std: Normalisation of images in [0, 1].
    """

    architecture: str
    repository: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    file: str = "pytorch_model.bin"
    objective: str = "features"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


# DINOv2's ViT-H: LayerScale, and an MLP with a gate, in one layer with what it gates.
_GATED = {"init_values": 1e-5, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
_VIRCHOW = {**_GATED, "mlp_ratio": 5.3375}
NETWORKS = {
    "uni": Published("vit_large_patch16_224", "MahmoodLab/UNI", {"init_values": 1e-5}),
    "uni2_h": Published(
        "vit_giant_patch14_224",
        "MahmoodLab/UNI2-h",
        {
            **_GATED,
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "mlp_ratio": 2.66667 * 2,
            "reg_tokens": 8,
            "no_embed_class": True,
        },
    ),
    "virchow": Published("vit_huge_patch14_224", "paige-ai/Virchow", _VIRCHOW),
    "virchow2": Published("vit_huge_patch14_224", "paige-ai/Virchow2", {**_VIRCHOW, "reg_tokens": 4}),
    "biomedclip": Published(
        "vit_base_patch16_224",
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        file="open_clip_pytorch_model.bin",
        objective="language",
        mean=OPENAI_CLIP_MEAN,
        std=OPENAI_CLIP_STD,
    ),
}


@BACKBONES.register("medical")
class MedicalFamily:
    """Builds the networks of the table, from the hub or from their file."""

    summary: ClassVar[str] = "published networks by their own names: UNI, UNI2-h, Virchow, Virchow2, BiomedCLIP"
    examples: ClassVar[tuple[str, ...]] = tuple(NETWORKS)

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether it is a name of the table."""
        return name in NETWORKS

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Make the network, load its weights, then resample (and inflate) positions and patches.

        Raises:
            ConfigError: The network cannot take this size.
            WeightsError: Weights cannot be downloaded, read or matched.
        """
        name, published = options.name, NETWORKS[options.name]
        encoder: Any = create_network(published.architecture, {"num_classes": 0, **published.arguments})
        source, objective, state = options.weights, published.objective, {}
        if source == "random":
            objective = "unknown"
        elif source == "pretrained":
            repository = published.repository + (f"@{options.revision}" if options.revision else "")
            source = f"hf-hub:{repository}"
            with hub_errors(repository, "give a local file: --set backbone.weights=FILE."):
                state = timm.models.load_state_dict_from_hf(repository, published.file, weights_only=True)
        else:
            state = read_checkpoint(Path(source).expanduser())
        if state:
            fill(encoder, strip_prefix(state), source)
        sha256 = hash_state(encoder.state_dict())
        drop_unused(encoder)
        encoder.pretrained_cfg = {"mean": published.mean, "std": published.std}
        inflation = fit_to(encoder, options, image_size)
        return wrap_vit(encoder, name, name, source, sha256, family="medical", objective=objective, inflation=inflation)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> None:  # noqa: ARG004  (a family's signature)
        """In memory they are timm ViTs like others."""
        return

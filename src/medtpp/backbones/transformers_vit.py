"""Vision transformers of Hugging Face `transformers`: ViT, MAE, DINOv2, DINOv3, and the towers of SigLIP and CLIP.

The encoder is the library's own network with its own names, so that `peft` reads an adapter onto
`AutoModel.from_pretrained(...)`. For SigLIP and CLIP that is `SiglipVisionModel` and `CLIPVisionModel`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medtpp.backbones.base import (
    PLAIN_VIT,
    Backbone,
    Features,
    Layout,
    Spec,
    gather_tokens,
    hash_state,
    mask_tokens,
    other_dims,
    patch_map,
    per_channel,
)
from medtpp.backbones.inflate import require_whole, sides
from medtpp.backbones.timm_names import objective_of
from medtpp.backbones.transformers_weights import (
    CLASSES,
    PREFIX,
    UNUSED,
    fetch,
    load_pretrained,
    mae_head,
    make_random,
    normalisation,
)
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError

_ENCODERS = {*CLASSES.values(), "ViTMAEModel"} - {"ViTMAEForPreTraining"}

# Where the classes keep their parts; each has one of the names in a row, or none.
_PATCHES = ("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings", "embeddings.patch_embedding")
_BLOCKS = ("layers", "encoder.layer", "encoder.layers", "model.layer")
_NORMS = ("layernorm", "norm", "post_layernorm")
_QKV = ("q_proj", "k_proj", "v_proj")
_INSIDE = {
    "attention.qkv": tuple(f"{attention}.{part}" for attention in ("attention", "self_attn") for part in _QKV),
    "attention.projection": ("attention.o_proj", "self_attn.out_proj"),
    "mlp.in": ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
    "mlp.out": ("mlp.fc2", "mlp.down_proj"),
    "norm.attention": ("norm1", "layernorm_before", "layer_norm1"),
    "norm.mlp": ("norm2", "layernorm_after", "layer_norm2"),
}


class TransformersViT(Backbone):
    """A vision transformer of `transformers`, run block by block so that tokens can be dropped, masked and tapped."""

    encoder: Any

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        self.check_taps(keep, taps)
        prefix, grid = self.spec.prefix, self.spec.grid
        pixels = self.normalise(images)
        x = self._part("embed.patch")(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        x = self._add_prefix(mask_tokens(x, mask, mask_token))  # (B, P + N, D), with absolute positions
        rotations = self._rotations(pixels)
        if keep is not None:
            x = torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1)  # (B, P + K, D)
            rotations = tuple(part[keep][:, None] for part in rotations)  # (N, R) to (B, 1, K, R)
        if hasattr(self.encoder, "pre_layrnorm"):  # CLIP's, spelt so
            x = self.encoder.pre_layrnorm(x)
        positions = {"position_embeddings": rotations} if rotations else {}
        maps = []
        for index, path in enumerate(self.layout.blocks):
            x = self.encoder.get_submodule(path)(x, attention_mask=None, **positions)
            if index in taps:
                maps.append(patch_map(x, prefix, grid))
        tokens = self._part("norm.final")(x)
        return Features(images, tokens, prefix, grid, tuple(maps), (self.spec.patch,) * len(maps))

    def _part(self, role: str) -> nn.Module:
        return self.encoder.get_submodule(self.layout.paths(role)[0])  # type: ignore[no-any-return]

    def _add_prefix(self, x: Tensor) -> Tensor:
        """Class token, positions, registers: (B, N, D) to (B, P + N, D)."""
        embeddings = self.encoder.embeddings
        first = _class_token(embeddings)
        if first is not None:
            x = torch.cat([first.view(1, 1, -1).expand(x.shape[0], -1, -1), x], dim=1)
        if hasattr(embeddings, "interpolate_pos_encoding"):
            x = x + embeddings.interpolate_pos_encoding(x, *self.spec.image_size)
        registers = getattr(embeddings, "register_tokens", None)
        if registers is not None:
            x = torch.cat([x[:, :1], registers.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x

    def _rotations(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines (N, R) of DINOv3's rotary positions; empty for other networks."""
        rope = getattr(self.encoder, "rope_embeddings", None)
        return () if rope is None else tuple(rope(pixels))


@BACKBONES.register("transformers")
class TransformersFamily:
    """Builds `TransformersViT` backbones from a folder, from the hub, or around a network that exists."""

    summary: ClassVar[str] = (
        "vision transformers of Hugging Face transformers (ViT, MAE, DINOv2, DINOv3, SigLIP, CLIP), of the hub or in a "
        "folder"
    )
    examples: ClassVar[tuple[str, ...]] = (
        "transformers:microsoft/rad-dino",
        "transformers:owkin/phikon-v2",
        "transformers:google/medsiglip-448",
    )

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name says that it is one of `transformers`."""
        return name.startswith(PREFIX)

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Load a network and its weights, which stay as they are: positions are resampled on the way.

        Raises:
            ConfigError: The network is of another kind, or cannot take this size, these patches or volumes.
            WeightsError: Weights cannot be downloaded, read or matched.
        """
        if options.dims == 3:
            raise other_dims(options.name, 2, 3)
        if options.weights not in ("pretrained", "random"):
            raise WeightsError(
                f"{options.name} brings its own weights: leave backbone.weights at pretrained or random. Weights of "
                f"your own go into a folder, with `save_pretrained`: --set backbone.name={PREFIX}FOLDER."
            )
        name, random = options.name.removeprefix(PREFIX), options.weights == "random"
        local = Path(name).expanduser().is_dir()
        folder = fetch(name, options.revision, "config.json", "*processor_config.json")
        network = make_random(folder) if random else load_pretrained(name, options.revision)
        encoder = getattr(network, "vit", network)
        for path in UNUSED:
            owner, _, leaf = path.rpartition(".")
            if hasattr(encoder.get_submodule(owner), leaf):
                setattr(encoder.get_submodule(owner), leaf, None)
        if hasattr(encoder, "use_head"):  # of SigLIP
            encoder.use_head = False
        revision = f"@{options.revision}" if options.revision else ""
        backbone = wrap_transformers(
            encoder,
            options.name,
            type(encoder).__name__ if local else name,
            "random" if random else f"{options.name}{revision}",
            hash_state(encoder.state_dict()),
            objective="unknown" if random else _objective(encoder, Path(name).name if local else name),
            image_size=image_size,
            normalisation=normalisation(folder),
        )
        for field, own in (("patch_size", backbone.spec.patch), ("channels", (backbone.spec.channels,))):
            wanted = getattr(options, field)
            if wanted not in (None, own, own[0]):
                raise ConfigError(
                    f"backbone.{field} is {wanted}: {options.name} has {own[0]}, and networks of transformers keep it."
                )
        if not random and (head := mae_head(network)):
            backbone.pretext_heads = {"mae": head}
        return backbone

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone around an existing encoder that takes normalised images; None for another network."""
        # By name, so that nothing is imported: where there is such a network, transformers is there already.
        classes = {kind.__name__ for kind in type(network).__mro__ if kind.__module__.startswith("transformers.")}
        if not classes & _ENCODERS:
            return None
        name = type(network).__name__
        backbone = wrap_transformers(network, name, name, "in memory", "", image_size=image_size)
        backbone.take_normalised()
        return backbone


def wrap_transformers(
    encoder: Any,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    *,
    objective: str = "unknown",
    image_size: int | tuple[int, ...] | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] = ((0.5,), (0.5,)),
) -> TransformersViT:
    """A network of transformers as a backbone, with its specification read off it.

    Raises:
        ConfigError: The image size is not made of whole patches, or parts are not where they are looked for.
    """
    layout = transformers_layout(encoder)
    patches = encoder.get_submodule(layout.paths("embed.patch")[0])
    embeddings, patch = encoder.embeddings, tuple(patches.kernel_size)
    registers = getattr(embeddings, "register_tokens", None)
    has_class = _class_token(embeddings) is not None
    size = sides(image_size, 2) or sides(encoder.config.image_size, 2) or ()
    require_whole(size, patch)
    mean, std = normalisation
    spec = Spec(
        name=name,
        family="transformers",
        architecture=architecture,
        dims=2,
        channels=patches.in_channels,
        mean=per_channel(mean, patches.in_channels),
        std=per_channel(std, patches.in_channels),
        image_size=size,
        patch=patch,
        width=patches.out_channels,
        depth=len(layout.blocks),
        prefix=has_class + (0 if registers is None else registers.shape[1]),
        pooling="mean" if objective == "pixels" or not has_class else "cls",
        objective=objective,
        capabilities=PLAIN_VIT,
        source=source,
        sha256=sha256,
    )
    return TransformersViT(encoder, spec, layout)


def transformers_layout(encoder: nn.Module) -> Layout:
    """Access points of a network of transformers.

    Raises:
        ConfigError: This version of transformers has other names for them.
    """
    modules = dict(encoder.named_modules())
    (patches, listed, norm) = (
        next((name for name in names if name in modules), "") for names in (_PATCHES, _BLOCKS, _NORMS)
    )
    blocks = tuple(path for path in modules if re.fullmatch(rf"{re.escape(listed)}\.\d+", path))
    roles = {
        role: tuple(f"{block}.{part}" for block in blocks for part in parts if f"{block}.{part}" in modules)
        for role, parts in _INSIDE.items()
    }
    roles |= {"embed.patch": (patches,), "norm.final": (norm,)}
    if not blocks or not all(path for paths in roles.values() for path in paths or ("",)):
        from transformers import __version__

        raise ConfigError(
            f"The layers of {type(encoder).__name__} have other names in transformers {__version__}. "
            "Install transformers 5.24 or a later 5: pip install 'transformers>=5.24,<6'."
        )
    return Layout(blocks, roles)


def _class_token(embeddings: Any) -> Tensor | None:
    """(..., D), or None; CLIP calls it otherwise."""
    token: Tensor | None = getattr(embeddings, "cls_token", getattr(embeddings, "class_embedding", None))
    return token


def _objective(encoder: Any, name: str) -> str:
    """What a network was pre-trained for, by its class, or by its name where the class does not tell."""
    own = objective_of(type(encoder).__name__)
    return own if own != "unknown" else objective_of(name)

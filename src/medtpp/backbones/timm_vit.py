"""Plain vision transformers of timm: ViT, DeiT, DINOv2 (registers), DINOv3 and other Eva models (rotary positions)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as convert_eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor, nn

from medtpp.backbones.base import Backbone, Features, Layout, Spec, gather_tokens, hash_state
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)


class TimmViT(Backbone):
    """A timm `VisionTransformer` or `Eva`, run block by block so that tokens can be dropped, masked and tapped."""

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
        if taps and keep is not None:
            raise ConfigError("Feature maps need all patches: taps and keep exclude each other.")
        prefix, grid = self.spec.prefix, self.spec.grid
        x = self.encoder.patch_embed(self.normalise(images))  # (B, N, D), or (B, *grid, D) at dynamic image sizes
        if mask is not None:
            token = x.new_zeros(x.shape[-1]) if mask_token is None else mask_token.to(x.dtype)
            x = torch.where(mask.view(*x.shape[:-1], 1), token, x)
        x = self.encoder._pos_embed(x)  # (B, P + N, D)
        x, rope = x if isinstance(x, tuple) else (x, None)
        if keep is not None:
            x = torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1)  # (B, P + K, D)
            if rope is not None:  # (N, R) to (B, 1, K, R), the head dimension being 1
                rope = rope[keep][:, None]
        x = self.encoder.norm_pre(x)
        maps = []
        for index, block in enumerate(self.encoder.blocks):
            x = block(x) if rope is None else block(x, rope=rope)
            if index in taps:
                maps.append(x[:, prefix:].transpose(1, 2).unflatten(2, grid))  # (B, D, *grid)
        return Features(images, self.encoder.norm(x), prefix, grid, tuple(maps), (self.spec.patch,) * len(maps))


@BACKBONES.register("timm_vit")
class TimmViTFamily:
    """Builds `TimmViT` backbones by timm name, from the hub, or around a network that exists."""

    summary: ClassVar[str] = "plain vision transformers of timm: ViT, DeiT, DINOv2, DINOv3, EVA-02, any by name"
    examples: ClassVar[tuple[str, ...]] = (
        "vit_small_patch16_224.dino",
        "vit_base_patch16_224.mae",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
    )

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name is a timm model of a supported class, with or without `timm/`, or a hub repository."""
        if name.startswith(("hf-hub:", "hf_hub:")):
            return True
        plain = name.removeprefix("timm/").split(".")[0]
        if not timm.is_model(plain):
            return False
        return timm.models.model_entrypoint(plain).__module__ in (
            "timm.models.vision_transformer",
            "timm.models.deit",
            "timm.models.eva",
        )

    @staticmethod
    def build(options: BackboneOptions, image_size: int | None) -> Backbone:
        """Make the network at its native size, load its weights, then resample positions and patches.

        Raises:
            ConfigError: The architecture is not a plain ViT, or cannot take this size.
            WeightsError: Weights cannot be downloaded, read or matched.
        """
        name = options.name.removeprefix("timm/")
        local = options.weights not in ("pretrained", "random")
        arguments: dict[str, Any] = {"num_classes": 0, "pretrained": False, "dynamic_img_size": False}
        state: dict[str, Tensor] | None = None
        if local:
            state = strip_prefix(read_checkpoint(Path(options.weights)))
            arguments["img_size"] = _native_size(state)
        elif options.weights == "pretrained":
            arguments["pretrained"] = True
            if options.revision:
                cfg = timm.models.get_pretrained_cfg(name)
                repository = cfg.hf_hub_id if cfg and cfg.hf_hub_id else name
                arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{repository}@{options.revision}"}
        encoder = create_network(name, {key: value for key, value in arguments.items() if value is not None})
        if state is not None:
            convert = convert_eva if isinstance(encoder, Eva) else convert_vit
            report = load_strict(encoder, convert(state, encoder), options.weights)
            log.info("%s: %s", options.weights, report)
        sha256 = hash_state(encoder.state_dict())
        resample(encoder, image_size, options.patch_size)
        source = options.weights if local else f"timm:{name}" + (f"@{options.revision}" if options.revision else "")
        return wrap_vit(encoder, options.name, name, source, sha256)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone around an existing timm ViT that takes normalised images; None for another network."""
        if not isinstance(network, VisionTransformer | Eva):
            return None
        name = type(network).__name__
        backbone = wrap_vit(network, name, name, "in memory", "", image_size if network.dynamic_img_size else None)
        backbone.mean.zero_()
        backbone.std.fill_(1.0)
        return backbone


def wrap_vit(
    encoder: nn.Module,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    image_size: tuple[int, ...] | None = None,
) -> TimmViT:
    """A timm network as a backbone, with its specification read off it.

    Raises:
        ConfigError: The network is not a plain ViT with a square grid of tokens.
    """
    if not isinstance(encoder, VisionTransformer | Eva):
        raise ConfigError(f"{architecture} is a {type(encoder).__name__}, not a plain vision transformer.")
    if getattr(encoder, "rope_mixed", False):
        raise ConfigError(f"{architecture} learns rotary positions per layer, which cannot follow dropped tokens.")
    for block in encoder.blocks:
        # Eva adds the query and value biases inside F.linear on the bare weight, which would pass LoRA by.
        if getattr(block.attn, "qkv_bias_separate", None) is False:
            block.attn.qkv_bias_separate = True
    cfg: dict[str, Any] = encoder.pretrained_cfg
    patch = tuple(encoder.patch_embed.patch_size)
    size = image_size or tuple(n * p for n, p in zip(encoder.patch_embed.grid_size, patch, strict=True))
    channels = encoder.patch_embed.proj.in_channels
    spec = Spec(
        name=name,
        family="timm_vit",
        architecture=architecture,
        dims=2,
        channels=channels,
        mean=_per_channel(cfg.get("mean", (0.5,)), channels),
        std=_per_channel(cfg.get("std", (0.5,)), channels),
        image_size=size,
        patch=patch,
        width=encoder.embed_dim,
        depth=len(encoder.blocks),
        prefix=encoder.num_prefix_tokens,
        pooling=_pooling(encoder, cfg),
        objective=_objective(f"{architecture}.{cfg.get('tag', '')}"),
        capabilities=frozenset({"drops_tokens", "dense", "inflates_3d"}),
        source=source,
        sha256=sha256,
    )
    return TimmViT(encoder, spec, vit_layout(encoder))


def vit_layout(encoder: Any) -> Layout:
    """Access points of a timm ViT, with fused or separate query, key and value, plain or gated MLP."""
    inside = {
        "attention.qkv": ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attention.projection": ("attn.proj",),
        "mlp.in": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),
        "mlp.out": ("mlp.fc2",),
        "norm.attention": ("norm1",),
        "norm.mlp": ("norm2",),
    }
    modules = dict(encoder.named_modules())
    blocks = tuple(f"blocks.{index}" for index in range(len(encoder.blocks)))
    roles = {
        role: tuple(
            f"{block}.{part}" for block in blocks for part in parts if modules.get(f"{block}.{part}") is not None
        )
        for role, parts in inside.items()
    }
    final = () if isinstance(encoder.norm, nn.Identity) else ("norm",)
    return Layout(blocks, {"embed.patch": ("patch_embed.proj",), **roles, "norm.final": final})


def resample(encoder: Any, image_size: int | None, patch_size: int | None) -> None:
    """Resample positions to another image size and the patch embedding to another patch size, in place."""
    patch = patch_size or encoder.patch_embed.patch_size[0]
    size = image_size or encoder.patch_embed.grid_size[0] * encoder.patch_embed.patch_size[0]
    if size % patch:
        below, above = size // patch * patch, -(-size // patch) * patch
        raise ConfigError(
            f"An image size of {size} is not a multiple of the patch size {patch}. "
            f"Use --set data.image_size={below or above} or {above}."
        )
    if (size, patch) != (encoder.patch_embed.img_size[0], encoder.patch_embed.patch_size[0]):
        encoder.set_input_size(img_size=(size, size), patch_size=(patch, patch) if patch_size else None)


def create_network(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model`, with errors that a user can read."""
    try:
        with Seeds(0).scope("backbone", name):  # random weights are the same on every load
            network: nn.Module = timm.create_model(name, **arguments)
    except (OSError, ConnectionError) as error:
        raise WeightsError(
            f"The weights of {name} could not be downloaded ({type(error).__name__}). Without a network, give a local "
            "file: --set backbone.weights=FILE."
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"timm cannot make {name}: {error}") from error
    return network


def _native_size(state: dict[str, Tensor]) -> int | None:
    """The image size a state was trained at, from its positions; None to let the architecture decide."""
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patches is None:
        return None
    for prefix in (0, 1, 2, 5):  # no class token in the positions, class, class and distillation, class and registers
        side = math.isqrt(positions.shape[1] - prefix)
        if side * side == positions.shape[1] - prefix and side > 1:
            return side * int(patches.shape[-1])
    return None


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * channels


def _objective(tag: str) -> str:
    tag = tag.lower()
    if "mae" in tag:
        return "pixels"
    if "dino" in tag or "moco" in tag or "ijepa" in tag:
        return "features"
    return "supervised" if any(word in tag for word in ("in1k", "in21k", "in22k")) else "unknown"


def _pooling(encoder: Any, cfg: dict[str, Any]) -> str:
    if _objective(str(cfg.get("tag", ""))) == "pixels" or not encoder.num_prefix_tokens:
        return "mean"
    return "mean" if encoder.global_pool == "avg" else "cls"

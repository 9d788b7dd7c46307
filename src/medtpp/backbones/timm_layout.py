"""Where things are in a vision transformer of timm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from medtpp.backbones.base import Branch, Layout


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
    known = {block: modules[block] for block in blocks if _is_known(modules[block])}
    branches = {last: branch for path, block in known.items() for last, branch in _branches(path, block)}
    kept = {path for path in roles["mlp.in"] if path.rpartition(".mlp.")[0] in known}
    kept |= {
        path
        for path in roles["attention.qkv"]
        # Eva adds biases that stand beside its layer to what the layer gave, in place.
        if (block := known.get(path.rpartition(".attn.")[0])) and getattr(block.attn, "q_bias", None) is None
    }
    roles = {"embed.patch": ("patch_embed.proj",), **roles, "norm.final": final}
    return Layout(blocks, roles, branches=branches, kept=frozenset(kept))


def _is_known(block: nn.Module) -> bool:
    """Whether a block is one of timm's that norm before attention and MLP, and changes nothing in place."""
    return type(block) in (Block, EvaBlock) and not any(getattr(part, "inplace", False) for part in block.modules())


def _branches(path: str, block: Any) -> Iterator[tuple[str, Branch]]:
    """Attention and MLP of a known block, by their last layers."""
    there = {name for name, _ in block.named_parameters()}
    scales = ("ls1.gamma", "ls2.gamma") if isinstance(block, Block) else ("gamma_1", "gamma_2")
    factors = [f"{path}.{scale}" if scale in there else None for scale in scales]
    yield f"{path}.attn.proj", Branch(f"{path}.norm1", f"{path}.norm2", factors[0])
    yield f"{path}.mlp.fc2", Branch(f"{path}.norm2", path, factors[1])

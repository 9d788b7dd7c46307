"""What is particular to BEiT and BEiT v2 (arXiv 2106.08254, 2208.06366): biases of attention by where two patches lie.

timm adds them for all patches of an image. Here they are computed for the patches that are there, and handed to blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.beit import Beit, checkpoint_filter_fn
from torch import Tensor

_TABLE = "relative_position_bias_table"
_SHARED = f"rel_pos_bias.{_TABLE}"


def add_class_token(encoder: Beit, x: Tensor) -> Tensor:
    """(B, N, D) to (B, 1 + N, D), with absolute positions where the network has them."""
    x = torch.cat([encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    placed: Tensor = encoder.pos_drop(x if encoder.pos_embed is None else x + encoder.pos_embed)
    return placed


def run_block(encoder: Beit, block: Any, x: Tensor, keep: Tensor | None, patches: int) -> Tensor:
    """A block's output for tokens (B, 1 + K, D).

    Args:
        encoder: The network.
        block: One of its blocks.
        x: The class token and the visible patches; a tuner may add tokens, whose biases are zero.
        keep: (B, K) indices of the visible patches; None for all.
        patches: N, of the whole image. In volumes, slices of patches follow one another: biases know their plane.
    """
    owners = [owner for owner in (block.attn, encoder.rel_pos_bias) if getattr(owner, _TABLE, None) is not None]
    biases = [
        _biases(owner.relative_position_bias_table, owner.relative_position_index, keep, patches) for owner in owners
    ]
    with _without_own_biases(block.attn):
        out: Tensor = block(x, shared_rel_pos_bias=sum(biases) if biases else None)
    return out


def _biases(table: Tensor, index: Tensor, keep: Tensor | None, patches: int) -> Tensor:
    """(B, heads, 1 + K, 1 + K), B being 1 where nothing was dropped; `index` (1 + n, 1 + n), n patches to a slice."""
    order = torch.arange(patches, device=index.device)[None] if keep is None else keep
    places = torch.cat([order.new_zeros(len(order), 1), 1 + order % (len(index) - 1)], dim=1)  # (B, 1 + K)
    return table[index[places[:, :, None], places[:, None, :]]].permute(0, 3, 1, 2)


@contextmanager
def _without_own_biases(attention: Any) -> Iterator[None]:
    """Inside, an attention adds the biases alone that it is given."""
    parameters = attention._parameters if attention.relative_position_bias_table is not None else {_TABLE: None}
    table, parameters[_TABLE] = parameters[_TABLE], None
    try:
        yield
    finally:
        parameters[_TABLE] = table


def arguments_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a state tells of its network: before fine-tuning, BEiT has a norm at the end."""
    return {"use_fc_norm": False} if "norm.weight" in state else {}


def convert_beit(state: dict[str, Tensor], encoder: Beit) -> dict[str, Tensor]:
    """A state in timm's names. Where all blocks share one table, each gets a copy, as in the authors' fine-tuning."""
    if _SHARED in state and encoder.rel_pos_bias is None:
        shared, rest = state[_SHARED], {name: value for name, value in state.items() if name != _SHARED}
        state = rest | {f"blocks.{index}.attn.{_TABLE}": shared for index in range(len(encoder.blocks))}
    converted: dict[str, Tensor] = checkpoint_filter_fn(state, encoder)
    return converted

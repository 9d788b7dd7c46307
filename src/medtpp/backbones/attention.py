"""Attention as CPUs train it fastest in bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LONGEST = 600  # tokens; 384 pixels with patches of 16 are 577


def training_attention(tokens: Tensor) -> AbstractContextManager[Any]:
    """Inside, blocks that see tokens (B, N, D) train with the quickest kind of attention.

    On CPUs the backward of torch's fused attention is slower in bfloat16 than plain matrix products.
    Those keep B x heads x N x N values per block, hence the limit to short sequences.
    """
    mixed = tokens.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return _Plainly() if mixed and tokens.shape[1] <= LONGEST else nullcontext()


class _Plainly(TorchFunctionMode):
    """Computes torch's attention by matrix products, where it is asked for nothing special."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_simple(*args, **kwargs):
            return _PlainAttention.apply(*args)
        return func(*args, **kwargs)


def _is_simple(
    *args: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any
) -> bool:
    half = all(value.dtype == torch.bfloat16 for value in args[:3])
    return half and len(args) == 3 and attn_mask is None and not (dropout_p or is_causal or more)


class _PlainAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d).

    It keeps q, k and v as they come, which are mostly views of what one layer gave, where torch's matrix products
    would keep copies of them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
        ctx.save_for_backward(q, k, v, weights)
        mixed: Tensor = weights @ v
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        of_v = weights.transpose(-2, -1) @ grad
        of_logits = torch._softmax_backward_data(grad @ v.transpose(-2, -1), weights, -1, weights.dtype)
        return of_logits @ k * scale, of_logits.transpose(-2, -1) @ q * scale, of_v

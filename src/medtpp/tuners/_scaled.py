"""y = gamma * x + beta over the channels of a module's output, keeping hardly more than the modules around it keep.

The gradient of gamma needs x, and torch's own operation keeps it. After every module of a network, that doubles the
activations. Here x is found again from what is kept anyway:

- y itself, where the next module keeps its input (attention, the activation of an MLP): x = (y - beta) / gamma;
- the tokens before and after a part of a block was added to them, which the norms after them keep: y is the difference;
- the input of a norm, which the norm keeps: the norm is computed once more.

Where gamma is too small to divide by, x is kept, for those channels alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TINY = 1e-3


def weak_channels(gamma: Tensor, beta: Tensor, factor: Tensor) -> Tensor:
    """(D,) true where x cannot be found again from y without loss.

    There y is mostly beta, whose rounding has taken x away, or hardly anything of y reaches the tokens.
    """
    return (gamma.abs() < beta.abs()) | ((gamma * factor).abs() < TINY)


def scale_shift(x: Tensor, gamma: Tensor, beta: Tensor, channel_dim: int = -1) -> Tensor:
    """By torch's own operation, which keeps x for the backward pass."""
    shape = [-1] + [1] * (x.ndim - 1 - channel_dim % x.ndim)
    return torch.addcmul(beta.view(shape).to(x.dtype), x, gamma.view(shape).to(x.dtype))


def scale_norm(x: Tensor, gamma: Tensor, beta: Tensor, norm: nn.Module, given: Tensor) -> Tensor:
    """The same for x (..., D) that a frozen norm made of `given`."""
    y: Tensor = _ScaleNorm.apply(x, gamma, beta, norm, given.detach())
    return y


def scale_kept(x: Tensor, gamma: Tensor, beta: Tensor, weak: Tensor) -> Tensor:
    """The same for x (..., D) whose y is kept by what comes next; `weak` are indices of channels."""
    y: Tensor = _ScaleLinear.apply(x, gamma, beta, weak, None, None, None)
    return y


class Sum:
    """Of tokens and a part of a block: after = before + factor * y. In the backward pass, `after` becomes known."""

    after: Tensor | None = None


def scale_added(
    x: Tensor, gamma: Tensor, beta: Tensor, weak: Tensor, before: Tensor, factor: Tensor, to: Sum
) -> Tensor:
    """The same for x (B, N, D) whose y, times the factor (D,), is added to the tokens `before` and not used else."""
    y: Tensor = _ScaleLinear.apply(x, gamma, beta, weak, before.detach(), factor, to)
    return y


def witness(after: Tensor, of: Sum) -> Tensor:
    """The same tokens, (B, N, D). Their backward pass hands them on to the sum, before it comes to what was added."""
    same: Tensor = _Witness.apply(after, of)
    return same


def _in_place(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Scale what a layer gave where it stands.

    Autograd need not know: nothing before it keeps x, and if something did, x's version would tell at the backward
    pass. Copies cost more than their time: freed between tensors that stay, they leave holes in a CPU's heap.
    """
    torch.addcmul(beta.to(x.dtype), x, gamma.to(x.dtype), out=x)
    return x.view_as(x)


def _gradients(grad: Tensor, gamma: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, the sums over tokens of grad * kept and of grad, (D,). The product is written over."""
    with_kept = _over_tokens(product, gamma)
    room = product if product.dtype == grad.dtype else None
    return torch.mul(grad, gamma.to(grad.dtype), out=room), with_kept, _over_tokens(grad, gamma)


def _over_tokens(values: Tensor, like: Tensor) -> Tensor:
    """(..., D) to (D,), at the precision of a parameter."""
    rows = values.flatten(0, -2)
    # On CPUs torch would first copy what it sums to that precision.
    parts = torch.split(rows, 512) if rows.is_cpu and rows.dtype != like.dtype else (rows,)
    return torch.stack([part.sum(dim=0, dtype=like.dtype) for part in parts]).sum(dim=0)


class _ScaleNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, norm: Any, given: Tensor) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(gamma, given)
        return _in_place(x, gamma, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gamma, given = ctx.saved_tensors
        x = ctx.norm.forward(given.to(ctx.norm.weight.dtype))  # past its hooks, one of which scales
        of_x, of_gamma, of_beta = _gradients(grad, gamma, x.mul_(grad))
        return of_x, of_gamma, of_beta, None, None


class _ScaleLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weak: Tensor,
        before: Tensor | None,
        factor: Tensor | None,
        to: Sum | None,
    ) -> Tensor:
        x_weak = x[..., weak] if len(weak) else None
        y = _in_place(x, gamma, beta)
        ctx.to = to
        ctx.save_for_backward(gamma, beta, weak, x_weak, y if before is None else before, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gamma, beta, weak, x_weak, kept, factor = ctx.saved_tensors
        if ctx.to is None:
            product = grad * kept
        else:
            product, ctx.to.after = (ctx.to.after - kept).mul_(grad), None  # times the factor
        of_x, with_y, of_beta = _gradients(grad, gamma, product)
        of_gamma = ((with_y if factor is None else with_y / factor) - beta * of_beta) / gamma
        if x_weak is not None:
            of_gamma[weak] = _over_tokens(grad[..., weak] * x_weak, gamma)
        return of_x, of_gamma, of_beta, None, None, None, None


class _Witness(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, after: Tensor, of: Sum) -> Tensor:
        ctx.of = of
        ctx.save_for_backward(after)
        return after.view_as(after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ctx.of.after,) = ctx.saved_tensors
        return grad, None

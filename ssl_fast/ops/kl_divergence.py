"""kl_divergence: of a diagonal normal distribution from the standard one, in one pass.

The gradient of mu is mu; that of logvar is made beside the value, in fp32 and without a factor, so
that nothing of it is lost in a half before the backward weighs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import kl_divergence as reference
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.gradients import (
    apart,
    differentiated_again,
    open_signature,
    vector_jacobian,
    wants,
    watched,
    weighed,
)
from ssl_fast.ops.registration import elementwise, first_derivative_only, register

__all__ = ["kl_divergence"]


def _check(mu: Tensor, logvar: Tensor, *_: object) -> None:
    if not mu.is_floating_point():
        raise ValueError(f"mu must be floating; got {mu.dtype}")
    check_tensor("logvar", logvar, tuple(mu.shape), mu.dtype, mu)


def _fake(mu: Tensor, logvar: Tensor, need_logvar: bool, **_: str) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(mu)
    size = logvar.shape if need_logvar else (0,)
    return mu.new_empty((), dtype=wide), logvar.new_empty(size, dtype=wide)


_kl_divergence = register(
    "kl_divergence(Tensor mu, Tensor logvar, bool need_logvar, *, "
    'str backend="") -> (Tensor, Tensor)',
    elementwise("kl_divergence", "kl_divergence", _check),
    _fake,
)


class _KlDivergence(Function):
    """Inputs: mu, logvar, need_logvar, backend."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _kl_divergence(*arguments, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, needs = grads[0], ctx.needs_input_grad[:2]
        mu, logvar, grad_logvar = ctx.saved_tensors
        if weight is None:
            return None, None, None, None
        if differentiated_again():
            arguments = (mu, logvar, grad_logvar, weight, *needs)
            found: Any = _KlGradient.apply(*arguments)  # type: ignore[no-untyped-call]
            return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None
        if torch.compiler.is_compiling():
            asking = [x for x, need in zip((mu, logvar), needs, strict=True) if need]
            weight = first_derivative_only(weight, asking)
        return (
            weighed(weight, mu, mu.dtype) if needs[0] else None,
            weighed(weight, grad_logvar, logvar.dtype) if needs[1] else None,
            None,
            None,
        )


class _EagerKlDivergence(Function):
    """``_KlDivergence`` where neither a transform nor torch.compile looks on."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _KlDivergence.forward(*inputs)
        _KlDivergence.setup_context(ctx, inputs, results)
        return results

    backward = _KlDivergence.backward


class _KlGradient(Function):
    """The gradients of the divergence, weighted; their own gradient is the reference formula's.

    Inputs: mu, logvar, grad_logvar, weight, the needs.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        mu, logvar, grad_logvar, weight, need_mu, need_logvar = inputs
        return (
            weighed(weight, mu, mu.dtype) if need_mu else mu.new_empty(0),
            weighed(weight, grad_logvar, logvar.dtype) if need_logvar else logvar.new_empty(0),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.needs = inputs[4:]
        ctx.save_for_backward(*inputs[:2], inputs[3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def formula(mu: Tensor, logvar: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            made = reference.kl_divergence(mu, logvar, ctx.needs[1])[1]
            return (
                weighed(weight, mu, mu.dtype) if ctx.needs[0] else mu.new_empty(0),
                weighed(weight, made, logvar.dtype) if ctx.needs[1] else logvar.new_empty(0),
            )

        needed = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        of_mu, of_logvar, of_weight = vector_jacobian(formula, ctx.saved_tensors, needed, grads)
        return of_mu, of_logvar, None, of_weight, None, None


def kl_divergence(mu: Tensor, logvar: Tensor, *, backend: str | None = None) -> Tensor:
    """``-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())``, in nats.

    The divergence of the normal distributions with these means and log-variances, of any one shape,
    from the standard normal one. Differentiable in both, to any order. fp32 (float64 of float64).

    exp(logvar) stops at the largest finite number: a finite logvar, above 88.7 too, gives a finite
    value and, short of a factor, a finite gradient, where the line above gives inf. Infinite and
    NaN inputs give what they give there. Near 0 the terms keep their digits.
    """
    function = _KlDivergence if watched() else _EagerKlDivergence
    results: Any = function.apply(  # type: ignore[no-untyped-call]
        mu, apart(logvar, mu), wants(logvar), backend or ""
    )
    value: Tensor = results[0]
    return value

"""mae: the mean squared error of the removed patches of a masked autoencoder.

On the CPU an fp32 gradient is made in the forward pass, with the mask's factor, from the one read
of the removed patches; a loss that is weighed multiplies it where it lies. Elsewhere, and in 16-bit
dtypes that would be rounded twice, the backward reads both tensors again and writes the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import mae as reference
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.gradients import (
    apart,
    differentiated_again,
    graph_is_kept,
    open_signature,
    vector_jacobian,
    wants,
    watched,
)
from ssl_fast.ops.registration import (
    empty_like,
    first_derivative_only,
    implementation,
    register,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["mae"]


def _check(
    pred: Tensor, target: Tensor, mask: Tensor, patch_size: Sequence[int], *_: object
) -> None:
    if pred.dim() != 3 or not pred.is_floating_point() or pred.shape[2] < 1:
        raise ValueError(
            f"pred must be a floating tensor [B, L, P], P at least 1; got {pred.dtype} "
            f"{tuple(pred.shape)}"
        )
    wide = accumulation_dtype(pred)
    batch, count, depth = pred.shape
    shape: tuple[int, ...] = (batch, count, depth)
    if len(patch_size):
        if len(patch_size) != 2 or min(patch_size) < 1:
            raise ValueError(f"patch_size must be two positive numbers; got {tuple(patch_size)}")
        rows, columns = patch_size
        if target.dim() != 4 or target.shape[2] % rows or target.shape[3] % columns:
            raise ValueError(
                f"target must be images [B, C, H, W] that patches of {rows} x {columns} fill; got "
                f"shape {tuple(target.shape)}"
            )
        grid = (target.shape[2] // rows) * (target.shape[3] // columns)
        if count != grid or depth != rows * columns * target.shape[1]:
            raise ValueError(
                f"pred must have the {grid} patches of {rows * columns * target.shape[1]} elements "
                f"that the images have; got shape {tuple(pred.shape)}"
            )
        shape = (batch, *target.shape[1:])
    if accumulation_dtype(target) is not wide or not target.is_floating_point():
        raise ValueError(f"target must be floating, float64 beside float64; got {target.dtype}")
    check_tensor("target", target, shape, target.dtype, pred)
    check_tensor("mask", mask, (batch, count), wide, pred)


def _check_backward(
    pred: Tensor, target: Tensor, mask: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> None:
    _check(pred, target, mask, *rest)
    check_tensor("scale", scale, (), accumulation_dtype(pred), pred)
    check_tensor("weight", weight, (), accumulation_dtype(pred), pred)


def _fake(pred: Tensor, *_: object, **__: str) -> tuple[Tensor, Tensor]:
    scalar = pred.new_empty((), dtype=accumulation_dtype(pred))
    return scalar, torch.empty_like(scalar)


def _fake_with_gradient(pred: Tensor, *_: object, **__: str) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(pred), empty_like(pred, True, pred)


def _fake_backward(pred: Tensor, target: Tensor, *rest: Any, **_: str) -> tuple[Tensor, Tensor]:
    need_pred, need_target = rest[-2:]
    return empty_like(pred, need_pred, pred), empty_like(target, need_target, target)


_mae = register(
    "mae(Tensor pred, Tensor target, Tensor mask, int[] patch_size, bool norm_pix_loss, *, "
    'str backend="") -> (Tensor, Tensor)',
    implementation("mae", 0, "mae", _check),
    _fake,
)
_mae_with_gradient = register(
    "mae_with_gradient(Tensor pred, Tensor target, Tensor mask, int[] patch_size, "
    'bool norm_pix_loss, *, str backend="") -> (Tensor, Tensor, Tensor)',
    implementation("mae_with_gradient", 0, "mae", _check),
    _fake_with_gradient,
)
_mae_backward = register(
    "mae_backward(Tensor pred, Tensor target, Tensor mask, Tensor scale, Tensor weight, "
    "int[] patch_size, bool norm_pix_loss, bool need_pred, bool need_target, *, "
    'str backend="") -> (Tensor, Tensor)',
    implementation("mae_backward", 0, "mae", _check_backward),
    _fake_backward,
)


class _Mae(Function):
    """Inputs: pred, target, mask, patch_size, norm_pix_loss, backend."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _mae(*arguments, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.patch_size, ctx.norm_pix_loss, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        nothing = (None,) * 4
        weight, needs = grads[0], ctx.needs_input_grad[:2]
        if weight is None:
            return None, None, *nothing
        rules = (ctx.patch_size, ctx.norm_pix_loss, *needs)
        if differentiated_again():
            arguments = (*ctx.saved_tensors, weight, *rules, ctx.backend)
            found: Any = _MaeGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            if torch.compiler.is_compiling():
                asking = [x for x, need in zip(ctx.saved_tensors, needs, strict=False) if need]
                weight = first_derivative_only(weight, asking)
            found = _mae_backward(*ctx.saved_tensors, weight, *rules, backend=ctx.backend)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *nothing


class _EagerMae(Function):
    """``_Mae`` where neither a transform nor torch.compile looks on; see ops/made_gradient.py.

    One more input, the last: whether the forward pass makes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *inputs_of_mae, make = inputs
        ctx.made = None
        if make:
            *arguments, backend = inputs_of_mae
            *results, ctx.made = _mae_with_gradient(*arguments, backend=backend)
            results = tuple(results)
        else:
            results = _Mae.forward(*inputs_of_mae)
        _Mae.setup_context(ctx, tuple(inputs_of_mae), results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, made = grads[0], ctx.made
        if (
            made is None
            or weight is None
            or torch.is_grad_enabled()
            or watched()
            or torch._C._functorch.is_legacy_batchedtensor(weight)  # of is_grads_batched
        ):
            return *_Mae.backward(ctx, *grads), None
        # Read for its checks: that nothing was written to since, and that this graph isn't gone.
        _ = ctx.saved_tensors
        factor = float(weight)
        if graph_is_kept():
            # Whoever gets the gradient may write to it before the next backward.
            return made.mul(factor), *(None,) * 6
        ctx.made = None
        return made if factor == 1.0 else made.mul_(factor), *(None,) * 6


class _MaeGradient(Function):
    """The gradients of mae; their own gradient is the reference formula's.

    Inputs: pred, target, mask, scale, weight, patch_size, norm_pix_loss, the needs, backend.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _mae_backward(*arguments, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules = inputs[5:9]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def formula(*values: Any) -> Any:
            gradients: Any = reference.mae_backward
            return gradients(*values, *ctx.rules)

        needed = (*ctx.needs_input_grad[:2], False, False, ctx.needs_input_grad[4])
        found = vector_jacobian(formula, ctx.saved_tensors, needed, grads)
        return *found, *(None,) * 5


def mae(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L]
    *,
    patch_size: Sequence[int] = (),
    norm_pix_loss: bool,
    backend: str | None = None,
) -> Tensor:
    """``(((pred - t) ** 2).mean(-1) * mask).sum() / mask.sum()``, 0 where nothing is masked.

    t is the target, normalised per patch on request. Differentiable in pred and target, to any
    order. mask is fp32 (float64 beside a float64 pred); a patch whose mask is 0 is not read.
    """
    inputs: Any = (pred, apart(target, pred), mask, list(patch_size), norm_pix_loss, backend or "")
    if watched():
        results: Any = _Mae.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        make = (
            wants(pred) and not wants(target)
            and pred.dtype is torch.float32 and pred.device.type == "cpu"
        )  # fmt: skip
        results = _EagerMae.apply(*inputs, make)  # type: ignore[no-untyped-call]
    loss: Tensor = results[0]
    return loss

"""Losses of a reconstruction that is there: value and gradient in one pass over memory."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.losses.contrastive import describe
from ssl_fast.losses.pointwise import (
    accept_mask,
    accept_parameter,
    accept_target,
    accept_weight,
    check_floating,
    check_line,
    check_rules,
    denominator,
    divided,
)
from ssl_fast.ops.gradients import wants, watched
from ssl_fast.ops.reconstruction import Rules, reconstruction

__all__ = ["ReconstructionLoss", "reconstruction_loss"]


class _Small(NamedTuple):
    """torch's operator, and up to how many elements a call of ours takes longer."""

    operator: Any
    elements: int


# Python and autograd around our pass take 90 us, where torch's operators take 25 and 1 to 3 passes.
# Measured on 2 cores of an Intel Xeon with AMX, 2 threads, torch 2.13, 2026-11-26. Not of the
# binary kinds, whose small losses lose their digits in torch's formula. These are what
# torch.nn.functional calls after checks of its own; torch.ops.aten's take 2 us more.
_PLAIN = {
    "mse": _Small(torch._C._nn.mse_loss, 1 << 18),
    "l1": _Small(torch._C._nn.l1_loss, 1 << 18),
}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# os.environ's own dictionary: looking a name up in os.environ itself raises and catches a KeyError,
# which takes 0.5 to 2 us of such a call.
_ENVIRONMENT = os.environ._data  # type: ignore[attr-defined]
_BACKEND = os.environ.encodekey("SSL_FAST_BACKEND")


def _small(kind: Any, reduction: Any, input: Any, target: Any) -> Any:
    """The operator of torch for fp32 tensors of one small shape on the CPU, or None.

    None too where SSL_FAST_BACKEND asks for a backend. A microsecond here is 2% of such a call.
    """
    if type(kind) is not str or type(reduction) is not str:
        return None
    found = _PLAIN.get(kind)
    if (
        found is not None
        and reduction in _REDUCTIONS
        and isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and input.is_cpu
        and target.is_cpu
        and input.dtype is target.dtype is torch.float32
        and input.layout is target.layout is torch.strided
        and input.numel() <= found.elements
        and input.shape == target.shape
        and _BACKEND not in _ENVIRONMENT
    ):
        return found.operator
    return None


def _accept_pos_weight(pos_weight: Any, input: Tensor, kind: str) -> Tensor | None:
    """With whole trailing dimensions of the input."""
    if pos_weight is None:
        return None
    if kind != "bce_with_logits":
        raise ValueError(f"pos_weight is an option of kind 'bce_with_logits'; got kind {kind!r}")
    check_floating("pos_weight", pos_weight)
    if pos_weight.device != input.device:
        raise ValueError(f"pos_weight must be on {input.device}; got {pos_weight.device}")
    trailing = input.shape[max(0, input.dim() - pos_weight.dim()) :]
    try:
        full = pos_weight.expand(trailing)
    except RuntimeError:
        raise ValueError(
            f"pos_weight must broadcast to trailing dimensions of input, {tuple(trailing)}; got "
            f"{tuple(pos_weight.shape)}"
        ) from None
    return full.to(accumulation_dtype(input))  # type: ignore[no-any-return]


def _check_inplace(input: Tensor, others: tuple[Tensor | None, ...], reduction: str) -> None:
    if reduction == "none":
        raise ValueError("inplace=True needs reduction 'mean' or 'sum'; got 'none'")
    if input.is_leaf and input.requires_grad:
        raise ValueError(
            "inplace=True can't overwrite a leaf that requires a gradient; input must be the "
            "output of an operation"
        )
    if input._is_view():
        raise ValueError(
            "inplace=True can't overwrite a view of another tensor, which would change with it; "
            "reshape the target instead, or give input before its view"
        )
    if not input.is_contiguous() or input.is_neg():
        raise ValueError(
            f"inplace=True needs a contiguous input; got strides {tuple(input.stride())}"
        )
    if any(wants(other) for other in others):
        raise ValueError("inplace=True gives gradients to input alone; another tensor wants one")


def reconstruction_loss(
    input: Tensor,
    target: Tensor,
    kind: str = "mse",
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    pos_weight: Tensor | None = None,
    delta: float = 1.0,
    beta: float = 1.0,
    target_scale: float = 1.0,
    target_shift: float = 0.0,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``F.mse_loss(input, target)``, or another loss of torch.nn.functional, in one pass.

    The pass reads both tensors, writes the gradient and sums the loss. ``kind`` is "mse", "l1",
    "smooth_l1", "huber", "bce" (``F.binary_cross_entropy``) or "bce_with_logits"; binary
    cross-entropies are in nats.

    Args:
        input: the reconstruction, of any shape.
        target: of the same shape and a floating dtype of its own, or uint8, read as ``target_scale
            * target + target_shift`` (1/255 makes bytes of an image numbers up to 1).
        kind: see above.
        reduction: "mean", "sum", or "none" for the loss of each element.
        weight: of each element. A mean divides by its sum; of "huber", "bce" and
            "bce_with_logits", as in torch, by the number of elements. Of the last two it may be
            anything that broadcasts to the input's shape.
        mask: boolean, or 0 and 1 in floats: which elements count. It has the input's shape or
            leading dimensions of it (a number per row). What it leaves out has the loss 0 and the
            gradient 0, whatever it holds, and is not counted by a mean.
        pos_weight: "bce_with_logits" alone: weighs the positive part; it broadcasts to trailing
            dimensions of the input.
        delta: of "huber", above 0.
        beta: of "smooth_l1", at least 0.
        target_scale: see target.
        target_shift: see target.
        inplace: write the gradient over the input, which must be contiguous, neither a leaf nor a
            view, and can't be used afterwards, not even where "bce" refuses its numbers; the loss
            goes backward once. Under torch.compile and torch.func the input stays as it is.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Inputs are float32, bfloat16, float16 or float64 (the reference's), and are read as they are
    under autocast too. Differentiable in input to any order, and in target, weight and pos_weight
    (then by torch's own operations).

    Returns:
        The loss, or the losses with the input's shape, in fp32 (float64 where input or target is).
        A mean over nothing that counts is 0 where a mask or a weight says so, NaN for an empty
        input, as in torch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that differ, an option out of range; on the CPU, "bce" of
            numbers outside [0, 1].
        RuntimeError: ``backend`` can't serve this call.
    """
    if (
        weight is None
        and mask is None
        and pos_weight is None
        and backend is None
        and inplace is False
        and type(delta) is type(beta) is type(target_scale) is type(target_shift) is float
        and delta == beta == target_scale == 1.0
        and target_shift == 0.0
        and (operator := _small(kind, reduction, input, target)) is not None
    ):
        return operator(input, target, _REDUCTIONS[reduction])  # type: ignore[no-any-return]
    check_rules(kind, reduction, backend)
    kind, parameter = accept_parameter(kind, delta, beta)
    line = check_line(target_scale, target_shift)
    check_floating("input", input)
    target = accept_target(target, input.shape, input.device)
    if target.dtype is torch.float64 or input.dtype is torch.float64:
        input = input.double()
        target = target if target.dtype is torch.uint8 else target.double()
    weight = accept_weight(weight, input.shape, input, kind)
    mask = accept_mask(mask, input.shape, input.device)
    pos_weight = _accept_pos_weight(pos_weight, input, kind)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False; got {describe(inplace)}")
    if inplace and wants(input) and not watched():
        _check_inplace(input, (target, weight, pos_weight), reduction)
    factor, divisor = 1.0, None
    if reduction == "mean":
        counted = denominator(kind, input.shape, weight, mask)
        if isinstance(counted, Tensor) and (
            counted.device.type != "cpu" or counted.requires_grad or watched()
        ):
            divisor = counted
        else:
            # A sum is read here, so that the forward pass has it for the gradient.
            number = float(counted)
            nothing = float("nan") if isinstance(counted, int) else 0.0
            factor = 1.0 / number if number else nothing
    loss = reconstruction(
        input, target, Rules(kind, parameter, *line, factor, reduction != "none"),
        weight=weight, mask=mask, pos_weight=pos_weight, inplace=inplace, backend=backend,
    )  # fmt: skip
    return loss if divisor is None else divided(loss, divisor)


class ReconstructionLoss(nn.Module):
    """``reconstruction_loss`` as a module: ``ReconstructionLoss("bce_with_logits")(x, target)``."""

    def __init__(
        self,
        kind: str = "mse",
        reduction: str = "mean",
        *,
        delta: float = 1.0,
        beta: float = 1.0,
        target_scale: float = 1.0,
        target_shift: float = 0.0,
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_rules(kind, reduction, backend)
        accept_parameter(kind, delta, beta)
        check_line(target_scale, target_shift)
        if not isinstance(inplace, bool):
            raise TypeError(f"inplace must be True or False; got {describe(inplace)}")
        self.kind, self.reduction = kind, reduction
        self.delta, self.beta = delta, beta
        self.target_scale, self.target_shift = target_scale, target_shift
        self.inplace, self.backend = inplace, backend

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a reconstruction and its target; see ``reconstruction_loss``."""
        return reconstruction_loss(
            input, target, self.kind, self.reduction, weight=weight, mask=mask,
            pos_weight=pos_weight, delta=self.delta, beta=self.beta,
            target_scale=self.target_scale, target_shift=self.target_shift, inplace=self.inplace,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"{self.kind!r}, reduction={self.reduction!r}, backend={self.backend!r}"

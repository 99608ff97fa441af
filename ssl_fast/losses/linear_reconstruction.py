"""A decoder's last layer and its reconstruction loss, without the reconstruction."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.losses.contrastive import DTYPES, describe
from ssl_fast.losses.linear_gram import gram_sum
from ssl_fast.losses.pointwise import (
    accept_parameter,
    check_floating,
    check_line,
    check_rules,
    denominator,
    divided,
    kept_by,
)
from ssl_fast.ops.linear_reconstruction import TARGETS, linear_reconstruction
from ssl_fast.ops.registration import autocast_is_on

__all__ = ["LinearReconstructionLoss", "linear_reconstruction_loss"]


def _check_options(
    kind: Any, reduction: Any, delta: Any, beta: Any, gram: Any, backend: Any
) -> tuple[str, float]:
    """The kind and its number."""
    check_rules(kind, reduction, backend)
    if not isinstance(gram, bool):
        raise TypeError(f"gram must be True or False; got {describe(gram)}")
    if gram and (kind != "mse" or reduction == "none"):
        raise ValueError(
            "gram=True needs kind 'mse' and reduction 'mean' or 'sum'; got "
            f"{kind!r} and {reduction!r}"
        )
    return accept_parameter(kind, delta, beta)


def _floating(name: str, value: Any) -> Tensor:
    """A dense floating tensor, in autocast's dtype where autocast is on."""
    check_floating(name, value)
    tensor: Tensor = value
    if tensor.dtype is torch.float64 or not autocast_is_on(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _layer(input: Any, linear_weight: Any, linear_bias: Any) -> tuple[Tensor, Tensor, Any]:
    """The layer's tensors, of one dtype and on one device."""
    rows = _floating("input", input)
    columns = _floating("linear_weight", linear_weight)
    if rows.dim() < 1 or rows.shape[-1] < 1:
        raise ValueError(f"input must have shape [*, H], H at least 1; got {tuple(rows.shape)}")
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = []
    if columns.dim() != 2 or columns.shape[1] != rows.shape[-1]:
        raise ValueError(
            f"linear_weight must have shape [D, {rows.shape[-1]}] for an input of shape "
            f"{tuple(rows.shape)}; got {tuple(columns.shape)}"
        )
    wanted.append(("linear_weight", columns, tuple(columns.shape)))
    bias = None
    if linear_bias is not None:
        bias = _floating("linear_bias", linear_bias)
        wanted.append(("linear_bias", bias, (columns.shape[0],)))
    for name, value, shape in wanted:
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
        if value.dtype is not rows.dtype:
            raise TypeError(f"{name} must have the dtype of input, {rows.dtype}; got {value.dtype}")
        if value.device != rows.device:
            raise ValueError(
                f"{name} must be on the device of input, {rows.device}; got {value.device}"
            )
    return rows, columns, bias


def _check_target(target: Any, rows: Tensor, outputs: int) -> None:
    shape = (*rows.shape[:-1], outputs)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {describe(target)}")
    wide = rows.dtype is torch.float64
    if target.dtype not in TARGETS and not (wide and target.dtype is torch.float64):
        raise TypeError(
            "target must be float32, bfloat16, float16 or uint8 (float64 beside a float64 input); "
            f"got {describe(target)}"
        )
    if target.layout is not torch.strided:
        raise TypeError(f"target must be a dense tensor; got layout {target.layout}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {shape}; got {tuple(target.shape)}")
    _beside("target", target, rows)


def _beside(name: str, value: Tensor, rows: Tensor) -> None:
    if value.device != rows.device:
        raise ValueError(
            f"{name} must be on the device of input, {rows.device}; got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient, it gets none; pass {name}.detach()")


def _per_element(name: str, value: Any, target: Tensor, rows: Tensor) -> Tensor | None:
    """A weight or a mask for each element, or for each row, as [N, D] or [N]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {describe(value)}")
    if value.dtype not in DTYPES and not (name == "mask" and value.dtype is torch.bool):
        raise TypeError(
            f"{name} must be {'boolean or ' if name == 'mask' else ''}floating; got "
            f"{describe(value)}"
        )
    full, leading = target.shape, target.shape[:-1]
    if value.shape not in (full, leading):
        raise ValueError(
            f"{name} must have shape {tuple(full)} or {tuple(leading)}; got {tuple(value.shape)}"
        )
    _beside(name, value, rows)
    each: Tensor = kept_by(value) if name == "mask" else value.to(accumulation_dtype(rows))
    return each.reshape(math.prod(leading), full[-1]) if each.shape == full else each.reshape(-1)


def linear_reconstruction_loss(
    input: Tensor,  # [*, H]
    linear_weight: Tensor,  # [D, H]
    target: Tensor,  # [*, D]
    *,
    linear_bias: Tensor | None = None,  # [D]
    kind: str = "mse",
    reduction: str = "mean",
    weight: Tensor | None = None,  # [*, D] or [*]
    mask: Tensor | None = None,  # [*, D] or [*]
    pos_weight: Tensor | None = None,  # [D]
    delta: float = 1.0,
    beta: float = 1.0,
    target_scale: float = 1.0,
    target_shift: float = 0.0,
    gram: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``F.mse_loss(F.linear(input, linear_weight, linear_bias), target)``, and the other kinds.

    The layer's output is never stored: value and gradients come from one pass over its tiles, in
    memory that grows with input and linear_weight.

    Args:
        input: what the layer takes, [*, H].
        linear_weight: the layer's weight, [D, H] as in ``nn.Linear``.
        target: [*, D]: float32, bfloat16, float16 or uint8, whatever the input's dtype (float64
            beside a float64 input). It gets no gradient.
        linear_bias: the layer's bias, [D].
        kind: "mse", "l1", "smooth_l1", "huber", "bce" or "bce_with_logits", torch's losses of
            these names. "bce" too takes the layer's output for logits (its sigmoid is part of the
            loss), and differs from "bce_with_logits" in that targets are checked.
        reduction: "mean", "sum" or "none" (each loss, [*, D], whose gradient takes the products
            again). A weighted mean divides by the sum of the weights; that of huber and the bce
            kinds, as in torch, by the number of elements.
        weight: multiplies each loss, [*, D], or those of each row, [*]. It gets no gradient.
        mask: boolean or 0/1, [*, D] or [*]: what is False is not counted, whatever the target
            holds there, nor, where a row is left out altogether, its input.
        pos_weight: [D], of the bce kinds: multiplies the part of the positive answer.
        delta: huber's, greater than 0.
        beta: smooth_l1's, 0 (l1) or more.
        target_scale: the target is read as ``target * target_scale + target_shift``: 1 / 255 for
            bytes of a picture.
        target_shift: see target_scale.
        gram: opt in to the sum of squares by Gram matrices, x (W^T W) x - 2 x (t W) + t^2: two
            large products in place of three, where D or N is much larger than H. Its terms cancel:
            the value has an absolute error of about 1e-7 (fp32) of the mean squares of output and
            target, however small the loss is, and so have the gradients beside their terms. For
            kind "mse", reduction "mean" or "sum", without weight and mask; in plain torch.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    input, linear_weight and linear_bias are float32, bfloat16, float16 or float64 (the
    reference's), all of one dtype; under autocast they are cast once. Products accumulate in fp32;
    16-bit tensor cores, where there are any, multiply slopes rounded to 16 bits. Differentiable in
    these three, to any order.

    Returns:
        The loss, fp32 (float64 for a float64 input), in nats for the bce kinds; 0 with zero
        gradients where a mask or the weights leave nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, an unknown option, targets of bce
            outside [0, 1] (on a CPU).
        RuntimeError: ``backend`` can't serve this call.
    """
    kind, parameter = _check_options(kind, reduction, delta, beta, gram, backend)
    scale, shift = check_line(target_scale, target_shift)
    layer, columns, bias = _layer(input, linear_weight, linear_bias)
    outputs, depth = columns.shape
    _check_target(target, layer, outputs)
    rows, goal = layer.reshape(-1, depth), target.reshape(math.prod(target.shape[:-1]), outputs)
    weights = _per_element("weight", weight, target, layer)
    kept = _per_element("mask", mask, target, layer)
    if pos_weight is not None:
        if not kind.startswith("bce"):
            raise ValueError(f"pos_weight belongs to the bce kinds; got kind {kind!r}")
        pos_weight = _positive(pos_weight, layer, outputs)
    if gram:
        if weight is not None or mask is not None:
            raise ValueError("gram=True takes no weight and no mask")
        loss = gram_sum(rows, columns, bias, goal, scale, shift)
    else:
        loss = linear_reconstruction(
            rows, columns, bias, goal, weights, kept, pos_weight,
            kind=kind, parameter=parameter, target_scale=scale, target_shift=shift,
            reduce=reduction != "none", backend=backend,
        )  # fmt: skip
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss
    return divided(loss, denominator(kind, goal.shape, weights, kept))


def _positive(pos_weight: Any, rows: Tensor, outputs: int) -> Tensor:
    if not isinstance(pos_weight, Tensor) or pos_weight.dtype not in DTYPES:
        raise TypeError(f"pos_weight must be a floating tensor [D]; got {describe(pos_weight)}")
    if pos_weight.shape != (outputs,):
        raise ValueError(f"pos_weight must have shape ({outputs},); got {tuple(pos_weight.shape)}")
    _beside("pos_weight", pos_weight, rows)
    return pos_weight.to(accumulation_dtype(rows))


class LinearReconstructionLoss(nn.Module):
    """``nn.Linear(in_features, out_features)`` and its reconstruction loss in one module.

    Weight and bias are initialised, and named in the state dict, as those of ``nn.Linear``, whose
    place it can take in a trained model: ``loss = module(hidden, target)`` for training,
    ``module.reconstruct(hidden)`` for the output itself.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        kind: str = "mse",
        reduction: str = "mean",
        *,
        delta: float = 1.0,
        beta: float = 1.0,
        target_scale: float = 1.0,
        target_shift: float = 0.0,
        gram: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(kind, reduction, delta, beta, gram, backend)
        check_line(target_scale, target_shift)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.options: dict[str, Any] = {
            "kind": kind,
            "reduction": reduction,
            "delta": delta,
            "beta": beta,
            "target_scale": target_scale,
            "target_shift": target_shift,
            "gram": gram,
            "backend": backend,
        }

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of the layer's output for an input [*, H] against a target [*, D]."""
        return linear_reconstruction_loss(
            input, self.weight, target, linear_bias=self.bias,
            weight=weight, mask=mask, pos_weight=pos_weight, **self.options,
        )  # fmt: skip

    def reconstruct(self, input: Tensor) -> Tensor:
        """``F.linear(input, weight, bias)``: the output [*, D]; logits for the bce kinds."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        shown = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self.options,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

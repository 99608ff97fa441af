"""What the reconstruction losses share: checks of their arguments, and what a mean divides by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast.backends.dispatch import BACKENDS
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.pointwise import KINDS
from ssl_fast.losses.contrastive import DTYPES, REDUCTIONS, check_choice, describe
from ssl_fast.ops.gradients import watched

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BY_WEIGHT",
    "accept_mask",
    "accept_parameter",
    "accept_target",
    "accept_weight",
    "check_floating",
    "check_line",
    "check_rules",
    "denominator",
    "divided",
    "kept_by",
    "number",
]

BINARY = ("bce", "bce_with_logits")
# Of these torch divides a weighted mean by the sum of the weights (smooth_l1, which has none there,
# as l1), of the others by the number of elements.
BY_WEIGHT = ("mse", "l1", "smooth_l1")


def check_rules(
    kind: Any, reduction: Any, backend: Any, reductions: Sequence[str] = REDUCTIONS
) -> None:
    """ValueError unless each is one of its choices."""
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, reductions)
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def number(name: str, value: Any) -> float:
    """A finite float, or TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {describe(value)}")
    # Not math.isfinite, which torch.compile can't trace where it makes the number symbolic.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)


def accept_parameter(kind: str, delta: Any, beta: Any) -> tuple[str, float]:
    """The kind and its parameter: smooth_l1 with a beta of 0 is l1."""
    delta, beta = number("delta", delta), number("beta", beta)
    if delta <= 0.0:
        raise ValueError(f"delta must be above 0; got {delta}")
    if beta < 0.0:
        raise ValueError(f"beta must be at least 0; got {beta}")
    if kind == "huber":
        return kind, delta
    return ("l1", 1.0) if kind == "smooth_l1" and beta == 0.0 else (kind, beta)


def check_line(target_scale: Any, target_shift: Any) -> tuple[float, float]:
    """Both as floats, or TypeError, ValueError."""
    return number("target_scale", target_scale), number("target_shift", target_shift)


def check_floating(name: str, value: Any) -> None:
    """TypeError unless it is a dense floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; got {describe(value)}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")


def accept_target(target: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """A floating tensor or uint8, of the shape and on the device of what it is compared with."""
    if not isinstance(target, Tensor) or target.dtype is not torch.uint8:
        check_floating("target", target)
    if target.layout is not torch.strided:
        raise TypeError(f"target must be a dense tensor; got layout {target.layout}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)}; got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"target must be on {device}; got {target.device}")
    return target  # type: ignore[no-any-return]


def accept_weight(
    weight: Any, shape: Sequence[int], like: Tensor, kind: str, name: str = "weight"
) -> Tensor | None:
    """The weight of each element; of the binary kinds whatever broadcasts to the shape."""
    if weight is None:
        return None
    check_floating(name, weight)
    if weight.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {weight.device}")
    if weight.shape != shape:
        if kind not in BINARY:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(weight.shape)}")
        try:
            weight = weight.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to shape {tuple(shape)}; got {tuple(weight.shape)}"
            ) from None
    return weight.to(accumulation_dtype(like))  # type: ignore[no-any-return]


def accept_mask(mask: Any, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """A boolean tensor of leading dimensions of the shape, without their trailing ones."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {describe(mask)}")
    if mask.dtype is not torch.bool and mask.dtype not in DTYPES:
        raise TypeError(f"mask must be boolean, or 0 and 1 in floats; got {describe(mask)}")
    if mask.device != device:
        raise ValueError(f"mask must be on {device}; got {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask must not require a gradient, it gets none; pass mask.detach()")
    leading = mask
    while leading.shape != tuple(shape)[: leading.dim()]:
        # A mask of one element alone says nothing of rows: it would be another batch's.
        if leading.dim() <= 1 or leading.shape[-1] != 1:
            raise ValueError(
                f"mask must have shape {tuple(shape)} or leading dimensions of it; got "
                f"{tuple(mask.shape)}"
            )
        leading = leading.squeeze(-1)
    return kept_by(leading)


def kept_by(mask: Tensor) -> Tensor:
    """A mask as booleans; on the CPU ValueError for floats other than 0 and 1."""
    if mask.dtype is torch.bool:
        return mask
    kept = mask != 0
    readable = mask.device.type == "cpu" and not watched()
    if readable and not bool((mask == kept).all()):
        raise ValueError("mask must hold 0 and 1 only; got other numbers")
    return kept


def denominator(
    kind: str,
    shape: Sequence[int],
    weight: Tensor | None,  # leading dimensions of the shape, as mask
    mask: Tensor | None,
) -> Tensor | int:
    """What a mean divides by, as torch.nn.functional does for the kind.

    The sum of the weights or the number of elements, of what the mask keeps.
    """
    count = math.prod(shape)
    if weight is None or kind not in BY_WEIGHT:
        return count if mask is None else mask.sum() * (count // max(1, mask.numel()))
    counted = weight
    if mask is not None:
        dims = max(weight.dim(), mask.dim())
        counted, kept = (x.view(*x.shape, *[1] * (dims - x.dim())) for x in (weight, mask))
        counted = torch.where(kept, counted, 0.0)
    total = counted.sum(dtype=torch.float64) * (count // max(1, counted.numel()))
    return total.to(weight.dtype)


def divided(total: Tensor, divisor: Tensor | int) -> Tensor:
    """A mean from its sum: 0 where nothing counts, NaN of no elements, neither with a gradient."""
    if isinstance(divisor, int):
        return total / divisor if divisor else total + math.nan
    empty = divisor == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1, divisor))

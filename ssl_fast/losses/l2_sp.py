"""L2-SP: a penalty for leaving the pretrained weights while fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ssl_fast.backends.dispatch import BACKENDS
from ssl_fast.losses.contrastive import check_choice, describe
from ssl_fast.ops.l2_sp import accumulate_l2_sp
from ssl_fast.ops.l2_sp import l2_sp as l2_sp_op

__all__ = ["l2_sp"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _tensors(name: str, values: Any) -> list[Tensor]:
    """A list of dense floating tensors; a tensor is a list of its own."""
    if isinstance(values, Tensor):
        values = [values]
    if isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable of tensors; got {describe(values)}")
    found = list(values)
    for place, value in enumerate(found):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{place}] must be a tensor; got {describe(value)}")
        if hasattr(value, "to_local"):
            raise TypeError(
                f"{name}[{place}] must be a tensor of this process; got a DTensor: pass its "
                "to_local(), whose penalty is that of this rank's shards"
            )
        if value.dtype not in DTYPES or value.layout is not torch.strided:
            raise TypeError(
                f"{name}[{place}] must be a dense tensor of float32, bfloat16, float16 or "
                f"float64; got {describe(value)} with layout {value.layout}"
            )
    return found


def _check_pairs(parameters: list[Tensor], anchors: list[Tensor]) -> None:
    if not parameters:
        raise ValueError("parameters must hold a tensor at least; got none (a generator that was "
                         "used before is empty)")  # fmt: skip
    if len(parameters) != len(anchors):
        raise ValueError(
            f"anchors must have as many tensors as parameters, {len(parameters)}; got "
            f"{len(anchors)}"
        )
    device = parameters[0].device
    for place, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        if (
            anchor.shape == parameter.shape
            and anchor.dtype is parameter.dtype
            and anchor.device == parameter.device == device
        ):
            continue
        if anchor.shape != parameter.shape:
            raise ValueError(
                f"anchors[{place}] must have the shape of its parameter, "
                f"{tuple(parameter.shape)}; got {tuple(anchor.shape)}"
            )
        if anchor.dtype is not parameter.dtype:
            raise TypeError(
                f"anchors[{place}] must have the dtype of its parameter, {parameter.dtype}; got "
                f"{anchor.dtype}"
            )
        for name, value in (("parameters", parameter), ("anchors", anchor)):
            if value.device != device:
                raise ValueError(
                    f"{name}[{place}] must be on the device of the first parameter, {device}; got "
                    f"{value.device}"
                )


def _trainable(parameters: list[Tensor]) -> list[bool]:
    """Which get a gradient; ValueError for one that has no ``.grad`` of its own."""
    trained = [parameter.requires_grad for parameter in parameters]
    seen = set()
    for place, (parameter, train) in enumerate(zip(parameters, trained, strict=True)):
        if not train:
            continue
        if not parameter.is_leaf:
            raise ValueError(
                f"parameters[{place}] must be a leaf with accumulate=True: what was computed has "
                "no .grad"
            )
        if id(parameter) in seen:
            raise ValueError(f"parameters[{place}] must not be given twice with accumulate=True")
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise TypeError(
                f"parameters[{place}].grad must be dense; got layout {parameter.grad.layout}"
            )
        seen.add(id(parameter))
    return trained


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _accumulate(
    parameters: list[Tensor], anchors: list[Tensor], weight: float, backend: str | None
) -> Tensor:
    """The value of tensors of one dtype; their gradients are written or added to."""
    trained = _trainable(parameters)
    # Gradients that aren't there yet are written; the others, and none for frozen parameters, are
    # added to.
    fresh = [train and p.grad is None for p, train in zip(parameters, trained, strict=True)]
    values = []
    for add in (False, True):
        places = [i for i, new in enumerate(fresh) if new is not add]
        if not places:
            continue
        chosen = [parameters[i] for i in places]
        grads: list[Tensor | None] = [parameters[i].grad if trained[i] else None for i in places]
        if not add:
            grads = [torch.empty_like(x, requires_grad=False) for x in chosen]
        fixed = [anchors[i] for i in places]
        values.append(accumulate_l2_sp(chosen, fixed, grads, weight, add=add, backend=backend))
        if not add:
            for i, grad in zip(places, grads, strict=True):
                parameters[i].grad = grad
    return values[0] if len(values) == 1 else values[0] + values[1]


def l2_sp(
    parameters: Iterable[Tensor],
    anchors: Iterable[Tensor],
    weight: float = 1.0,
    *,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``weight * 0.5 * sum((p - a).square().sum() for p, a in zip(parameters, anchors))``.

    The penalty of Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks" (arXiv:1802.01483), in one pass over all tensors. Before fine-tuning, keep ``anchors =
    [p.detach().clone() for p in model.parameters()]``.

    Args:
        parameters: tensors, such as ``model.parameters()``.
        anchors: what the parameters were in the beginning, as many and of the same shapes and
            dtypes, in the same order. Constants: they get no gradient.
        weight: a number, 0 or more.
        accumulate: add ``weight * (p - a)`` to each parameter's ``.grad`` in the same pass, a third
            of the work of a loss and its backward; a ``.grad`` of None is created. A parameter that
            requires no gradient gets none. The value comes without a gradient: don't add it to the
            loss. Under a GradScaler call it after ``unscale_``. Under torch.compile it breaks the
            graph.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Tensors are float32, bfloat16, float16 or float64 (the reference's), mixed as they come, and on
    one device. Differences and sums are fp32 or wider.

    Returns:
        The penalty, fp32 (float64 where a parameter is), of all parameters, frozen ones included.

    Raises:
        TypeError: what is no tensor, or a DTensor, dtypes that differ, a weight that is no number.
        ValueError: shapes, counts or devices that differ, no parameters, a negative weight; with
            ``accumulate`` a parameter that is not a leaf or is given twice.
        RuntimeError: ``backend`` can't serve this call.
    """
    if isinstance(weight, bool) or not isinstance(weight, (float, int, Real)):
        raise TypeError(f"weight must be a number; got {describe(weight)}")
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"weight must be 0 or more, and finite; got {weight}")
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    left, right = _tensors("parameters", parameters), _tensors("anchors", anchors)
    _check_pairs(left, right)
    values = []
    dtypes = dict.fromkeys(x.dtype for x in left)
    for dtype in dtypes:
        group = left, right
        if len(dtypes) > 1:
            places = [i for i, x in enumerate(left) if x.dtype is dtype]
            group = [left[i] for i in places], [right[i] for i in places]
        values.append(
            _accumulate(*group, float(weight), backend)
            if accumulate
            else l2_sp_op(*group, float(weight), backend=backend)
        )
    return values[0] if len(values) == 1 else torch.stack([x.double() for x in values]).sum().to(
        torch.float64 if any(x.dtype is torch.float64 for x in values) else torch.float32
    )  # fmt: skip

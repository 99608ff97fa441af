"""Pairs of tensors as kernels that walk over memory take them: element by element in one order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["matched", "places_of", "put_back"]


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.is_contiguous() and other.is_contiguous()) or (
        tensor.stride() == other.stride() and _dense(tensor)
    )


def matched(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Both with the same strides, copied where they aren't."""
    left, right = [], []
    for parameter, anchor in zip(parameters, anchors, strict=True):
        pair = parameter, anchor
        if parameter.is_neg() or anchor.is_neg():
            pair = parameter.resolve_neg().contiguous(), anchor.resolve_neg().contiguous()
        elif not _alike(parameter, anchor):
            pair = parameter.contiguous(), anchor.contiguous()
        left.append(pair[0])
        right.append(pair[1])
    return left, right


def places_of(
    grads: Sequence[Tensor | None], parameters: Sequence[Tensor], add: bool
) -> list[Tensor | None]:
    """The gradients, or buffers (with what they hold, to ``add`` to) where they lie otherwise."""
    places: list[Tensor | None] = []
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None or (not grad.is_neg() and _alike(parameter, grad)):
            places.append(grad)
            continue
        buffer = torch.empty_like(parameter)
        places.append(buffer.copy_(grad) if add else buffer)
    return places


def put_back(grads: Sequence[Tensor | None], places: Sequence[Tensor | None]) -> None:
    """From buffers to the gradients, and word to autograd that the others were written."""
    written = []
    for grad, place in zip(grads, places, strict=True):
        if grad is None or place is None:
            continue
        if place is not grad:
            grad.copy_(place)
        elif not grad.is_inference():
            written.append(grad)
    torch.autograd.graph.increment_version(written)

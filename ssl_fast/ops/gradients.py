"""What the ops' autograd functions share."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Unsaved",
    "apart",
    "differentiated_again",
    "graph_is_kept",
    "open_signature",
    "split_by_need",
    "vector_jacobian",
    "wants",
    "watched",
    "weighed",
    "with_unsaved",
]


def open_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Spare ``Function.apply`` the inspection of ``forward(*inputs)``, 15 µs in every call."""
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]
    )
    return forward


def watched() -> bool:
    """Whether a transform of torch.func or torch.compile looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def wants(tensor: Tensor | None) -> bool:
    """Whether a gradient is asked for; a transform's inner tensor doesn't tell of outer ones."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return tensor.requires_grad
    return tensor.requires_grad or torch._C._are_functorch_transforms_active()


def differentiated_again() -> bool:
    """Whether a backward that runs now may itself be differentiated.

    Not so under torch.compile, which raises when it is asked for a second derivative.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def graph_is_kept() -> bool:
    """Whether the graph of the backward that runs can be gone through again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def weighed(weight: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times its weight, [] or of its shape, multiplied in the weight's fp32."""
    if weight.dim() == 0 and grad.dim() > 0:
        # A view of one element, not a scalar: it makes halves multiply in fp32.
        weight = weight.view((1,) * grad.dim())
    return (grad * weight).to(dtype)


def apart(tensor: Tensor, *others: Tensor | None) -> Tensor:
    """``tensor``, or a view where it is one of the others: torch.compile wants distinct inputs."""
    if any(tensor is other for other in others):
        return tensor.view_as(tensor)
    return tensor


class Unsaved(NamedTuple):
    """A tensor without gradient that only a second derivative would read.

    save_for_backward would refuse the first backward too when the tensor was written to since: a
    queue of keys takes the new ones between forward and backward.
    """

    tensor: Tensor
    version: int | None  # None: an inference tensor, which counts none

    def read(self) -> Tensor:
        """The tensor, or RuntimeError where it isn't that of the forward pass any more."""
        if self.version is None or self.tensor._version != self.version:
            raise RuntimeError(
                f"a second derivative needs the {self.tensor.dtype} tensor of shape "
                f"{tuple(self.tensor.shape)} as it was in the forward pass, and it has been "
                "modified by an inplace operation since, or made in inference mode: pass a clone "
                "of it"
            )
        return self.tensor


def split_by_need(
    tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Unsaved | None]]:
    """What autograd must save, and at the other places what only a second derivative reads."""
    saved: list[Tensor | None] = []
    unsaved: list[Unsaved | None] = []
    for tensor in tensors:
        if tensor is None or tensor.requires_grad:
            saved.append(tensor)
            unsaved.append(None)
        else:
            saved.append(None)
            version = None if tensor.is_inference() else tensor._version
            unsaved.append(Unsaved(tensor, version))
    return saved, unsaved


def with_unsaved(
    saved: Sequence[Tensor | None], unsaved: Sequence[Unsaved | None]
) -> list[Tensor | None]:
    """The tensors that ``split_by_need`` took apart."""
    return [x if u is None else u.read() for x, u in zip(saved, unsaved, strict=True)]


def vector_jacobian(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradient of <function(*inputs), cotangents> for the inputs needed.

    torch.func, because it composes: this runs inside a backward, under autograd or torch.func.grad,
    and can be differentiated again.
    """
    chosen = [i for i, need in enumerate(needed) if need and inputs[i] is not None]

    def of_chosen(*values: Any) -> tuple[Tensor, ...]:
        full: list[Any] = list(inputs)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return function(*full)

    found: list[Tensor | None] = [None] * len(inputs)
    if chosen:
        product: Any = torch.func.vjp(of_chosen, *(inputs[i] for i in chosen))
        for i, grad in zip(chosen, product[1](cotangents), strict=True):
            found[i] = grad
    return found

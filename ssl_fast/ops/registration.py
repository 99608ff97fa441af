"""How an op becomes a torch operator: ``torch.ops.ssl_fast.<name>``.

``Library.define`` and ``impl`` by hand, because the ``torch.library.custom_op`` decorator costs
more per call than a small loss takes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ssl_fast.backends import dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "autocast_is_on",
    "backend_module",
    "first_derivative_only",
    "register",
    "without_autocast",
]

# Torch forgets the operators when this object goes.
_library: Any = torch.library.Library("ssl_fast", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator from its schema and give back the overload to call.

    ``implementation`` serves every device: it chooses a backend for each call. ``fake`` gives empty
    results of the right shapes and dtypes, for torch.compile and meta tensors.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssl_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.ssl_fast, name).default


# The identity of a scalar, tied to the inputs whose gradient a forward pass has made: without the
# tie, torch.compile would see no second derivative there and take it for 0, where now it raises.
first_derivative_only = register(
    "first_derivative_only(Tensor weight, Tensor[] inputs) -> Tensor",
    lambda weight, _: weight.clone(),
    lambda weight, _: torch.empty_like(weight),
)


def backend_module(op: str, features: torch.Tensor, shape: tuple[int, ...], backend: str) -> Any:
    """The module that serves ``op`` for ``features``; "" lets the dispatcher choose."""
    return dispatch.select(op, features.device.type, features.dtype, shape, backend)


def autocast_is_on(device_type: str) -> bool:
    """Whether products on such a device are lowered now; a meta device knows no autocast."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block whose products keep the dtype of their operands."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

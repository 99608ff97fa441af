"""How an op becomes a torch operator: ``torch.ops.ssl_fast.<name>``.

``Library.define`` and ``impl`` by hand, because the ``torch.library.custom_op`` decorator costs
more per call than a small loss takes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference.pairs import accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "autocast_is_on",
    "elementwise",
    "empty_like",
    "empty_rows",
    "first_derivative_only",
    "implementation",
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


def autocast_is_on(device_type: str) -> bool:
    """Whether products on such a device are lowered now; a meta device knows no autocast."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block whose products keep the dtype of their operands."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def implementation(
    name: str,
    key_at: int,
    op: str = "pair_softmax",
    check: Callable[..., None] | None = None,
    count_at: int | None = None,
) -> Callable[..., Any]:
    """The operator ``name`` of ``op``: check the arguments, choose a backend, call.

    Argument 0 has the rows, [*, N, D]; argument ``key_at`` the keys, [*, M, D], or the number M
    itself; argument ``count_at`` a number that a backend may refuse, first of the sizes then.
    ``backend`` "" lets the dispatcher choose.
    """

    def run(*arguments: Any, backend: str = "", **rules: bool) -> Any:
        if check is not None:
            check(*arguments)
        query, keys = arguments[0], arguments[key_at]
        device_type = query.device.type
        count = keys if isinstance(keys, int) else keys.shape[-2]
        shape: tuple[int, ...] = (query.shape[-2], count, query.shape[-1])
        if count_at is not None:
            shape = (arguments[count_at], *shape)
        function = getattr(dispatch.select(op, device_type, query.dtype, shape, backend), name)
        # Autocast is still on in here and would lower the reference's products.
        with without_autocast(device_type):
            return function(*arguments, **rules)

    return run


def elementwise(name: str, op: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The operator ``name`` of an ``op`` that goes over numbers, whatever their arrangement.

    The first argument, or the first tensor in it, has the device and the dtype. No backend refuses
    a call for its sizes.
    """

    def run(*arguments: Any, backend: str = "") -> Any:
        check(*arguments)
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        function = dispatch.select(op, first.device.type, first.dtype, (1,), backend)
        return getattr(function, name)(*arguments)

    return run


def empty_rows(features: Tensor, count: int | torch.SymInt | None = None) -> Tensor:
    """An empty result with a number per row (or ``count`` of them)."""
    size = features.shape[0] if count is None else count
    return features.new_empty(size, dtype=accumulation_dtype(features))


def empty_like(features: Tensor | None, needed: bool, other: Tensor) -> Tensor:
    """An empty gradient of ``features``, [0] where it isn't needed."""
    if features is None or not needed:
        return other.new_empty(0)
    return features.new_empty(features.shape)

"""pair_softmax: log-sum-exp of scaled products of all pairs of rows, never storing a pair.

s_ij = query_scale_i key_scale_j <q_i, k_j>. A pair leaves the softmax where j - i is one of
``diagonals`` or where query_ids[i] == key_ids[j]. The arguments of the operators
``torch.ops.ssl_fast.pair_softmax`` and ``pair_softmax_backward`` are those of the backends'
functions. The gradient is a second sweep; gradients of gradients are those of the reference
formula, which stores the pairs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.backends.reference.pair_softmax import accumulation_dtype, inverse_norms, row_loss
from ssl_fast.ops.registration import backend_module, register, without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "RULES",
    "PairSoftmax",
    "accumulation_dtype",
    "inverse_norms",
    "pair_softmax",
    "row_loss",
    "vector_jacobian",
]


class PairSoftmax(NamedTuple):
    """Natural log-sum-exps; -inf where no pair is kept. ``row_max`` carries no gradient."""

    row_lse: Tensor  # [N]
    row_max: Tensor  # [N]
    column_lse: Tensor  # [M], or [0] when not asked for


def implementation(name: str, key_at: int) -> Callable[..., Any]:
    """The operator ``name``, whose keys are argument ``key_at``: choose a backend and call it."""

    def run(*arguments: Any, backend: str = "") -> Any:
        query = arguments[0]
        shape = (query.shape[0], arguments[key_at].shape[0], query.shape[1])
        function = getattr(backend_module("pair_softmax", query, shape, backend), name)
        # Autocast is still on in here and would lower the reference's products.
        with without_autocast(query.device.type):
            return function(*arguments)

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


def _fake_pair_softmax(
    query: Tensor, key: Tensor, *rest: Any, **_: str
) -> tuple[Tensor, Tensor, Tensor]:
    columns = rest[-1]
    return empty_rows(query), empty_rows(query), empty_rows(key) if columns else empty_rows(key, 0)


def _fake_backward(query: Tensor, key: Tensor, *rest: Any, **_: str) -> Any:
    need_query, need_key = rest[-2:]
    return (
        empty_like(query, need_query, query),
        empty_like(key, need_key, key),
        empty_rows(query),
        empty_rows(key),
    )


RULES = "Tensor? query_ids, Tensor? key_ids, SymInt[] diagonals"
_SCALED = f"Tensor query, Tensor key, Tensor query_scale, Tensor key_scale, {RULES}"

_pair_softmax = register(
    f'pair_softmax({_SCALED}, bool columns, *, str backend="") -> (Tensor, Tensor, Tensor)',
    implementation("pair_softmax", 1),
    _fake_pair_softmax,
)
_pair_softmax_backward = register(
    f"pair_softmax_backward({_SCALED}, Tensor row_lse, Tensor? column_lse, Tensor row_grad, "
    'Tensor? column_grad, bool need_query, bool need_key, *, str backend="") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    implementation("pair_softmax_backward", 1),
    _fake_backward,
)


def open_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Spare ``Function.apply`` the inspection of ``forward(*inputs)``, 15 µs in every call."""
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]
    )
    return forward


def differentiated_again() -> bool:
    """Whether a backward that runs now may itself be differentiated.

    Not so under torch.compile, which raises when it is asked for a second derivative.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def apart(tensor: Tensor, *others: Tensor | None) -> Tensor:
    """``tensor``, or a view where it is one of the others: torch.compile wants distinct inputs."""
    if any(tensor is other for other in others):
        return tensor.view_as(tensor)
    return tensor


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


class _Sweep(Function):
    """pair_softmax with its gradient."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _pair_softmax(*arguments, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.diagonals, ctx.columns, ctx.backend = inputs
        row_lse, row_max, column_lse = output
        ctx.mark_non_differentiable(*((row_max,) if ctx.columns else (row_max, column_lse)))
        ctx.save_for_backward(*tensors, row_lse, column_lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        row_grad, _, column_grad = grads
        *tensors, row_lse, column_lse = ctx.saved_tensors
        if row_grad is None:
            row_grad = torch.zeros_like(row_lse)
        if column_grad is None or not ctx.columns:
            column_lse = column_grad = None
        else:
            column_grad = column_grad.contiguous()
        arguments = (
            *tensors, ctx.diagonals, row_lse, column_lse, row_grad.contiguous(), column_grad,
            *ctx.needs_input_grad[:2],
        )  # fmt: skip
        if differentiated_again():
            found = _SweepGradient.apply(*arguments, ctx.backend)  # type: ignore[no-untyped-call]
        else:
            found = _pair_softmax_backward(*arguments, backend=ctx.backend)
        needed = (
            x if need else None for x, need in zip(found, ctx.needs_input_grad[:4], strict=True)
        )
        return *needed, *(None,) * 5


class _SweepGradient(Function):
    """pair_softmax_backward; its own gradient is the reference formula's."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _pair_softmax_backward(*arguments, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        *tensors, ctx.diagonals = inputs[:7]
        ctx.save_for_backward(*tensors, *inputs[7:11])
        ctx.needs = inputs[11:13]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *scaled, query_ids, key_ids, row_lse, column_lse, row_grad, column_grad = ctx.saved_tensors

        def formula(*values: Any) -> Any:
            backward: Any = reference.pair_softmax_backward
            return backward(*values[:4], query_ids, key_ids, ctx.diagonals, *values[4:], *ctx.needs)

        needed = ctx.needs_input_grad
        found = vector_jacobian(
            formula,
            (*scaled, row_lse, column_lse, row_grad, column_grad),
            (*needed[:4], *needed[7:11]),
            grads,
        )
        return *found[:4], None, None, None, *found[4:], None, None, None


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    *,
    query_ids: Tensor | None = None,  # [N]
    key_ids: Tensor | None = None,  # [M]
    diagonals: Sequence[int] = (),
    columns: bool = False,
    backend: str | None = None,
) -> PairSoftmax:
    """``torch.logsumexp(s, dim=1)`` and, with ``columns``, ``dim=0``, of the pairs kept.

    Differentiable in query, key and both scales, to any order. Scales are fp32 (float64 beside
    float64 features), ids int64. The compiled backends take a few diagonals (native 4, triton 3)
    and raise ValueError for more.
    """
    key = apart(key, query)
    return PairSoftmax(
        *_Sweep.apply(  # type: ignore[no-untyped-call]
            query, key, query_scale.contiguous(), key_scale.contiguous(), query_ids, key_ids,
            list(diagonals), columns, backend or "",
        )
    )  # fmt: skip

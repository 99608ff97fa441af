"""pair_softmax: log-sum-exp of scaled products of all pairs of rows, never storing a pair.

s_ij = query_scale_i key_scale_j <q_i, k_j>. A pair leaves the softmax where j - i is one of
``diagonals``, where query_ids[i] == key_ids[j] (with ``matching``: where they differ), or where
either id is ``IGNORED_ID``. Rows with two ids, [N, 2] and [M, 2], are equal in either. Arguments of
the operators ``torch.ops.ssl_fast.pair_softmax``, ``pair_softmax_expectation`` and
``pair_softmax_backward`` are those of the backends' functions. The gradient is a second sweep, or
comes from the expected keys where the keys need none; gradients of gradients are those of the
reference formula, which stores the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.backends.reference.pair_softmax import row_loss
from ssl_fast.backends.reference.pairs import IGNORED_ID, accumulation_dtype, inverse_norms
from ssl_fast.ops.gradients import (
    apart,
    differentiated_again,
    open_signature,
    split_by_need,
    vector_jacobian,
    watched,
    with_unsaved,
)
from ssl_fast.ops.registration import empty_like, empty_rows, implementation, register

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "IGNORED_ID",
    "RULES",
    "PairSoftmax",
    "accumulation_dtype",
    "inverse_norms",
    "pair_softmax",
    "row_loss",
]


class PairSoftmax(NamedTuple):
    """Natural log-sum-exps; -inf where no pair is kept. ``row_max`` carries no gradient."""

    row_lse: Tensor  # [N]
    row_max: Tensor  # [N]
    column_lse: Tensor  # [M], or [0] when not asked for
    diagonal_logit: Tensor  # [N]: s_ij at j = i + diagonals[0], or [0] without a diagonal


def _fake_pair_softmax(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> Any:
    diagonals, columns = rest[-2:]
    return (
        empty_rows(query),
        empty_rows(query),
        empty_rows(key, None if columns else 0),
        empty_rows(query, None if diagonals else 0),
    )


def _fake_expectation(query: Tensor, _key: Tensor, *rest: Any, **_: Any) -> Any:
    wide = accumulation_dtype(query)
    return (
        empty_rows(query),
        empty_rows(query),
        empty_rows(query, None if rest[-1] else 0),
        query.new_empty(query.shape, dtype=wide),
    )


def _fake_backward(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> Any:
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
    f'pair_softmax({_SCALED}, bool columns, *, bool matching=False, str backend="") -> '
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation("pair_softmax", 1),
    _fake_pair_softmax,
)
_pair_softmax_expectation = register(
    f'pair_softmax_expectation({_SCALED}, *, bool matching=False, str backend="") -> '
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation("pair_softmax_expectation", 1),
    _fake_expectation,
)
_pair_softmax_backward = register(
    f"pair_softmax_backward({_SCALED}, Tensor row_lse, Tensor? column_lse, Tensor row_grad, "
    "Tensor? column_grad, Tensor? diagonal_grad, bool need_query, bool need_key, *, "
    'bool matching=False, str backend="") -> (Tensor, Tensor, Tensor, Tensor)',
    implementation("pair_softmax_backward", 1),
    _fake_backward,
)


class _Sweep(Function):
    """pair_softmax with its gradient."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, matching, backend = inputs
        return _pair_softmax(*arguments, matching=matching, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.diagonals, ctx.columns, ctx.matching, ctx.backend = inputs
        row_lse, row_max, column_lse, diagonal_logit = output
        constant = [row_max]
        constant += [] if ctx.columns else [column_lse]
        constant += [] if ctx.diagonals else [diagonal_logit]
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(*tensors, row_lse, column_lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        row_grad, _, column_grad, diagonal_grad = grads
        *tensors, row_lse, column_lse = ctx.saved_tensors
        if row_grad is None:
            row_grad = torch.zeros_like(row_lse)
        if column_grad is None or not ctx.columns:
            column_lse = column_grad = None
        else:
            column_grad = column_grad.contiguous()
        if diagonal_grad is not None:
            diagonal_grad = diagonal_grad.contiguous() if ctx.diagonals else None
        arguments = (
            *tensors, ctx.diagonals, row_lse, column_lse, row_grad.contiguous(), column_grad,
            diagonal_grad, *ctx.needs_input_grad[:2],
        )  # fmt: skip
        if differentiated_again():
            found = _SweepGradient.apply(*arguments, ctx.matching, ctx.backend)  # type: ignore[no-untyped-call]
        else:
            found = _pair_softmax_backward(*arguments, matching=ctx.matching, backend=ctx.backend)
        needed = (
            x if need else None for x, need in zip(found, ctx.needs_input_grad[:4], strict=True)
        )
        return *needed, *(None,) * 6


class _SweepGradient(Function):
    """pair_softmax_backward; its own gradient is the reference formula's."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, matching, backend = inputs
        return _pair_softmax_backward(*arguments, matching=matching, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        *tensors, ctx.diagonals = inputs[:7]
        ctx.save_for_backward(*tensors, *inputs[7:12])
        ctx.needs, ctx.matching = inputs[12:14], inputs[14]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *scaled, query_ids, key_ids = ctx.saved_tensors[:6]
        given = ctx.saved_tensors[6:]  # lse of rows and columns; gradients of both, diagonal's

        def formula(*values: Any) -> Any:
            backward: Any = reference.pair_softmax_backward
            rules = query_ids, key_ids, ctx.diagonals
            return backward(*values[:4], *rules, *values[4:], *ctx.needs, matching=ctx.matching)

        needed = ctx.needs_input_grad
        found = vector_jacobian(formula, (*scaled, *given), (*needed[:4], *needed[7:12]), grads)
        return *found[:4], None, None, None, *found[4:], None, None, None, None


class _ExpectedKeys(Function):
    """The rows' log-sum-exps where the keys need no gradient: a queue, finished in the forward.

    The backward is made of the expected keys. It reads no key, so that the queue may have been
    overwritten by then. For eager mode; inputs and outputs are those of ``_Sweep``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *arguments, _, matching, backend = inputs
        row_lse, row_max, diagonal_logit, expectation = _pair_softmax_expectation(
            *arguments, matching=matching, backend=backend
        )
        column_lse = row_lse.new_empty(0)
        saved, ctx.unsaved = split_by_need(arguments[:6])
        ctx.arguments = (arguments[6], matching, backend)
        ctx.mark_non_differentiable(row_max, column_lse, diagonal_logit)
        # The scale's value is a factor of the query's gradient.
        ctx.save_for_backward(*saved, arguments[2], row_lse, expectation)
        ctx.set_materialize_grads(False)
        return row_lse, row_max, column_lse, diagonal_logit

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        row_grad = grads[0]
        *saved, query_scale, row_lse, expectation = ctx.saved_tensors
        nothing: tuple[None, ...] = (None,) * 10
        if row_grad is None:
            return nothing
        if differentiated_again():
            tensors = with_unsaved(saved, ctx.unsaved)
            diagonals, *rest = ctx.arguments
            found: Any = _SweepGradient.apply(  # type: ignore[no-untyped-call]
                *tensors, diagonals, row_lse, None, row_grad.contiguous(), None, None,
                ctx.needs_input_grad[0], False, *rest,
            )  # fmt: skip
            wanted = ctx.needs_input_grad[0], False, ctx.needs_input_grad[2], False
            return *(x if w else None for x, w in zip(found, wanted, strict=True)), *nothing[:6]
        grad_query = grad_query_scale = None
        if ctx.needs_input_grad[0]:
            query = ctx.saved_tensors[0]
            grad_query = (expectation * (row_grad * query_scale)[:, None]).to(query.dtype)
        if ctx.needs_input_grad[2]:
            query = saved[0] if saved[0] is not None else ctx.unsaved[0].read()
            along = (query.to(expectation.dtype) * expectation).sum(dim=1)
            grad_query_scale = row_grad * along
        return grad_query, None, grad_query_scale, *nothing[:7]


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    *,
    query_ids: Tensor | None = None,  # [N] or [N, 2]
    key_ids: Tensor | None = None,  # [M] or [M, 2]
    diagonals: Sequence[int] = (),
    columns: bool = False,
    matching: bool = False,
    backend: str | None = None,
) -> PairSoftmax:
    """``torch.logsumexp(s, dim=1)`` and, with ``columns``, ``dim=0``, of the pairs kept.

    Differentiable in query, key and both scales, to any order, through both log-sum-exps and
    ``diagonal_logit``, the logits that the first diagonal takes out (0 where there is no such key).
    Keys and key scales that need no gradient, a queue's, may be overwritten before the backward
    where neither columns nor diagonals are asked for. Scales are fp32 (float64 beside float64
    features), ids int64. The compiled backends take a few diagonals (native 4, triton 3) and raise
    ValueError for more.
    """
    key = apart(key, query)
    query_scale, key_scale = query_scale.contiguous(), key_scale.contiguous()
    finished = (
        torch.is_grad_enabled()
        and not (columns or diagonals or watched())
        and not (key.requires_grad or key_scale.requires_grad)
        and (query.requires_grad or query_scale.requires_grad)
    )
    function = _ExpectedKeys if finished else _Sweep
    return PairSoftmax(
        *function.apply(  # type: ignore[no-untyped-call]
            query, key, query_scale, key_scale, query_ids, key_ids,
            list(diagonals), columns, matching, backend or "",
        )
    )  # fmt: skip

"""The losses' exchange as a ring: keys travel from rank to rank, memory is that of two shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.distributed.processes import Processes, first_derivatives_only
from ssl_fast.distributed.rotation import rotate
from ssl_fast.losses.exchange import Local
from ssl_fast.ops.pair_softmax import PairSoftmax, accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Ring"]


class Ring(Processes):
    """Every rank's keys visit every rank; statistics are merged by logaddexp and maximum."""

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        super().__init__(group)
        self.key_sizes = sizes

    def pair_softmax(
        self,
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
        """Local rows against the keys of all ranks, local columns against the rows of all ranks."""
        results: Any = _RingSoftmax.apply(  # type: ignore[no-untyped-call]
            self, tuple(diagonals), columns, matching, backend or "",
            query, key, query_scale.contiguous(), key_scale.contiguous(), query_ids, key_ids,
        )  # fmt: skip
        return PairSoftmax(*results)

    def pair_sigmoid(
        self,
        query: Tensor,  # [N, D]
        key: Tensor,  # [M, D]
        query_scale: Tensor,  # [N]
        key_scale: Tensor,  # [M]
        bias: Tensor,  # []
        *,
        reduce: bool,
        backend: str | None = None,
    ) -> Tensor:
        """The sigmoid loss of local rows against the keys of all ranks, [] or [N]."""
        inputs = (query, key, query_scale.contiguous(), key_scale.contiguous(), bias)
        recorded = torch.is_grad_enabled()
        needs = tuple(recorded and x.requires_grad for x in inputs)
        function = _RingSigmoidSum if reduce else _RingSigmoidRows
        return function.apply(self, backend or "", needs, *inputs)  # type: ignore[no-any-return, no-untyped-call]

    def class_sums(
        self,
        query_ids: Tensor | None,  # [N]
        keys: Tensor,  # [M, D]
        key_ids: Tensor | None,  # [M]
    ) -> tuple[Tensor, Tensor]:
        """Sums over the keys of all ranks that share a row's id, and how many they are."""
        if query_ids is None or key_ids is None:
            sums, counts = Local().class_sums(None, keys, key_ids)
            return self.everywhere(sums), self.everywhere(counts)
        return _RingClassSums.apply(self, query_ids, keys, key_ids)  # type: ignore[no-any-return, no-untyped-call]


class _RingSoftmax(Function):
    """pair_softmax over the keys of all ranks; the backward is a second rotation."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ring, diagonals, columns, matching, backend, *rest = inputs
        query, key, query_scale, key_scale, *ids = rest
        ctx.ring, ctx.diagonals, ctx.columns, ctx.matching, ctx.backend = inputs[:5]
        found: list[Tensor] = []

        def visit(own: bool, tensors: list[Any]) -> tuple[Tensor, ...]:
            keys, scales, key_ids = tensors
            lse, maximum, column_lse, diagonal = torch.ops.ssl_fast.pair_softmax(
                query, keys, query_scale, scales, ids[0], key_ids, diagonals if own else (),
                columns, matching=matching, backend=backend,
            )  # fmt: skip
            if own:
                found.extend((lse, maximum, diagonal))
            else:
                found[0] = torch.logaddexp(found[0], lse)
                found[1] = torch.maximum(found[1], maximum)
            return (column_lse,) if columns else ()

        home = rotate(
            ring, ring.key_sizes, "pair_softmax", (key, key_scale, ids[1]), visit, torch.logaddexp
        )
        row_lse, row_max, diagonal = found
        column_lse = home[0] if columns else row_lse.new_empty(0)
        ctx.save_for_backward(query, key, query_scale, key_scale, *ids, row_lse, column_lse)
        ctx.mark_non_differentiable(row_max)
        ctx.set_materialize_grads(False)
        return row_lse, row_max, column_lse, diagonal

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_derivatives_only()
        query, key, query_scale, key_scale, query_ids, key_ids, row_lse, column_lse = (
            ctx.saved_tensors
        )
        ring, wide = ctx.ring, row_lse.dtype
        row_grad, _, column_grad, diagonal_grad = grads
        row_grad = torch.zeros_like(row_lse) if row_grad is None else row_grad.contiguous()
        if not ctx.columns:
            column_lse = column_grad = None
        elif column_grad is None:
            # The ranks send the same messages whatever reached the columns of one of them.
            column_grad = torch.zeros_like(column_lse)
        if diagonal_grad is not None:
            diagonal_grad = diagonal_grad.contiguous() if ctx.diagonals else None
        need_query, need_key, _, need_key_scale = ctx.needs_input_grad[5:9]
        own_grads: list[Tensor] = []

        def visit(own: bool, tensors: list[Any]) -> tuple[Tensor, ...]:
            keys, scales, ids, lse, grad = tensors
            grad_query, grad_key, grad_query_scale, grad_key_scale = (
                torch.ops.ssl_fast.pair_softmax_backward(
                    query, keys, query_scale, scales, query_ids, ids, ctx.diagonals if own else (),
                    row_lse, lse, row_grad, grad, diagonal_grad if own else None,
                    need_query, need_key, matching=ctx.matching, backend=ctx.backend,
                )
            )  # fmt: skip
            if own:
                own_grads.extend((grad_query.to(wide), grad_query_scale))
            else:
                own_grads[0] += grad_query
                own_grads[1] += grad_query_scale
            if need_key:
                return grad_key.to(wide), grad_key_scale
            return (grad_key_scale,) if need_key_scale else ()

        travelling = (key, key_scale, key_ids, column_lse, column_grad)
        home = rotate(ring, ring.key_sizes, "pair_softmax", travelling, visit, gradient=True)
        grad_query, grad_query_scale = own_grads
        return (
            *(None,) * 5,
            grad_query.to(query.dtype) if need_query else None,
            home[0].to(key.dtype) if need_key else None,
            grad_query_scale,
            home[-1] if home else None,
            None,
            None,
        )


def _sigmoid_rotation(
    ring: Ring,
    backend: str,
    needs: Sequence[bool],  # query, key, query_scale, key_scale, bias
    inputs: Sequence[Tensor],
    row_weight: Tensor | None,
    gradient: bool,
) -> list[Tensor]:
    """The loss of local rows [N] and the gradients of the five inputs, empty if not needed."""
    query, key, query_scale, key_scale, bias = inputs
    wide = accumulation_dtype(query)
    need_key = needs[1] or needs[3]
    need_query = needs[0] or ((needs[2] or needs[4]) and not needs[1])
    found: list[Tensor] = []

    def visit(own: bool, tensors: list[Any]) -> tuple[Tensor, ...]:
        keys, scales = tensors
        loss, grad_query, grad_key, grad_query_scale, grad_key_scale, grad_bias = (
            torch.ops.ssl_fast.pair_sigmoid(
                query, keys, query_scale, scales, bias, row_weight, 0 if own else None,
                need_query, need_key, backend=backend,
            )
        )  # fmt: skip
        made = loss, grad_query.to(wide), grad_query_scale, grad_bias
        if own:
            found.extend(made)
        else:
            found[:] = [x + y for x, y in zip(found, made, strict=True)]
        return (grad_key.to(wide), grad_key_scale) if need_key else ()

    home = rotate(ring, ring.key_sizes, "pair_sigmoid", (key, key_scale), visit, gradient=gradient)
    loss, grad_query, grad_query_scale, grad_bias = found
    grad_key, grad_key_scale = home if need_key else (key_scale[:0], key_scale[:0])
    return [loss, grad_query, grad_key, grad_query_scale, grad_key_scale, grad_bias.sum()]


class _RingSigmoidSum(Function):
    """The sum over local rows; its gradient is made in the forward pass, in the same rotation."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, backend: str, needs: Any, *inputs: Tensor) -> Tensor:
        loss, *made = _sigmoid_rotation(ring, backend, needs, inputs, None, False)
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(*made)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        first_derivatives_only()
        grads = [
            (grad * weight).to(dtype) if need else None
            for grad, dtype, need in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return None, None, None, *grads


class _RingSigmoidRows(Function):
    """The loss of each local row; the backward is a second rotation."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, backend: str, needs: Any, *inputs: Tensor) -> Tensor:
        ctx.ring, ctx.backend = ring, backend
        ctx.save_for_backward(*inputs)
        return _sigmoid_rotation(ring, backend, (False,) * len(needs), inputs, None, False)[0]

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        first_derivatives_only()
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        _, *made = _sigmoid_rotation(
            ctx.ring, ctx.backend, needs, inputs, weight.contiguous(), True
        )
        grads = [
            grad.to(x.dtype) if need else None
            for grad, x, need in zip(made, inputs, needs, strict=True)
        ]
        return None, None, None, *grads


class _RingClassSums(Function):
    """Sums of keys by class over all ranks; the gradient travels with the keys' ids."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, query_ids: Tensor, keys: Tensor, key_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def visit(own: bool, tensors: list[Any]) -> tuple[Tensor, ...]:
            made = Local().class_sums(query_ids, *tensors)
            found[:] = made if own else [x + y for x, y in zip(found, made, strict=True)]
            return ()

        rotate(ring, ring.key_sizes, "class_sums", (keys, key_ids), visit)
        ctx.ring, ctx.dtype = ring, keys.dtype
        ctx.save_for_backward(query_ids, key_ids)
        ctx.mark_non_differentiable(found[1])
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        first_derivatives_only()
        query_ids, key_ids = ctx.saved_tensors
        ring = ctx.ring

        def visit(_own: bool, tensors: list[Any]) -> tuple[Tensor, ...]:
            # A key's gradient is the sum over the rows that share its id: ids trade places.
            return (Local().class_sums(tensors[0], grad, query_ids)[0],)

        home = rotate(ring, ring.key_sizes, "class_sums", (key_ids,), visit, gradient=True)
        return None, None, home[0].to(ctx.dtype), None

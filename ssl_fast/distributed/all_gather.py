"""The losses' exchange by gathering: every rank holds all keys; statistics stay local."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ssl_fast.distributed.processes import Layout, Processes, first_derivatives_only
from ssl_fast.losses.exchange import Local
from ssl_fast.ops import pair_sigmoid, pair_softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AllGather"]


class AllGather(Processes):
    """Keys are gathered once; a gradient of theirs is sent back and summed, in the ranks' order."""

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        super().__init__(group)
        self.key_sizes = sizes

    @property
    def start(self) -> int:
        """Where this rank's keys stand among all."""
        return sum(self.key_sizes[: self.rank])

    def gather(self, kind: str, *tensors: Tensor | None) -> tuple[Any, ...]:
        """All ranks' tensors, one below the other; differentiable where floating."""
        return _Gather.apply(self, kind, *tensors)  # type: ignore[no-any-return, no-untyped-call]

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
    ) -> pair_softmax.PairSoftmax:
        """Local rows against the keys of all ranks, local columns against the rows of all ranks."""
        keys, scales, ids = self.gather("pair_softmax", key, key_scale, key_ids)
        start, own = self.start, key.shape[0]

        def sweep(first: int, last: int, diagonals: Sequence[int]) -> pair_softmax.PairSoftmax:
            return pair_softmax.pair_softmax(
                query, keys[first:last], query_scale, scales[first:last],
                query_ids=query_ids, key_ids=None if ids is None else ids[first:last],
                diagonals=diagonals, columns=columns, matching=matching, backend=backend,
            )  # fmt: skip

        if not diagonals or (tuple(diagonals) == (0,) and query.shape[0] <= own):
            found = sweep(0, keys.shape[0], tuple(start + d for d in diagonals))
            column_lse = found.column_lse
        else:
            # A diagonal is one of this rank's keys, so it must not run on into another's.
            parts = [sweep(0, start, ()), sweep(start, start + own, diagonals),
                     sweep(start + own, keys.shape[0], ())]  # fmt: skip
            found = pair_softmax.PairSoftmax(
                _log_add(torch.stack([part.row_lse for part in parts])),
                torch.stack([part.row_max for part in parts]).amax(dim=0),
                parts[1].column_lse,
                parts[1].diagonal_logit,
            )
            column_lse = torch.cat([part.column_lse for part in parts])
        if not columns:
            return found
        merged: Any = _MergeColumns.apply(self, column_lse)  # type: ignore[no-untyped-call]
        return found._replace(column_lse=merged)

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
        keys, scales = self.gather("pair_sigmoid", key, key_scale)
        return pair_sigmoid.pair_sigmoid(
            query, keys, query_scale, scales, bias,
            positive_diagonal=self.start, reduce=reduce, backend=backend,
        )  # fmt: skip

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
        return Local().class_sums(query_ids, *self.gather("class_sums", keys, key_ids))


def _log_add(parts: Tensor) -> Tensor:
    """Log-sum-exp along dim 0, with gradient 0 and not NaN where all is -inf."""
    maximum = parts.detach().amax(dim=0)
    shift = torch.where(torch.isfinite(maximum), maximum, 0.0)
    total = (parts - shift).exp().sum(dim=0)
    empty = total == 0.0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + shift)


def _all_gather(
    processes: AllGather, kind: str, tensors: Sequence[Tensor | None], *, gradient: bool = False
) -> list[Any]:
    """All ranks' tensors, one below the other, in one message."""
    sizes = processes.key_sizes
    present = next(x for x in tensors if x is not None)
    layout = Layout.of(tensors)
    if present.device.type == "cpu":
        processes.greet(kind, gradient, layout, sizes)
    # Gathering wants equal lengths: the shorter messages are followed by what nobody reads.
    longest = layout.size(max(sizes))
    packed = layout.pack(tensors, present.device)
    outgoing = packed if packed.shape[0] == longest else packed.new_zeros(longest)
    outgoing[: packed.shape[0]] = packed
    incoming = packed.new_empty((processes.world_size, longest))
    with processes.waiting(f"all ranks to send {sizes} rows"):
        dist.all_gather(list(incoming), outgoing, group=processes.group)
    shares = [layout.unpack(x, rows) for x, rows in zip(incoming, sizes, strict=True)]
    return [
        None if parts[0] is None else torch.cat([x for x in parts if x is not None])
        for parts in zip(*shares, strict=True)
    ]


def _to_owners(processes: AllGather, kind: str, rows: Tensor, *, gradient: bool) -> Tensor:
    """What every rank has for this rank's keys, [ranks, M, ...], from values for all keys."""
    sizes, own = processes.key_sizes, processes.key_sizes[processes.rank]
    if rows.device.type == "cpu":
        processes.greet(kind, gradient, Layout.of((rows,)), sizes)
    incoming = rows.new_empty((processes.world_size * own, *rows.shape[1:]))
    with processes.waiting(f"all ranks to send {own} rows"):
        dist.all_to_all_single(
            incoming,
            rows.contiguous(),
            [own] * processes.world_size,
            list(sizes),
            group=processes.group,
        )
    return incoming.view(processes.world_size, own, *rows.shape[1:])


class _Gather(Function):
    """All ranks' tensors; the gradient goes back to its owner, who sums in fp32."""

    @staticmethod
    def forward(ctx: Any, processes: AllGather, kind: str, *tensors: Tensor | None) -> Any:
        ctx.processes, ctx.kind = processes, kind
        gathered = _all_gather(processes, kind, tensors)
        ctx.like = [None if x is None else (x.shape, x.dtype, x.device) for x in gathered]
        ctx.mark_non_differentiable(
            *(x for x in gathered if x is not None and not x.is_floating_point())
        )
        ctx.set_materialize_grads(False)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_derivatives_only()
        found: list[Tensor | None] = []
        for like, grad, need in zip(ctx.like, grads, ctx.needs_input_grad[2:], strict=True):
            if not need:
                found.append(None)
                continue
            # Every rank takes part in this, whatever of the gathered keys it used.
            shape, dtype, device = like
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            sent = torch.zeros(shape, dtype=wide, device=device) if grad is None else grad.to(wide)
            parts = _to_owners(ctx.processes, ctx.kind, sent, gradient=True)
            found.append(parts.sum(dim=0).to(dtype))
        return None, None, *found


class _MergeColumns(Function):
    """The log-sum-exp of each own column over all ranks, from local ones of all columns."""

    @staticmethod
    def forward(
        ctx: Any,
        processes: AllGather,
        local: Tensor,  # [all M]
    ) -> Tensor:
        merged = _log_add(_to_owners(processes, "pair_softmax", local, gradient=False))
        ctx.processes = processes
        ctx.save_for_backward(local, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        first_derivatives_only()
        local, merged = ctx.saved_tensors
        merged, grad = _all_gather(ctx.processes, "pair_softmax", (merged, grad), gradient=True)
        return None, grad * (local - torch.where(merged == -torch.inf, 0.0, merged)).exp()

"""What a loss asks of others: one process, or the same formulas over many.

Every loss has a function ``<loss>_over(exchange, ...)`` that takes the public function's arguments
and goes through an exchange wherever another process's rows matter. ``Local`` is one process;
``ssl_fast.distributed`` has the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.ops import pair_sigmoid, pair_softmax
from ssl_fast.ops.gradients import apart
from ssl_fast.ops.pair_softmax import IGNORED_ID
from ssl_fast.ops.registration import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Local"]


class Local:
    """One process: the keys are its own."""

    world_size = 1

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
        """This process's rows against the keys of all, its keys against the rows of all.

        ``diagonals`` relate to this process's keys only.
        """
        if query_ids is not None and key_ids is not None:
            key_ids = apart(key_ids, query_ids)
        return pair_softmax.pair_softmax(
            query, key, query_scale, key_scale,
            query_ids=query_ids, key_ids=key_ids, diagonals=diagonals, columns=columns,
            matching=matching, backend=backend,
        )  # fmt: skip

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
        """The sigmoid loss of this process's rows, [] or [N]; its key i is row i's positive."""
        return pair_sigmoid.pair_sigmoid(
            query, key, query_scale, key_scale, bias,
            positive_diagonal=0, reduce=reduce, backend=backend,
        )  # fmt: skip

    def class_sums(
        self,
        query_ids: Tensor | None,  # [N]
        keys: Tensor,  # [M, D]
        key_ids: Tensor | None,  # [M]
    ) -> tuple[Tensor, Tensor]:
        """The sum of the keys that share a row's id [N, D], and how many they are [N], in fp32.

        Without ``query_ids`` of all keys, [D] and []. Keys with ``IGNORED_ID`` never count.
        Differentiable in ``keys``. Sorted, because torch.unique would wait for a GPU.
        """
        rows = keys.shape[0]
        if key_ids is None:
            return keys.sum(dim=0), keys.new_full((), rows)
        kept = (key_ids != IGNORED_ID).to(keys.dtype)
        if query_ids is None:
            with without_autocast(keys.device.type):  # which would lower the product
                return kept @ keys, kept.sum()
        if rows == 0:
            return keys.new_zeros(query_ids.shape[0], keys.shape[1]), keys.new_zeros(
                query_ids.shape[0]
            )
        ordered = key_ids.sort().values
        bucket = torch.searchsorted(ordered, key_ids)
        sums = torch.zeros_like(keys).index_add(0, bucket, keys)
        counts = torch.zeros_like(kept).index_add(0, bucket, kept)
        place = torch.searchsorted(ordered, query_ids).clamp(max=rows - 1)
        shared = (ordered[place] == query_ids) & (query_ids != IGNORED_ID)
        return sums[place] * shared[:, None], counts[place] * shared

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes.

        Its gradient is ``world_size`` times that of the sum, which DistributedDataParallel's
        average over processes makes the gradient of the loss.
        """
        return value

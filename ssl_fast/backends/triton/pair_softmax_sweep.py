"""The sweep over all pairs, from tensors to launches: statistics of the logits per row and column.

Nothing here reads a value on the host: grids follow from shapes alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels
from ssl_fast.backends.triton.device import config_for
from ssl_fast.backends.triton.launch import Sides, key_splits, rows_of, tile_arguments

# Column statistics wait for their merge in a table, a row per block of queries: its size at most.
COLUMN_TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Pairs(Sides):
    """Two sides, and the rules that take pairs of them out of the softmax.

    The logits are s_ij = scale query_scale_i key_scale_j <q_i, k_j>.
    """

    scale: Tensor  # []
    query_ids: Tensor | None  # [N] or [N, 2]
    key_ids: Tensor | None  # [M] or [M, 2]
    diagonals: list[int]
    matching: bool

    @property
    def ids(self) -> int:
        """How many ids a row has."""
        if self.query_ids is None or self.key_ids is None:
            return 0
        return self.query_ids.dim()

    def turned(self) -> "Pairs":
        """The same pairs, the keys for queries and the queries for keys."""
        return Pairs(
            self.key, self.query, self.key_scale, self.query_scale, self.scale,
            self.key_ids, self.query_ids, [-diagonal for diagonal in self.diagonals], self.matching,
        )  # fmt: skip

    def rules(self) -> dict[str, Any]:
        """The kernels' arguments for the exclusions."""
        n, m = len(self.query), len(self.key)
        crossing = sorted({diagonal for diagonal in self.diagonals if -n < diagonal < m})
        if len(crossing) > 3:
            raise ValueError(f"diagonals: 3 may cross the pairs at most, got {len(crossing)}")
        padded = [*crossing, 0, 0, 0]
        return {
            "query_ids": self.query_ids if self.ids else self.query_scale,
            "key_ids": self.key_ids if self.ids else self.key_scale,
            "diagonal_0": padded[0],
            "diagonal_1": padded[1],
            "diagonal_2": padded[2],
            "DIAGONALS": len(crossing),
            "IDS": self.ids,
            "MATCHING": self.matching,
        }


def pairs_of(
    query: Tensor,
    key: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    diagonals: list[int],
    scale: Tensor | None = None,
    *,
    matching: bool = False,
) -> Pairs:
    """The pairs as the kernels take them; without a scale it is 1."""
    if scale is None:
        scale = torch.ones((), device=query.device)
    return Pairs(
        rows_of(query),
        rows_of(key),
        query_scale.contiguous(),
        key_scale.contiguous(),
        scale,
        None if query_ids is None else query_ids.contiguous(),
        None if key_ids is None else key_ids.contiguous(),
        diagonals,
        matching,
    )


@dataclass(frozen=True)
class Statistics:
    """What a sweep leaves of the logits; the column fields are empty when not asked for."""

    row_lse: Tensor  # [N]
    row_max: Tensor  # [N]
    column_lse: Tensor  # [M]
    column_max: Tensor  # [M]


def sweep(pairs: Pairs, *, columns: bool, triangle: bool = False) -> Statistics:
    """Log-sum-exp and maximum per row, and per column when asked, in one pass over the pairs.

    triangle visits j > i alone: for a symmetric matrix, where row i's other half is column i.
    Every partial result has one writer and the merges a fixed order, so results are reproducible.
    """
    n, m = len(pairs.query), len(pairs.key)
    wide = m if columns else 0
    if n == 0 or m == 0:
        row, column = (pairs.query_scale.new_full((x,), -torch.inf) for x in (n, wide))
        return Statistics(row, row.clone(), column, column.clone())
    op = "sweep_columns" if columns else "sweep"
    config = config_for(op, pairs.query, pairs.key, ids=pairs.ids > 0)
    blocks = triton.cdiv(n, config.block_rows)
    if columns:
        blocks = min(blocks, max(1, COLUMN_TABLE_BYTES // (8 * m)))
    splits = key_splits(blocks, m, config, pairs.query.device)
    # results that share memory would share a version counter
    lse_parts, max_parts = (pairs.query_scale.new_empty(splits, n) for _ in range(2))
    # a tile below the triangle writes nothing
    column_parts = pairs.query_scale.new_full((2, blocks, wide), -torch.inf)
    column_lse = column_parts.new_full((wide,), -torch.inf)
    column_max = column_lse.clone()
    tile = tile_arguments(config, pairs.query)
    query_scale = pairs.query_scale * pairs.scale
    for begin in range(0, n, blocks * config.block_rows):
        end = min(begin + blocks * config.block_rows, n)
        used = triton.cdiv(end - begin, config.block_rows)
        kernels.sweep_kernel[(used, splits)](
            query_scale=query_scale,
            key_scale=pairs.key_scale,
            row_lse=lse_parts,
            row_max=max_parts,
            column_lse=column_parts[0],
            column_max=column_parts[1],
            row_begin=begin,
            row_end=end,
            n_queries=n,
            n_keys=m,
            COLUMNS=columns,
            TRIANGLE=triangle,
            RESIDENT=pairs.query.shape[1] <= tile["BLOCK_DEPTH"],
            **pairs.features(),
            **pairs.rules(),
            **tile,
        )
        if columns:
            column_lse = torch.logaddexp(column_lse, torch.logsumexp(column_parts[0, :used], 0))
            column_max = torch.maximum(column_max, column_parts[1, :used].amax(0))
            if triangle and end < n:
                column_parts.fill_(-torch.inf)
    row_lse = lse_parts[0] if splits == 1 else torch.logsumexp(lse_parts, 0)
    row_max = max_parts[0] if splits == 1 else max_parts.amax(0)
    # the comparisons inside a tile drop NaN, the sums keep it
    column_max = torch.where(column_lse.isnan(), column_lse, column_max)
    return Statistics(row_lse, row_max, column_lse, column_max)

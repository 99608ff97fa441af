"""The sweep over all pairs, from tensors to launches: statistics of the logits per row and column.

Nothing here reads a value on the host: grids follow from shapes alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels
from ssl_fast.backends.triton.device import config_for, input_precision, processor_count
from ssl_fast.backends.triton.tuning import Config

# Column statistics wait for their merge in a table, a row per block of queries: its size at most.
COLUMN_TABLE_BYTES = 64 * 2**20
# A split of the keys shorter than this many tiles costs more in its merge than it gains.
TILES_PER_SPLIT = 4


def rows_of(features: Tensor) -> Tensor:
    """The features with adjacent columns: rows may be strided, expanded or offset."""
    return features if features.stride(1) == 1 else features.contiguous()


@dataclass(frozen=True)
class Pairs:
    """Two sets of rows, and the rules that take pairs of them out of the softmax.

    The logits are s_ij = scale query_scale_i key_scale_j <q_i, k_j>.
    """

    query: Tensor  # [N, D], adjacent columns
    key: Tensor  # [M, D], adjacent columns
    query_scale: Tensor  # [N]
    key_scale: Tensor  # [M]
    scale: Tensor  # []
    query_ids: Tensor | None  # [N]
    key_ids: Tensor | None  # [M]
    diagonals: list[int]

    def rules(self) -> dict[str, Any]:
        """The kernels' arguments for the exclusions."""
        n, m = len(self.query), len(self.key)
        crossing = sorted({diagonal for diagonal in self.diagonals if -n < diagonal < m})
        if len(crossing) > 3:
            raise ValueError(f"diagonals: 3 may cross the pairs at most, got {len(crossing)}")
        padded = [*crossing, 0, 0, 0]
        has_ids = self.query_ids is not None and self.key_ids is not None
        return {
            "query_ids": self.query_ids if has_ids else self.query_scale,
            "key_ids": self.key_ids if has_ids else self.key_scale,
            "diagonal_0": padded[0],
            "diagonal_1": padded[1],
            "diagonal_2": padded[2],
            "DIAGONALS": len(crossing),
            "HAS_IDS": has_ids,
        }


def tile_arguments(config: Config, features: Tensor) -> dict[str, Any]:
    """The kernels' arguments for a tile, its depth no wider than the features need."""
    depth = features.shape[1]
    block_depth = min(config.block_depth, max(16, triton.next_power_of_2(depth)))
    return {
        "EVEN_DEPTH": depth % block_depth == 0,
        "PRECISION": input_precision(features),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": block_depth,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


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
        nothing = pairs.query_scale.new_full((n + wide,), -torch.inf)
        row, column = nothing[:n], nothing[n:]
        return Statistics(row, row.clone(), column, column.clone())
    config = config_for("sweep_columns" if columns else "sweep", pairs.query, pairs.key)
    blocks = triton.cdiv(n, config.block_rows)
    if columns:
        blocks = min(blocks, max(1, COLUMN_TABLE_BYTES // (8 * m)))
    tiles = triton.cdiv(m, config.block_columns)
    # few rows leave multiprocessors idle: two blocks for each, as long as each has tiles to walk
    wanted = triton.cdiv(2 * processor_count(pairs.query.device), blocks)
    splits = max(1, min(wanted, tiles // TILES_PER_SPLIT))
    row_parts = pairs.query_scale.new_empty(2, splits, n)
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
            query=pairs.query,
            key=pairs.key,
            query_scale=query_scale,
            key_scale=pairs.key_scale,
            row_lse=row_parts[0],
            row_max=row_parts[1],
            column_lse=column_parts[0],
            column_max=column_parts[1],
            row_begin=begin,
            row_end=end,
            n_queries=n,
            n_keys=m,
            depth=pairs.query.shape[1],
            query_stride=pairs.query.stride(0),
            key_stride=pairs.key.stride(0),
            COLUMNS=columns,
            TRIANGLE=triangle,
            RESIDENT=pairs.query.shape[1] <= tile["BLOCK_DEPTH"],
            **pairs.rules(),
            **tile,
        )
        if columns:
            column_lse = torch.logaddexp(column_lse, torch.logsumexp(column_parts[0, :used], 0))
            column_max = torch.maximum(column_max, column_parts[1, :used].amax(0))
            if triangle and end < n:
                column_parts.fill_(-torch.inf)
    row_lse = row_parts[0, 0] if splits == 1 else torch.logsumexp(row_parts[0], 0)
    row_max = row_parts[1, 0] if splits == 1 else row_parts[1].amax(0)
    # the comparisons inside a tile drop NaN, the sums keep it
    column_max = torch.where(column_lse.isnan(), column_lse, column_max)
    return Statistics(row_lse, row_max, column_lse, column_max)

"""What the sweeps over Q Kᵀ of every op have in common on the host: two sides, tiles, splits."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton.device import input_precision, processor_count
from ssl_fast.backends.triton.tuning import Config

# A split of the keys shorter than this many tiles costs more in its merge than it gains.
TILES_PER_SPLIT = 4


def rows_of(features: Tensor) -> Tensor:
    """The features with adjacent columns: rows may be strided, expanded or offset."""
    return features if features.stride(1) == 1 else features.contiguous()


@dataclass(frozen=True)
class Sides:
    """Two sets of rows, each with a factor per row."""

    query: Tensor  # [N, D], adjacent columns
    key: Tensor  # [M, D], adjacent columns
    query_scale: Tensor  # [N]
    key_scale: Tensor  # [M]

    def features(self) -> dict[str, Any]:
        """The kernels' arguments for the two sets of rows."""
        return {
            "query": self.query,
            "key": self.key,
            "depth": self.query.shape[1],
            "query_stride": self.query.stride(0),
            "key_stride": self.key.stride(0),
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


def key_splits(blocks: int, keys: int, config: Config, device: torch.device) -> int:
    """Into how many parts a sweep cuts the keys, whose results a merge in fixed order joins."""
    # few rows leave multiprocessors idle: two blocks for each, as long as each has tiles to walk
    wanted: int = triton.cdiv(2 * processor_count(device), blocks)
    tiles: int = triton.cdiv(keys, config.block_columns)
    return max(1, min(wanted, tiles // TILES_PER_SPLIT))

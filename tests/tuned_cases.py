"""Which cases stand for the rows of the tuning table, and which row a case uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssl_fast.backends.triton import tuning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Wider than all buckets, and a multiple of every tile's depth.
DEEP = 512
# The row's op where it isn't the case's own.
ROW_OF = {
    "sweep_triangle": "sweep_columns",
    "weights_expectation": "weights",
    "fused_query": "fused",
    "fused_key": "fused",
    "fused_both": "fused",
    "fused_mirror": "fused",
    "fused_moment": "fused",
    "nearest_plain": "nearest",
    "top_k_most": "top_k",
}


@dataclass(frozen=True)
class Case:
    """One kernel as the functions launch it on an architecture; target is sm_xx or gfxxxx."""

    op: str
    dtype: str
    depth: int
    target: str
    precision: str = "ieee"
    ids: int = 0  # that a row has
    matching: bool = False
    # every size is 1, which Triton takes for a constant
    ones: bool = False

    @property
    def row(self) -> str:
        return ROW_OF.get(self.op, self.op)

    @property
    def name(self) -> str:
        extra = (
            (f"-ids{self.ids}" if self.ids else "")
            + ("-matching" if self.matching else "")
            + ("-ones" if self.ones else "")
            + ("" if self.dtype != "fp32" else f"-{self.precision}")
        )
        return f"{self.op}-{self.dtype}-{self.depth}-{self.target}{extra}"


def places(op: str, *, ids: bool = False) -> list[tuple[str, int, str, str, int]]:
    """Dtype, depth, target, precision and ids of a case or more for each of the op's rows.

    ids: the kernel may exclude by them, and what a row serves with ids is a case of its own.
    """
    found = []
    for (row, name, bucket, architecture), config in tuning.TABLE.items():
        if row.removesuffix("_ids") != op:
            continue
        dtype = next(short for short, dtype in DTYPES.items() if dtype is getattr(torch, name))
        depth = bucket or DEEP
        launches = [(depth, architecture)]
        if architecture == "generic":
            # AMD, the consumer cards, and any card where depth or strides are no multiples of 16
            odd = depth - 4
            launches = [(depth, "gfx942"), (depth, "sm_89"), (odd, "sm_90"), (odd, "sm_100")]
        served = [
            with_ids
            for with_ids in ((0, 1) if ids else (0,))
            if config is tuning.lookup(op, DTYPES[dtype], depth, architecture, ids=with_ids > 0)
        ]
        for used, target in launches:
            precision = "tf32x3" if dtype == "fp32" and target != "gfx942" else "ieee"
            found += [(dtype, used, target, precision, with_ids) for with_ids in served]
    return found


def config_of(case: Any) -> tuning.Config:
    """The row that a launch takes where the case's target is the device."""
    architecture = "generic"
    if case.target.startswith("sm_") and case.depth % 16 == 0:
        architecture = tuning.architecture_of((int(case.target[3:-1]), int(case.target[-1])))
    dtype = DTYPES[case.dtype]
    return tuning.lookup(case.row, dtype, case.depth, architecture, ids=case.ids > 0)


def tile_of(case: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a case's tile and its launch options."""
    import triton

    config = config_of(case)
    block_depth = min(config.block_depth, max(16, triton.next_power_of_2(case.depth)))
    constants = {
        "EVEN_DEPTH": case.depth % block_depth == 0,
        "PRECISION": case.precision,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": block_depth,
    }
    return constants, {"num_warps": config.warps, "num_stages": config.stages}

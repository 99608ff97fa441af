"""Tile sizes for the Triton kernels: frozen tables, keyed by op, dtype, depth and architecture.

The tests compile every row below ahead of time and hold its spills, registers and shared memory
against limits; none has been measured on a card yet, and each says so. Rows that were stand in
measured.json beside this file, with the card as their source and their own date, and go before
those below; the file is what ``python -m benchmarks.tune`` writes.
"""

import functools
from dataclasses import dataclass

import torch

from ssl_fast.backends.triton import measured

ANY_DEPTH = 0
DEPTH_BUCKETS = (64, 128, 256)
OPS = (
    "sweep",
    "sweep_columns",
    "weights",
    "weights_mirror",
    "weights_moments",
    "weights_symmetric",
    "sigmoid_sweep",
    "sigmoid_weights",
    "linear_reconstruction",
    "nearest",
    "top_k",
)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "generic")


@dataclass(frozen=True)
class Config:
    """One kernel's tile: rows by columns, the depth it multiplies at once, and how it is launched.

    A depth that fits block_depth keeps the query tile on chip for the whole sweep.
    """

    block_rows: int
    block_columns: int
    block_depth: int
    warps: int
    stages: int
    source: str = "compiled ahead of time, not yet measured on a card"
    date: str = "2026-11-22"


# What an interpreter test needs: several tiles, chunks and tails out of a few dozen rows.
INTERPRETER = Config(16, 16, 16, 1, 1, source="small, for tests", date="2026-11-22")

# Rows of later days, with the same source.
_new = functools.partial(Config, date="2026-11-25")
_newest = functools.partial(Config, date="2026-11-26")

Table = dict[measured.Key, Config]


def _sixteen_bit(dtype: str) -> Table:
    """Rows for bf16 and fp16, whose kernels differ by a few registers only."""
    # tall tiles hold fewer columns per thread, and with them fewer of the vectors read per column;
    # fp16 has two more of those than bf16, and would spill in bf16's
    half = dtype == "float16"
    return {
        ("sweep", dtype, 64, "sm_80"): Config(128, 128, 64, 8, 3),
        ("sweep", dtype, 128, "sm_80"): Config(128, 128, 128, 8, 2),
        ("sweep", dtype, 256, "sm_80"): Config(128, 64, 256, 8, 2),
        ("sweep", dtype, ANY_DEPTH, "sm_80"): Config(128, 128, 64, 8, 3),
        ("sweep_columns", dtype, 64, "sm_80"): Config(128, 128, 64, 8, 3),
        ("sweep_columns", dtype, 128, "sm_80"): Config(128, 128, 128, 8, 2),
        ("sweep_columns", dtype, ANY_DEPTH, "sm_80"): Config(128, 128, 64, 8, 3),
        ("weights", dtype, ANY_DEPTH, "sm_80"): Config(128, 128, 32, 8, 4),
        ("weights_mirror", dtype, ANY_DEPTH, "sm_80"): Config(128, 64, 64, 8, 3),
        ("weights_moments", dtype, ANY_DEPTH, "sm_80"): Config(128, 64 if half else 128, 64, 8, 3),
        ("sweep", dtype, 64, "sm_90"): Config(128, 128, 64, 8, 3),
        ("sweep", dtype, 128, "sm_90"): Config(128, 128, 128, 8, 3),
        ("sweep", dtype, 256, "sm_90"): Config(128, 128, 256, 8, 2),
        ("sweep", dtype, ANY_DEPTH, "sm_90"): Config(128, 256, 64, 8, 3),
        ("sweep_columns", dtype, 64, "sm_90"): Config(256, 64, 64, 8, 3),
        ("sweep_columns", dtype, 128, "sm_90"): Config(256, 64, 128, 8, 3),
        ("sweep_columns", dtype, ANY_DEPTH, "sm_90"): Config(128, 128, 64, 8, 3),
        ("weights", dtype, ANY_DEPTH, "sm_90"): Config(256, 128, 64, 8, 3),
        ("weights_mirror", dtype, ANY_DEPTH, "sm_90"): Config(256, 64, 64, 8, 3),
        ("weights_moments", dtype, ANY_DEPTH, "sm_90"): Config(128 if half else 256, 64, 64, 8, 3),
        ("sweep", dtype, 64, "sm_100"): Config(128, 128, 64, 8, 3),
        ("sweep", dtype, 128, "sm_100"): Config(128, 128, 128, 8, 3),
        ("sweep", dtype, 256, "sm_100"): Config(128, 128, 256, 8, 2),
        ("sweep", dtype, ANY_DEPTH, "sm_100"): Config(128, 128, 64, 8, 3),
        ("sweep_columns", dtype, 64, "sm_100"): Config(128, 64, 64, 8, 3),
        ("sweep_columns", dtype, 128, "sm_100"): Config(128, 64, 128, 8, 3),
        ("sweep_columns", dtype, ANY_DEPTH, "sm_100"): Config(128, 64, 64, 8, 3),
        ("weights", dtype, ANY_DEPTH, "sm_100"): Config(128, 128, 64, 8, 3),
        ("weights_mirror", dtype, ANY_DEPTH, "sm_100"): Config(128, 64, 64, 8, 3),
        ("weights_moments", dtype, ANY_DEPTH, "sm_100"): Config(128, 64, 64, 8, 3),
        # 64 KB of shared memory at most: AMD's limit, and within the consumer cards' 99 KB. Depths
        # that 16 doesn't divide come here on any card and are loaded element by element: chunks of
        # 64 spill 32 to 244 bytes then on sm_100 (linear_reconstruction's 456 on sm_90)
        ("sweep", dtype, 64, "generic"): Config(64, 64, 64, 4, 2),
        ("sweep", dtype, 128, "generic"): Config(64, 64, 128, 4, 2),
        ("sweep", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("sweep_columns", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("weights", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("weights_mirror", dtype, ANY_DEPTH, "generic"): Config(64, 64, 64, 4, 2),
        ("weights_moments", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
    }


def _more_sixteen_bit(dtype: str) -> Table:
    """Rows for the sigmoid loss, the symmetric gradient, and ids."""
    half = dtype == "float16"
    return {
        ("sweep_columns_ids", dtype, 128, "sm_80"): _new(128, 64, 128, 8, 2),
        ("sweep_ids", dtype, ANY_DEPTH, "sm_90"): _new(128, 128, 64, 8, 3),
        ("weights_ids", dtype, ANY_DEPTH, "sm_90"): _new(128 if half else 256, 64, 64, 8, 3),
        ("sweep_ids", dtype, 64, "sm_100"): _new(128, 64, 64, 8, 3),
        ("sweep_ids", dtype, 128, "sm_100"): _new(128, 64, 128, 8, 3),
        ("sweep_ids", dtype, 256, "sm_100"): _new(128, 64, 256, 8, 2),
        ("sweep_ids", dtype, ANY_DEPTH, "sm_100"): _new(128, 64, 64, 8, 3),
        ("weights_ids", dtype, ANY_DEPTH, "sm_100"): _new(128, 64, 64, 8, 3),
        ("weights_symmetric", dtype, ANY_DEPTH, "sm_80"): _new(128, 64, 64, 8, 3),
        ("weights_symmetric", dtype, ANY_DEPTH, "sm_90"): _new(128 if half else 256, 64, 64, 8, 3),
        ("weights_symmetric", dtype, ANY_DEPTH, "sm_100"): _new(128, 32, 64, 8, 3),
        ("weights_symmetric", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("sigmoid_sweep", dtype, 64, "sm_80"): _new(128, 128, 64, 8, 3),
        ("sigmoid_sweep", dtype, 128, "sm_80"): _new(128, 128, 128, 8, 2),
        ("sigmoid_sweep", dtype, ANY_DEPTH, "sm_80"): _new(128, 128, 64, 8, 3),
        ("sigmoid_weights", dtype, ANY_DEPTH, "sm_80"): _new(128, 64, 64, 8, 3),
        ("sigmoid_sweep", dtype, 64, "sm_90"): _new(128, 128, 64, 8, 3),
        ("sigmoid_sweep", dtype, 128, "sm_90"): _new(128, 128, 128, 8, 3),
        ("sigmoid_sweep", dtype, ANY_DEPTH, "sm_90"): _new(128, 128, 64, 8, 3),
        ("sigmoid_weights", dtype, ANY_DEPTH, "sm_90"): _new(128 if half else 256, 64, 64, 8, 3),
        ("sigmoid_sweep", dtype, 64, "sm_100"): _new(128, 128, 64, 8, 3),
        ("sigmoid_sweep", dtype, 128, "sm_100"): _new(128, 128, 128, 8, 3),
        ("sigmoid_sweep", dtype, ANY_DEPTH, "sm_100"): _new(128, 128, 64, 8, 3),
        ("sigmoid_weights", dtype, ANY_DEPTH, "sm_100"): _new(128, 64, 64, 8, 3),
        ("linear_reconstruction", dtype, ANY_DEPTH, "sm_80"): _new(128, 64, 64, 8, 3),
        ("linear_reconstruction", dtype, ANY_DEPTH, "sm_90"): _new(128, 64, 64, 8, 3),
        ("linear_reconstruction", dtype, ANY_DEPTH, "sm_100"): _new(128, 64, 64, 8, 3),
        ("linear_reconstruction", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("sigmoid_sweep", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("sigmoid_weights", dtype, ANY_DEPTH, "generic"): _new(64, 64, 64, 4, 2),
    }


def _fused(dtype: str) -> Table:
    """Rows for the fused gradient and the flash sweep, whose output is as wide as the depth."""
    # at 128 columns sm_90 spills 48 bytes with ids, sm_100 200 to 840; sm_80 824 at 64 by 128 deep
    return {
        ("fused", dtype, 64, "sm_80"): _newest(128, 64, 64, 8, 3),
        ("fused", dtype, 128, "sm_80"): _newest(128, 32, 128, 8, 3),
        ("fused", dtype, 64, "sm_90"): _newest(128, 64, 64, 8, 3),
        ("fused", dtype, 128, "sm_90"): _newest(128, 64, 128, 8, 3),
        ("fused", dtype, 64, "sm_100"): _newest(128, 64, 64, 8, 3),
        ("fused", dtype, 128, "sm_100"): _newest(128, 64, 128, 8, 3),
        # 32 columns take 300 registers and more on AMD's card, 8 warps spill
        ("fused", dtype, 64, "generic"): _newest(64, 16, 64, 4, 2),
        ("fused", dtype, 128, "generic"): _newest(64, 16, 128, 4, 2),
        ("flash", dtype, 64, "sm_80"): _newest(128, 64, 64, 8, 3),
        ("flash", dtype, 128, "sm_80"): _newest(128, 32, 128, 8, 3),
        ("flash", dtype, 64, "sm_90"): _newest(128, 128, 64, 8, 3),
        ("flash", dtype, 128, "sm_90"): _newest(128, 64, 128, 8, 3),
        ("flash", dtype, 64, "sm_100"): _newest(128, 64, 64, 8, 3),
        ("flash", dtype, 128, "sm_100"): _newest(128, 64, 128, 8, 3),
        ("flash", dtype, 64, "generic"): _newest(64, 16, 64, 4, 2),
        ("flash", dtype, 128, "generic"): _newest(64, 16, 128, 4, 2),
    }


def _searches(dtype: str) -> Table:
    """Rows for the nearest centroid and the nearest neighbours, which keep 64-bit keys."""
    table: Table = {}
    for architecture, columns, stages in (("sm_80", 64, 2), ("sm_90", 128, 3), ("sm_100", 64, 3)):
        table |= {
            ("nearest", dtype, 64, architecture): _new(128, columns, 64, 8, 3),
            ("nearest", dtype, 128, architecture): _new(128, columns, 128, 8, stages),
            ("nearest", dtype, ANY_DEPTH, architecture): _new(128, columns, 64, 8, 3),
            ("top_k", dtype, 128, architecture): _new(64, 64, 128, 8, stages),
            ("top_k", dtype, 64, architecture): _new(64, 64, 64, 8, stages),
            ("top_k", dtype, ANY_DEPTH, architecture): _new(64, 64, 64, 8, 3),
        }
    return table | {
        # where 16 doesn't divide the depth, 4 warps spill 648 bytes at 128, and 384 in chunks of 64
        ("nearest", dtype, 128, "generic"): _newest(64, 64, 128, 8, 2),
        ("nearest", dtype, ANY_DEPTH, "generic"): _newest(64, 64, 32, 4, 2),
        ("top_k", dtype, ANY_DEPTH, "generic"): _new(32, 64, 64, 4, 2),
    }


def _full_precision() -> Table:
    """Rows for fp32: 3×TF32 or TF32 on tensor cores, plain multiply-adds where there are none."""
    table: Table = {}
    for op in OPS:
        newer = ("sigmoid", "linear", "weights_symmetric", "nearest", "top_k")
        config = _new if op.startswith(newer) else Config
        for architecture in ("sm_80", "sm_90", "sm_100"):
            rows = 64 if op == "top_k" else 128
            table[op, "float32", ANY_DEPTH, architecture] = config(rows, 64, 32, 8, 3)
        table[op, "float32", ANY_DEPTH, "generic"] = config(64, 64, 32, 8, 2)
    # choice.py fuses no deeper and on no other card
    for op in ("fused", "flash"):
        table[op, "float32", 64, "sm_80"] = _newest(32, 32, 64, 4, 2)
        table[op, "float32", 64, "sm_90"] = _newest(64, 64, 64, 8, 2)
        table[op, "float32", 64, "sm_100"] = _newest(64, 64, 64, 8, 2)
    return table


TABLE: Table = _full_precision()
for _dtype in ("bfloat16", "float16"):
    TABLE |= _sixteen_bit(_dtype) | _more_sixteen_bit(_dtype) | _fused(_dtype) | _searches(_dtype)


def from_text(text: str) -> Table:
    """The rows of this table in a text like measured.json's."""
    return {key: Config(**fields) for key, fields in measured.from_text(text, "op").items()}


TABLE |= from_text(measured.PATH.read_text())


def architecture_of(capability: tuple[int, int] | None) -> str:
    """The table's name for a CUDA capability; None stands for a device that has none (AMD)."""
    if capability is None:
        return "generic"
    major, minor = capability
    if (major, minor) == (8, 0):
        return "sm_80"
    # 8.6, 8.9 and 12.x are consumer cards: sm_80's instructions with 99 KB of shared memory
    return {9: "sm_90", 10: "sm_100"}.get(major, "generic")


def lookup(
    op: str, dtype: torch.dtype, depth: int, architecture: str, *, ids: bool = False
) -> Config:
    """The row for this op, or the op's row for any depth where its bucket has none of its own.

    Where ids' vectors would not fit in registers beside the op's own tile, it has rows with them.
    """
    name = str(dtype).removeprefix("torch.")
    bucket = next((bound for bound in DEPTH_BUCKETS if depth <= bound), ANY_DEPTH)
    for width in (bucket, ANY_DEPTH):
        for row in (f"{op}_ids", op) if ids else (op,):
            found = TABLE.get((row, name, width, architecture))
            if found is not None:
                return found
    raise KeyError(f"{op} has no row for {name} on {architecture}")

"""The kernels of nearest, centroid_update and top_k for compile_triton.py."""

from __future__ import annotations

from typing import Any

from compile_triton_kernels import typed
from tuned_cases import TARGETS, Case, places, tile_of

# Sweeps of nearest and top_k; top_k as for 10 neighbours and for the most.
SEARCHES = {"nearest": {}, "nearest_plain": {}, "top_k": {"KEPT": 16}, "top_k_most": {"KEPT": 64}}
SMALL = ("half_norms", "rescore", "distances", "segment_sums")


def cases() -> list[Case]:
    """Every row of the table; beside them, no scales, most neighbours, TF32, sizes of 1."""
    found = [Case(op, *place) for op in ("nearest", "top_k") for place in places(op)]
    for target in TARGETS:
        found += [Case(op, "bf16", 128, target) for op in ("nearest_plain", "top_k_most", *SMALL)]
        if target != "gfx942":
            found += [Case("nearest", "fp32", 128, target, precision="tf32")]
    return [
        *found,
        *(Case(op, "bf16", 1, "sm_90", ones=True) for op in ("nearest", "top_k", *SMALL)),
    ]


def source_of(case: Case) -> tuple[Any, dict[str, int]]:
    """The kernel with its types, and its launch options."""
    kernel, constants, options = (small_kernel if case.op in SMALL else search_kernel)(case)
    return typed(kernel, constants, case, ("x", "others", "rows")), options


def search_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from ssl_fast.backends.triton import nearest_kernels, top_k_kernels

    constants, options = tile_of(case)
    constants |= {
        "HAS_SCALE": case.op != "nearest_plain",
        "CENTERED": case.dtype == "fp32",
        "RESIDENT": case.depth <= constants["BLOCK_DEPTH"],
        **SEARCHES[case.op],
    }
    if case.op.startswith("top_k"):
        return top_k_kernels.top_k_kernel, constants, options
    constants["RAGGED"] = case.op != "nearest_plain"
    constants["CERTIFY"] = case.dtype != "fp32" or case.precision == "tf32"
    return nearest_kernels.nearest_kernel, constants, options


def small_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from ssl_fast.backends.triton import centroid_update, centroid_update_kernels, nearest
    from ssl_fast.backends.triton import nearest_kernels as kernels

    constants: dict[str, Any] = {"HAS_SCALE": True}
    if case.op == "segment_sums":
        constants |= {
            "HAS_WEIGHT": True,
            "BLOCK_ROWS": centroid_update.ROW_BLOCK,
            "BLOCK_DEPTH": centroid_update.DEPTH_BLOCK,
        }
        return centroid_update_kernels.segment_sums_kernel, constants, {}
    constants["BLOCK_DEPTH"] = nearest.DEPTH_BLOCK
    constants["BLOCK_COLUMNS" if case.op == "rescore" else "BLOCK_ROWS"] = nearest.ROW_BLOCK
    if case.op == "half_norms":
        constants["CENTERED"] = True
    return getattr(kernels, f"{case.op}_kernel"), constants, {}

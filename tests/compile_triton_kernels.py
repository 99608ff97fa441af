"""The kernels of pair_softmax and pair_sigmoid for compile_triton.py, and those over rows."""

from __future__ import annotations

from typing import Any

from tuned_cases import ROW_OF, TARGETS, Case, places, tile_of

FLAGS = {
    "sweep": {"COLUMNS": False, "TRIANGLE": False},
    "sweep_columns": {"COLUMNS": True, "TRIANGLE": False},
    "sweep_triangle": {"COLUMNS": True, "TRIANGLE": True},
    "weights": {"SIDES": 1, "ROW_MOMENT": False, "COLUMN_MOMENT": False},
    "weights_mirror": {"SIDES": 3, "ROW_MOMENT": True, "COLUMN_MOMENT": False},
    "weights_moments": {"SIDES": 2, "ROW_MOMENT": True, "COLUMN_MOMENT": True},
    "weights_symmetric": {"SIDES": 2, "ROW_MOMENT": True, "COLUMN_MOMENT": False},
    "weights_expectation": {"SIDES": 1, "ROW_MOMENT": False, "COLUMN_MOMENT": False},
    "fused_query": {"TERMS": 1, "PRODUCT": True, "MOMENT": False},
    "fused_key": {"TERMS": 2, "PRODUCT": True, "MOMENT": True},
    "fused_both": {"TERMS": 3, "PRODUCT": True, "MOMENT": True},
    "fused_mirror": {"TERMS": 4, "PRODUCT": True, "MOMENT": True},
    "fused_moment": {"TERMS": 3, "PRODUCT": False, "MOMENT": True},
    "flash": {},
    "sigmoid_sweep": {},
    "sigmoid_weights": {"HAS_WEIGHT": True},
}
# Ops whose pairs are never excluded by ids, and one that others stand for with them.
WITHOUT_IDS = ("weights_mirror", "fused_mirror", "sigmoid_sweep", "sigmoid_weights", "fused_key")
# Kernels without matrix instructions.
ROW_KERNELS = ("row_dot", "finish_rows")
# As many as the functions use them with: the symmetric gradients exclude three, the others one.
DIAGONALS = {"weights_mirror": 3, "weights_symmetric": 3, "fused_both": 3, "fused_mirror": 3}


def cases() -> list[Case]:
    """Every row of the table under each kernel that uses it; beside them, other rules and TF32."""
    found = [
        Case(op, *place)
        for op in FLAGS
        if op != "fused_moment"  # no more than its part of fused_both
        for place in places(ROW_OF.get(op, op), ids=op not in WITHOUT_IDS)
    ]
    for op in ("sweep_triangle", "weights_symmetric", "fused_both", "flash"):
        found += [Case(op, "bf16", 128, "sm_90", ids=ids, matching=ids < 2) for ids in (1, 2)]
    tf32 = [Case(op, "fp32", 128, "sm_90", precision="tf32") for op in ("sweep", "sigmoid_sweep")]
    tf32 += [Case(op, "fp32", 64, "sm_90", precision="tf32") for op in ("fused_both", "flash")]
    moments = (Case("fused_moment", "bf16", 128, target) for target in TARGETS)
    ones = (Case(op, "bf16", 1, "sm_90", ones=True) for op in ("fused_both", "flash"))
    rows = (Case(op, "bf16", 128, target) for op in ROW_KERNELS for target in TARGETS)
    return list(dict.fromkeys((*found, *tf32, *moments, *ones, *rows)))


def source_of(case: Case) -> tuple[Any, dict[str, int]]:
    """The kernel with its types, and its launch options."""
    kernel, constants, options = (row_kernel if case.op in ROW_KERNELS else pair_kernel)(case)
    features = ("query", "key", "own", "other", "strip", "left", "right", "features", "gradient")
    return typed(kernel, constants, case, features), options


def pair_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The kernel, its constants and its launch options for a case on pairs."""
    from ssl_fast.backends.triton import (
        pair_sigmoid_kernels,
        pair_softmax_flash_kernels,
        pair_softmax_fused_kernels,
        pair_softmax_kernels,
    )

    constants, options = tile_of(case)
    constants |= {"DIAGONALS": DIAGONALS.get(case.op, 1), **FLAGS[case.op]}
    sigmoid = case.op.startswith("sigmoid_")
    kernels = pair_sigmoid_kernels if sigmoid else pair_softmax_kernels
    if not sigmoid:
        constants |= {"IDS": case.ids, "MATCHING": case.matching}
    if case.row == "fused":
        kernel = pair_softmax_fused_kernels.products_kernel
    elif case.row == "flash":
        kernel = pair_softmax_flash_kernels.expectation_kernel
    elif case.row in ("sweep", "sweep_columns", "sigmoid_sweep"):
        kernel = kernels.sweep_kernel
        constants["RESIDENT"] = case.depth <= constants["BLOCK_DEPTH"]
    else:
        kernel = kernels.weights_kernel
        constants["HAS_FACTORS"] = case.dtype == "fp16" or case.op == "weights_expectation"
    return kernel, constants, options


def row_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from ssl_fast.backends.triton import row_kernels, rows

    constants: dict[str, Any] = {
        "BLOCK_ROWS": rows.ROW_BLOCK,
        "BLOCK_DEPTH": rows.DEPTH_BLOCK,
    }
    if case.op == "finish_rows":
        flags = ("HAS_PRODUCT", "HAS_RESTORE", "HAS_OTHER", "PROJECT")
        constants |= dict.fromkeys(flags, True) | {"WRAP": False}
    return getattr(row_kernels, f"{case.op}_kernel"), constants, {}


def typed(kernel: Any, constants: dict[str, Any], case: Case, features: tuple[str, ...]) -> Any:
    """The kernel with the types its launch gives it: aligned pointers, sizes divisible by 16."""
    from triton.compiler import ASTSource

    integers = ("lengths", "labels", "unsure", "unsure_count", "indices", "order", "bounds")
    plain = (
        "row_begin",
        "row_end",
        "column_begin",
        "shift",
        "positive",
        "k",
        "width",
        *(f"diagonal_{i}" for i in range(3)),
    )
    sizes = ("column_end", "n_queries", "n_keys", "n_rows", "n_others", "depth", "strip_width")
    sizes += ("n_segments", "pairs", "n_own", "n_other")
    if case.ones:
        ones = (x for x in kernel.arg_names if x in (*sizes, "k", "width") or x.endswith("stride"))
        constants = constants | dict.fromkeys(ones, 1)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in plain:
            signature[name] = "i32"
        elif name == "error":
            signature[name] = "fp32"
        else:
            size = name in sizes or name.endswith("stride")
            signature[name] = "i32" if size else "*fp32"
            if name in features:
                signature[name] = f"*{case.dtype}"
            if name.endswith("_ids") or name in integers:
                signature[name] = "*i64"
            if name in ("sums", "counts"):
                signature[name] = "*fp64"
            if not size or case.depth % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)

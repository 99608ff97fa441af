"""Compiles Triton kernels ahead of time, for GPUs that this machine needn't have.

`python compile_triton_kernels.py` prints a JSON object: each case's name with what the assembler
said of it, all of cases() or those named. test_triton_compile.py and test_triton_nearest.py run it
in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS = {
    "sweep": {"COLUMNS": False, "TRIANGLE": False},
    "sweep_columns": {"COLUMNS": True, "TRIANGLE": False},
    "sweep_triangle": {"COLUMNS": True, "TRIANGLE": True},
    "weights": {"SIDES": 1, "ROW_MOMENT": False, "COLUMN_MOMENT": False},
    "weights_mirror": {"SIDES": 3, "ROW_MOMENT": True, "COLUMN_MOMENT": False},
    "weights_moments": {"SIDES": 2, "ROW_MOMENT": True, "COLUMN_MOMENT": True},
    "weights_symmetric": {"SIDES": 2, "ROW_MOMENT": True, "COLUMN_MOMENT": False},
    "weights_expectation": {"SIDES": 1, "ROW_MOMENT": False, "COLUMN_MOMENT": False},
    "sigmoid_sweep": {},
    "sigmoid_weights": {"HAS_WEIGHT": True},
}
# The tuning table's op where it isn't the case's own.
TUNED_AS = {
    "sweep_triangle": "sweep_columns",
    "weights_expectation": "weights",
}
# Sweeps of nearest and top_k; top_k as for 10 neighbours and for the most.
SEARCHES = {"nearest": {}, "nearest_plain": {}, "top_k": {"KEPT": 16}, "top_k_most": {"KEPT": 64}}
# Kernels without matrix instructions.
ROW_KERNELS = ("row_dot", "finish_rows")
SMALL = ("half_norms", "rescore", "distances", "segment_sums")
# As many as the functions use them with: the symmetric gradients exclude three, the others one.
DIAGONALS = {"weights_mirror": 3, "weights_symmetric": 3}


_said: dict[str, str] = {}


@dataclass(frozen=True)
class Case:
    """One kernel as the functions launch it on an architecture; target is sm_xx or gfxxxx."""

    op: str
    dtype: str
    depth: int
    target: str
    ids: int = 0  # that a row has
    matching: bool = False
    precision: str = field(default="ieee")
    # every size is 1, which Triton takes for a constant
    ones: bool = False

    @property
    def name(self) -> str:
        extra = (
            (f"-ids{self.ids}" if self.ids else "")
            + ("-matching" if self.matching else "")
            + ("-ones" if self.ones else "")
            + ("" if self.dtype != "fp32" else f"-{self.precision}")
        )
        return f"{self.op}-{self.dtype}-{self.depth}-{self.target}{extra}"


def cases() -> list[Case]:
    """bf16 on sm_90 in full; of the rest, what differs from it."""
    found = []
    for target in ("sm_80", "sm_90", "sm_100"):
        for depth in (64, 128, 256, 768) if target == "sm_90" else (128, 768):
            found += [Case(op, "bf16", depth, target) for op in ("sweep", "sweep_triangle")]
        found += [Case(op, "bf16", 128, target) for op in FLAGS if op.startswith("weights")]
        found += [Case("weights_moments", "fp16", 128, target)]
        found += [
            Case(op, "fp32", 128, target, precision="tf32x3") for op in ("sweep", "weights_moments")
        ]
        found += [Case(f"sigmoid_{op}", "bf16", 128, target) for op in ("sweep", "weights")]
        found += [
            Case("sigmoid_sweep", "bf16", 768, target),
            Case("sigmoid_weights", "fp16", 128, target),
            Case("sigmoid_weights", "fp32", 128, target, precision="tf32x3"),
        ]
        found += [
            Case(op, "bf16", 128, target, ids=1)
            for op in ("sweep", "sweep_triangle", "weights_symmetric", "weights_moments")
        ]
    found += [
        # a depth that is no multiple of anything, ids, the columns of a rectangle, TF32, no TF32
        Case("sweep", "bf16", 19, "sm_90"),
        Case("weights", "bf16", 19, "sm_90"),
        Case("sigmoid_weights", "bf16", 19, "sm_90"),
        Case("sweep", "bf16", 768, "sm_90", ids=1),
        Case("weights", "bf16", 128, "sm_90", ids=1),
        *(Case("weights_expectation", "bf16", 128, f"sm_{x}", ids=1) for x in (90, 100)),
        *(Case("sweep_triangle", "bf16", 128, "sm_90", i, matching=i < 2) for i in (1, 2)),
        *(Case("weights_symmetric", "bf16", 128, "sm_90", i, matching=i < 2) for i in (1, 2)),
        Case("sigmoid_sweep", "fp16", 128, "sm_90"),
        Case("sigmoid_sweep", "fp32", 128, "sm_90", precision="tf32"),
        *(Case(f"sigmoid_{op}", "bf16", 128, "gfx942") for op in ("sweep", "weights")),
        *(Case(op, "fp16", 128, "sm_90") for op in ("sweep", "weights", "weights_mirror")),
        Case("sweep_columns", "bf16", 128, "sm_90"),
        Case("sweep", "fp32", 128, "sm_90", precision="tf32"),
        Case("sweep", "bf16", 128, "gfx942"),
        Case("weights_moments", "bf16", 128, "gfx942"),
        Case("sweep", "fp32", 128, "gfx942"),
        *(Case(op, "bf16", 128, "sm_90") for op in ROW_KERNELS),
    ]
    return found


def search_cases() -> list[Case]:
    """The kernels of nearest, centroid_update and top_k, for test_triton_nearest.py."""
    found = []
    for target in ("sm_80", "sm_90", "sm_100"):
        for depth in (64, 128, 768):
            found += [Case(op, "bf16", depth, target) for op in ("nearest", "top_k")]
        found += [
            Case("nearest_plain", "bf16", 128, target),
            Case("nearest", "fp16", 128, target),
            Case("top_k_most", "bf16", 128, target),
            *(Case(op, "fp32", 128, target, precision="tf32x3") for op in ("nearest", "top_k")),
            Case("nearest", "fp32", 128, target, precision="tf32"),
        ]
    return [
        *found,
        *(Case(op, "bf16", 19, "sm_90") for op in ("nearest", "top_k")),
        *(Case(op, "bf16", 128, "sm_90") for op in SMALL),
        *(Case(op, "bf16", 128, "gfx942") for op in (*SEARCHES, *SMALL)),
        Case("nearest", "fp32", 128, "gfx942"),
        *(Case(op, "bf16", 1, "sm_90", ones=True) for op in ("nearest", "top_k", *SMALL)),
    ]


def pair_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The kernel, its constants and its launch options for a case on pairs."""
    from ssl_fast.backends.triton import pair_sigmoid_kernels, pair_softmax_kernels

    row = TUNED_AS.get(case.op, case.op)
    constants, options = tuned(case, row)
    constants |= {"DIAGONALS": DIAGONALS.get(case.op, 1), **FLAGS[case.op]}
    sigmoid = case.op.startswith("sigmoid_")
    kernels = pair_sigmoid_kernels if sigmoid else pair_softmax_kernels
    if not sigmoid:
        constants |= {"IDS": case.ids, "MATCHING": case.matching}
    if row.removeprefix("sigmoid_").startswith("sweep"):
        kernel = kernels.sweep_kernel
        constants["RESIDENT"] = case.depth <= constants["BLOCK_DEPTH"]
    else:
        kernel = kernels.weights_kernel
        constants["HAS_FACTORS"] = case.dtype == "fp16" or case.op == "weights_expectation"
    return kernel, constants, options


def tuned(case: Case, row: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a case's tile and its launch options."""
    import triton

    from ssl_fast.backends.triton import tuning

    named = case.target.startswith("sm") and case.depth % 16 == 0
    architecture = case.target if named else "generic"
    config = tuning.lookup(row, DTYPES[case.dtype], case.depth, architecture, ids=case.ids > 0)
    block_depth = min(config.block_depth, max(16, triton.next_power_of_2(case.depth)))
    constants = {
        "EVEN_DEPTH": case.depth % block_depth == 0,
        "PRECISION": case.precision,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": block_depth,
    }
    return constants, {"num_warps": config.warps, "num_stages": config.stages}


def search_kernel(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    from ssl_fast.backends.triton import nearest_kernels, top_k_kernels

    constants, options = tuned(case, "top_k" if case.op.startswith("top_k") else "nearest")
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


def source(kernel: Any, constants: dict[str, Any], case: Case) -> Any:
    """The kernel with the types its launch gives it: aligned pointers, sizes divisible by 16."""
    from triton.compiler import ASTSource

    features = ("query", "key", "strip", "left", "right", "other", "features", "gradient")
    if case.op in (*SEARCHES, *SMALL):
        features = ("x", "others", "rows")
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
    sizes += ("n_segments", "pairs")
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


def compile_case(case: Case) -> dict[str, Any]:
    if case.op in FLAGS:
        kernel, constants, options = pair_kernel(case)
    elif case.op in SEARCHES:
        kernel, constants, options = search_kernel(case)
    elif case.op in ROW_KERNELS:
        kernel, constants, options = row_kernel(case)
    else:
        kernel, constants, options = small_kernel(case)
    return report(source(kernel, constants, case), case.target, options)


def report(compilable: Any, target: str, options: dict[str, int]) -> dict[str, Any]:
    """What the assembler says of a kernel on a target, sm_xx or gfxxxx."""
    import triton
    from triton.backends.compiler import GPUTarget

    cuda = target.startswith("sm_")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compiled = triton.compile(
            compilable,
            target=GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64),
            options={**options, "enable_fp_fusion": True},
        )
    result: dict[str, Any] = {"shared": compiled.metadata.shared}
    if cuda:
        # cases that come to the same kernel are compiled once
        log = _said.setdefault(compiled.hash, said.getvalue())
        assembly = compiled.asm["ptx"]
        result["registers"] = int(re.search(r"Used (\d+) registers", log)[1])  # type: ignore[index]
        result["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
        # C75xx: the assembler's remarks that it serialised wgmma
        result["remarks"] = sorted(set(re.findall(r"C75\d\d", log)))
    else:
        assembly = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])  # type: ignore[index]
        result["spilled"] = sum(map(int, re.findall(r"[sv]gpr_spill_count:\s+(\d+)", assembly)))
        result["remarks"] = []
    instructions = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma", "cp.async")
    result["instructions"] = [x for x in instructions if x in assembly]
    return result


def main() -> None:
    names = sys.argv[1:]
    every = (*cases(), *search_cases())
    chosen = [case for case in every if case.name in names] if names else cases()
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    # a kernel that was compiled before would have no log
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps({case.name: compile_case(case) for case in chosen}))


if __name__ == "__main__":
    main()

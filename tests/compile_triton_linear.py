"""The kernel of linear_reconstruction for compile_triton.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuned_cases import TARGETS, places, tile_of

KINDS = ("mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits")
LEAVES = ("sum", "losses", "slopes")


@dataclass(frozen=True)
class LinearCase:
    """The kernel as the function launches it on an architecture; target is sm_xx or gfxxxx."""

    leaves: str
    kind: str
    dtype: str
    depth: int
    target: str
    target_dtype: str = "fp32"
    # weight, mask and pos_weight: "", or how far the first two reach
    with_: str = ""
    precision: str = "ieee"
    # sizes and strides are 1, which Triton takes for a constant
    ones: bool = False
    ids: int = 0

    row = "linear_reconstruction"

    @property
    def name(self) -> str:
        extra = [self.with_] * bool(self.with_) + ["ones"] * self.ones
        extra += [self.precision] * (self.dtype == "fp32")
        return "-".join(
            (self.leaves, self.kind, self.dtype, str(self.depth), self.target, self.target_dtype,
             *extra)
        )  # fmt: skip


def cases() -> list[LinearCase]:
    """Every row of the table; every kind in bf16 on sm_90; elsewhere what differs from these."""
    found = [LinearCase("slopes", kind, "bf16", 128, "sm_90") for kind in KINDS if kind != "bce"]
    for dtype, depth, target, precision, _ in places("linear_reconstruction"):
        for reach in ("", "elements"):
            row = (dtype, depth, target, dtype, reach, precision)
            found += [LinearCase("slopes", "bce_with_logits", *row)]
    for target in TARGETS:
        found += [
            LinearCase("sum", "bce_with_logits", "bf16", 128, target),
            LinearCase("losses", "bce_with_logits", "bf16", 128, target, with_="elements"),
            LinearCase("slopes", "mse", "bf16", 128, target, "u8", "rows"),
        ]
    return [
        *found,
        LinearCase("slopes", "mse", "fp32", 128, "sm_90", precision="tf32"),
        LinearCase("slopes", "huber", "bf16", 19, "sm_90", with_="rows"),
        LinearCase("slopes", "bce_with_logits", "bf16", 1, "sm_90", with_="elements", ones=True),
        LinearCase("losses", "mse", "bf16", 1, "sm_90", ones=True),
    ]


def source_of(case: LinearCase) -> tuple[Any, dict[str, int]]:
    """The kernel with the types its launch gives it: aligned pointers, sizes divisible by 16."""
    from triton.compiler import ASTSource

    from ssl_fast.backends.triton import linear_reconstruction_kernels

    kernel = linear_reconstruction_kernels.losses_kernel
    constants, options = tile_of(case)
    reach = {"": 0, "rows": 1, "elements": 2}[case.with_]
    constants |= {
        "KIND": KINDS.index(case.kind),
        "POSITIVE": reach > 0 and case.kind == "bce_with_logits",
        "HAS_BIAS": True,
        "WEIGHT": reach,
        "MASK": reach,
        "LEAVES": LEAVES.index(case.leaves),
        "HAS_FACTORS": case.leaves == "slopes" and case.dtype == "fp16",
    }
    sizes = ("column_end", "depth", "query_stride", "key_stride", "target_stride", "strip_width")
    sizes += ("weight_stride", "mask_stride")
    plain = ("row_begin", "row_end", "column_begin")
    if case.ones:
        constants |= dict.fromkeys(sizes, 1)
    types = {
        "query": f"*{case.dtype}",
        "key": f"*{case.dtype}",
        "target": f"*{case.target_dtype}",
        "mask": "*i8",
        "strip": f"*{case.dtype}" if case.leaves == "slopes" else "*fp32",
        **dict.fromkeys((*sizes, *plain), "i32"),
        **dict.fromkeys(("parameter", "target_scale", "target_shift"), "fp32"),
    }
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
        pointer = signature[name].startswith("*")
        if name not in constants and (pointer or (name in sizes and case.depth % 16 == 0)):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, options

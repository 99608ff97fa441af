"""The kernels of mae, kl_divergence, l2_sp and reconstruction for compile_triton.py."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from tuned_cases import TARGETS


class PassCase(NamedTuple):
    """A kernel, its flags, the dtype of what it reads and a target."""

    kernel: str
    flags: tuple[tuple[str, int], ...]
    dtype: str
    target: str
    # sizes and strides are 1, which Triton takes for a constant
    ones: bool = False

    @property
    def name(self) -> str:
        on = (f"{flag.lower()}{value if value > 1 else ''}" for flag, value in self.flags if value)
        end = ("ones",) if self.ones else ()
        return "-".join((self.kernel, *on, self.dtype, self.target, *end))


def _flags(*names: str) -> list[tuple[tuple[str, int], ...]]:
    values = itertools.product((False, True), repeat=len(names))
    return [tuple(zip(names, some, strict=True)) for some in values]


def _kinds() -> list[tuple[tuple[str, int], ...]]:
    """Each kind as it is used most, then logits with all that there is, and losses one by one."""
    names = ("KIND", "HAS_WEIGHT", "HAS_MASK", "POSITIVE", "REDUCE", "HAS_GRAD")
    some = [(kind, False, False, False, True, True) for kind in range(6)]
    some += [(5, True, True, True, False, True), (5, True, True, True, True, True)]
    return [tuple(zip(names, values, strict=True)) for values in some]


FLAGS = {
    "loss": _flags("IMAGES", "NORMALIZE"),
    "gradient": _flags("IMAGES", "NORMALIZE"),
    "divergence": _flags("HAS_GRAD"),
    "distance": _flags("HAS_GRAD", "ADD"),
    "reconstruction": _kinds(),
}


def cases() -> list[PassCase]:
    """Everything in bf16 on sm_90, and with all flags in every dtype and on every target."""
    found = []
    for kernel, flags in FLAGS.items():
        found += [PassCase(kernel, some, "bf16", "sm_90") for some in flags[:-1]]
        pairs = itertools.product(("fp32", "bf16", "fp16"), TARGETS)
        found += [PassCase(kernel, flags[-1], *pair) for pair in pairs]
        found += [PassCase(kernel, some, "bf16", "sm_90", True) for some in (flags[0], flags[-1])]
    return found


def source_of(case: PassCase) -> tuple[Any, dict[str, int]]:
    """The kernel with the types its launch gives it: aligned pointers, sizes divisible by 16."""
    from triton.compiler import ASTSource

    from ssl_fast.backends.triton import (
        kl_divergence,
        kl_divergence_kernels,
        l2_sp,
        l2_sp_kernels,
        mae,
        mae_kernels,
        reconstruction,
        reconstruction_kernels,
    )

    modules = {
        "loss": (mae_kernels, mae.MOST_ELEMENTS),
        "gradient": (mae_kernels, mae.MOST_ELEMENTS),
        "divergence": (kl_divergence_kernels, kl_divergence.BLOCK),
        "distance": (l2_sp_kernels, l2_sp.BLOCK),
        "reconstruction": (reconstruction_kernels, reconstruction.BLOCK),
    }
    module, block = modules[case.kernel]
    kernel = getattr(module, f"{case.kernel}_kernel")
    constants: dict[str, Any] = {**dict(case.flags), "BLOCK": block}
    features = ("pred", "target", "gradient", "mu", "logvar", "like", "input", "grad")
    pointers = (
        "weights", "losses", "factor", "sums", "grad_logvar", "step", "weight", "pos_weight",
    )  # fmt: skip
    numbers = ("degrees", "parameter", "target_scale", "target_shift", "grad_factor")
    tables = ("table", "tensors", "blocks")
    if case.ones:
        others = (*features, *pointers, *tables, *numbers, "mask", *constants)
        constants |= dict.fromkeys((x for x in kernel.arg_names if x not in others), 1)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in features:
                signature[name] = f"*{case.dtype}"
            elif name in pointers:
                signature[name] = "*fp32"
            elif name in tables:
                signature[name] = "*i64"
            elif name == "mask":
                signature[name] = "*i8"
            if name not in ("channels", "patch_rows", "patch_columns", "grid_columns", "period"):
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, {}

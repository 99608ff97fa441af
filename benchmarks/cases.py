"""What is measured: a workload at a size, in a dtype, with or without its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.workloads import WORKLOADS, Inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TWO_VIEWS = ("info_nce", "nt_xent")
SMALL = 64


@dataclass(frozen=True)
class Case:
    """One group of rows in the table."""

    workload: str  # a name in WORKLOADS
    rows: int  # of the similarity matrix: queries, or both views of NT-Xent together
    dim: int
    dtype: str = "fp32"
    gradient: bool = True
    device: str = "cpu"
    # False takes the features of InfoNCE as they are, as the target's "cross_entropy of Q K^T /
    # tau" does. CLIP, SigLIP and a queue always get features of unit length.
    normalize: bool = True
    queue: int = 0  # rows of the memory bank

    @property
    def label(self) -> str:
        """The group's name."""
        shape = "x".join(str(size) for size in (self.rows, self.queue, self.dim) if size)
        return f"{self.workload} {shape} {self.dtype} {self.mode}"

    @property
    def mode(self) -> str:
        return "forward+backward" if self.gradient else "forward"

    @property
    def op(self) -> str:
        return WORKLOADS[self.workload].op

    @property
    def temperature(self) -> float:
        return WORKLOADS[self.workload].temperature

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def columns(self) -> int:
        """Keys of each query; a queue's positive, which is outside it, isn't counted."""
        return self.queue or self.rows

    @property
    def telling(self) -> bool:
        """Whether this is the workload's size that says most, with its gradient."""
        return self.gradient and self.columns == WORKLOADS[self.workload].telling

    @property
    def flops(self) -> float:
        products = WORKLOADS[self.workload].products[self.gradient]
        return 2.0 * self.rows * self.columns * self.dim * products

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one dense similarity matrix."""
        return self.rows * self.columns * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that the pass returns."""
        if not self.gradient:
            return 0
        count = WORKLOADS[self.workload].gradients
        return count * self.rows * self.dim * self.torch_dtype.itemsize

    def small(self) -> Case:
        """The same at a size that takes no time and next to no memory."""
        return replace(self, rows=min(self.rows, SMALL), queue=min(self.queue, SMALL))


def inputs(case: Case) -> Inputs:
    """The case's arguments, made anew and the same every time."""
    return WORKLOADS[case.workload].inputs(case)


def default_cases(device: str) -> list[Case]:
    """The default run, most telling cases first: it ends before the others if time runs out."""
    cases = [Case(work, 8192, 128, dtype, device=device) for dtype in DTYPES for work in TWO_VIEWS]
    cases += _contrastive_cases(device, "fp32", 8192, 65536)
    cases += [Case("info_nce", 65536, 128, device=device)]
    cases += [Case(work, 256, 128, device=device) for work in TWO_VIEWS]
    cases += _contrastive_cases(device, "bf16", 8192, 65536)
    cases += [Case("info_nce", 8192, 128, dtype, False, device) for dtype in DTYPES]
    cases += [Case("nt_xent", 8192, 128, "fp32", False, device)]
    cases += _contrastive_cases(device, "fp32", 2048, 4096)
    for rows in (1024, 4096, 2048):
        cases += [Case(work, rows, 128, device=device) for work in TWO_VIEWS]
    cases += [Case("info_nce", 4096, dim, device=device) for dim in (512, 64, 768)]
    cases += [Case("info_nce", 4096, 512, "bf16", device=device)]
    cases += [Case("info_nce", 1024, 128, "bf16", device=device)]
    cases += [Case("info_nce", 16384, 128, device=device)]
    return cases


def _contrastive_cases(device: str, dtype: str, rows: int, queue: int) -> list[Case]:
    """What came after InfoNCE and NT-Xent, at the sizes it is used at."""
    return [
        Case("clip", rows, 512, dtype, device=device),
        Case("siglip", rows, 512, dtype, device=device),
        Case("sup_con", rows, 128, dtype, device=device),
        Case("info_nce_queue", 256, 128, dtype, device=device, queue=queue),
    ]


def full_cases(device: str) -> list[Case]:
    """Everything: every size, dtype and pass, the default cases first."""
    shapes = [
        {"workload": work, "rows": rows, "dim": dim}
        for rows in (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
        for dim in (128, 64, 512, 768)
        for work in WORKLOADS
        if work != "info_nce_queue"
    ]
    shapes += [
        {"workload": "info_nce_queue", "rows": rows, "dim": dim, "queue": queue}
        for queue in (4096, 16384, 65536)
        for rows in (256, 1024)
        for dim in (128, 256)
    ]
    every = [
        Case(**shape, dtype=dtype, gradient=gradient, device=device)
        for shape in shapes
        for dtype in DTYPES
        for gradient in (True, False)
    ]
    first = default_cases(device)
    return first + [case for case in every if case not in first]


def smoke_cases(device: str) -> list[Case]:
    """Tiny sizes that take seconds: the benchmarks' own test."""
    return [
        Case("info_nce", 96, 16, device=device),
        Case("info_nce", 96, 16, "bf16", False, device),
        Case("nt_xent", 64, 16, device=device),
        Case("clip", 48, 16, device=device),
        Case("siglip", 48, 16, device=device),
        Case("sup_con", 48, 16, device=device),
        Case("info_nce_queue", 24, 16, device=device, queue=80),
    ]

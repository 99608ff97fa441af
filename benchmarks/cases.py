"""What is measured: a workload at a size, in a dtype, with or without its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURES = {"info_nce": 0.1, "nt_xent": 0.5}

# Matrix products that a pass needs, in units of rows x rows x dim: the logits, and one for the
# gradient of each side. NT-Xent's matrix is symmetric, and a sweep of half of its tiles makes the
# loss from half a product and loss and gradient from two. Every side of a group is credited with
# the same work, whatever it really did.
PRODUCTS = {
    ("info_nce", False): 1.0,
    ("info_nce", True): 3.0,
    ("nt_xent", False): 0.5,
    ("nt_xent", True): 2.0,
}


@dataclass(frozen=True)
class Case:
    """One group of rows in the table."""

    workload: str  # "info_nce" (in-batch) or "nt_xent"
    rows: int  # of the similarity matrix: queries of InfoNCE, both views together of NT-Xent
    dim: int
    dtype: str = "fp32"
    gradient: bool = True
    device: str = "cpu"
    # False takes the features as they are, as the target's "cross_entropy of Q K^T / tau" does.
    normalize: bool = True

    @property
    def label(self) -> str:
        """The group's name."""
        return f"{self.workload} {self.rows}x{self.dim} {self.dtype} {self.mode}"

    @property
    def mode(self) -> str:
        return "forward+backward" if self.gradient else "forward"

    @property
    def temperature(self) -> float:
        return TEMPERATURES[self.workload]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        return 2.0 * self.rows**2 * self.dim * PRODUCTS[self.workload, self.gradient]

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one dense similarity matrix."""
        return self.rows**2 * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that the pass returns."""
        if not self.gradient:
            return 0
        views = 2 if self.workload == "info_nce" else 1
        return views * self.rows * self.dim * self.torch_dtype.itemsize


def features(case: Case) -> tuple[Tensor, Tensor]:
    """Two correlated views, [rows, dim] each (NT-Xent: [rows / 2, dim] each).

    All values are representable in bf16, so that one reference serves every dtype.
    """
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.dim)
    count = case.rows if case.workload == "info_nce" else case.rows // 2
    first = torch.randn(count, case.dim, generator=generator)
    second = first + torch.randn(count, case.dim, generator=generator)
    if not case.normalize:
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)

    def finish(view: Tensor) -> Tensor:
        return view.to(torch.bfloat16).to(case.device, case.torch_dtype)

    return finish(first), finish(second)


def default_cases(device: str) -> list[Case]:
    """The default run, most telling cases first: it ends before the others if time runs out."""
    cases = [Case(work, 8192, 128, device=device) for work in TEMPERATURES]
    cases += [Case(work, 8192, 128, "bf16", device=device) for work in TEMPERATURES]
    cases += [Case("info_nce", 8192, 128, dtype, False, device) for dtype in DTYPES]
    cases += [Case("nt_xent", 8192, 128, "fp32", False, device)]
    cases += [Case("info_nce", 65536, 128, device=device)]
    for rows in (256, 1024, 2048, 4096):
        cases += [Case(work, rows, 128, device=device) for work in TEMPERATURES]
    for dim in (64, 512, 768):
        cases += [Case("info_nce", 4096, dim, dtype, device=device) for dtype in DTYPES]
    cases += [Case("info_nce", 1024, 128, "bf16", device=device)]
    cases += [Case("info_nce", 16384, 128, device=device)]
    return cases


def full_cases(device: str) -> list[Case]:
    """Everything: every size, dtype and pass, the default cases first."""
    every = [
        Case(workload, rows, dim, dtype, gradient, device)
        for rows in (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
        for dim in (128, 64, 512, 768)
        for workload in TEMPERATURES
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
    ]

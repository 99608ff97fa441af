"""Backends of this machine, features with known norms, memory that isn't zero by luck."""

from __future__ import annotations

import os

import pytest
import torch

from ssl_fast.backends import dispatch

SIZES = (8, 8, 8)


def _cpu_backends():
    """reference, and native once per instruction set that this machine runs."""
    names = ["reference"]
    if dispatch.package("native").refuses("pair_softmax", "cpu", torch.float32, SIZES) is None:
        from ssl_fast import _native

        names += [f"native-{isa}" for isa in _native.available_isas()]
    return names


def thread_counts(backend):
    """Over which results keep their bits: torch's own products may change them with the count."""
    return (2, 2) if backend == "reference" else (1, 2, 3, 5, 1)


@pytest.fixture(params=_cpu_backends())
def backend(request):
    """The name of a CPU backend; the native one runs on the instruction set of the parameter."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    from ssl_fast import _native

    before = _native.active_isa()
    _native.set_isa(isa)
    yield name
    _native.set_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _exact_workspaces():
    """Under AddressSanitizer no thread keeps a workspace, which would hide an overrun."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        from ssl_fast.backends.native import arrays

        arrays._KEPT = 0


@pytest.fixture
def poisoned_memory():
    """Every torch.empty comes filled with NaN: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def features():
    """``features(n, d, dtype)``: rows in random directions with norms from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32, requires_grad=False):
        directions = torch.randn(shape, generator=generator, dtype=torch.float64)
        norms = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) + 0.5
        rows = torch.nn.functional.normalize(directions, dim=-1) * norms
        return rows.to(dtype).requires_grad_(requires_grad)

    return make


@pytest.fixture(autouse=True)
def _same_numbers_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

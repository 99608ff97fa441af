"""The CUDA kernels in an emulator on the CPU, and what nvcc makes of them where it is found.

The tests of each op run once more, as they stand, with the op's CUDA kernel in place of its C++
one: bindings, host code and kernels are csrc's, compiled with the headers of tests/cuda_emulator.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_centroid_update
import test_l2_sp
import test_reconstruction
import torch

from ssl_fast.backends import native
from ssl_fast.backends.native import arrays, centroid_update, l2_sp, reconstruction

CSRC = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DSSL_FAST_HAVE_CUDA=1"]
# What the emulator can't show: errors that only CPU kernels look for, sizes that take it minutes.
LEFT_OUT = {
    "test_a_label_beyond_the_clusters",
    "test_gradients_larger_than_the_cache",
    "test_gradients_that_go_past_the_caches",
    "test_sums_keep_fp32s_digits",
    "test_transforms_compile_and_opcheck",
}


def _compile(source, folder):
    pybind11 = pytest.importorskip("pybind11")
    includes = [EMULATOR, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    built = folder / f"{source.name}.o"
    # the bindings are slow to compile and quick to run
    level = "-O1" if source.suffix == ".cu" else "-O0"
    command = ["c++", "-x", "c++", *FLAGS, level, *(f"-I{x}" for x in includes)]
    subprocess.run([*command, "-c", str(source), "-o", str(built)], check=True)
    return built


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The module of the CUDA kernels for the emulator."""
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    folder = tmp_path_factory.mktemp("emulated_cuda")
    bindings = (f"bindings_{part}.cpp" for part in ("clustering", "mae", "reconstruction"))
    sources = [
        EMULATOR / "module.cpp",
        *KERNELS,
        *(CSRC / name for name in bindings),
        *(CSRC / "core" / name for name in ("memory.cpp", "team.cpp")),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder), sources))
    path = folder / "emulated_cuda.so"
    subprocess.run(["c++", "-shared", *map(str, objects), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(emulated, monkeypatch):
    """The native backend, whose device is the emulator: its memory is the CPU's, its stream 0."""
    for module in (centroid_update, l2_sp, reconstruction):
        monkeypatch.setattr(module, "_native", emulated)
        monkeypatch.setattr(module, "on_cpu", lambda _: False)
        monkeypatch.setattr(
            module, "run", lambda prepared, device: arrays.run_on_device(prepared, device, 0)
        )
    return "native"


for _suite in (test_centroid_update, test_l2_sp, test_reconstruction):
    for _name, _test in inspect.getmembers(_suite, inspect.isfunction):
        taken = _name.startswith("test_") and _name not in LEFT_OUT
        if taken and "backend" in inspect.signature(_test).parameters:
            globals()[f"{_name}_of_{_suite.__name__.removeprefix('test_')}"] = _test


def test_sums_of_many_blocks_keep_fp32s_digits(backend):
    """Of 100000 equal losses an fp32 sum in one row would be off by 1e-3."""
    x = torch.full((100_000,), 0.1)
    found = test_reconstruction.value_and_grad(x, x - 0.3, "mse", "sum", backend=backend)[0]
    exact = (0.3**2) * 100_000
    assert abs(found.item() - exact) < 2e-7 * exact


@pytest.mark.parametrize("rows", [5000, 20000])
def test_parts_that_share_clusters(backend, features, rows):
    """Clusters of no row, of one, within a part of the order, and across thousands of rows."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, 40, (2, rows), generator=generator)
    labels[:, : rows // 2] = 7
    labels[1, -300:] = 55
    labels[0, 17] = 50
    arguments = [features(2, rows, 12), labels, None, None, 60]
    test_centroid_update.assert_right(centroid_update.centroid_update(*arguments), arguments)


def test_the_emulator_finds_a_missing_barrier(tmp_path):
    """A kernel whose threads read what others have not written yet, forwards or backwards."""
    source = """
        #include "cuda_runtime.h"
        void shift(const int* from, int* to) {
            __shared__ int held[64];
            held[threadIdx.x] = from[threadIdx.x];
            BARRIER
            to[threadIdx.x] = held[63 - threadIdx.x];
        }
        int main() {
            int from[64], to[64], wrong = 0;
            for (int round = 0; round < 2; ++round) {
                for (int i = 0; i < 64; ++i) from[i] = 64 * round + i;
                cudaLaunchConfig_t config;
                config.blockDim = dim3(64);
                cudaLaunchKernelEx(&config, &shift, from, to);
                for (int i = 0; i < 64; ++i) wrong += to[i] != from[63 - i];
            }
            return wrong > 0;
        }
    """
    for barrier, wrong in (("", 1), ("__syncthreads();", 0)):
        path = tmp_path / "shift.cpp"
        path.write_text(source.replace("BARRIER", barrier))
        program = str(tmp_path / "shift")
        command = ["c++", "-std=c++17", f"-I{EMULATOR}", str(path), "-o", program]
        subprocess.run(command, check=True)
        assert subprocess.run([program], check=False).returncode == wrong


# Of a multiprocessor's 65536: four blocks of 256 threads run at 64, two at 128, where a thread of
# centroid_update waits for four rows of 16 bytes.
MOST_REGISTERS = {"centroid_update": 128, "device": 64, "l2_sp": 64, "reconstruction": 64}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_compiles_clean(kernel, architecture, tmp_path):
    """Registers and no spills from the assembler; accesses of 16 bytes where data streams."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", f"-I{CSRC}", "-cubin", "--keep"]
    found = subprocess.run(
        [*command, f"--keep-dir={tmp_path}", "-Xptxas=-v", "-o", str(tmp_path / "o.cubin"), kernel],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    said = found.stdout + found.stderr
    assert found.returncode == 0, said
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= MOST_REGISTERS[kernel.stem]
    assert sum(map(int, re.findall(r"(\d+) bytes spill", said))) == 0
    assert sum(map(int, re.findall(r"(\d+) bytes stack frame", said))) == 0
    if kernel.stem != "device":
        (ptx,) = tmp_path.glob("*.ptx")
        assembly = ptx.read_text()
        assert re.search(r"ld\.global\S*\.v4\.[bfu]32", assembly)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("suite", ["reconstruction", "l2_sp", "centroid_update"])
def test_on_the_card(suite, dtype):
    if reason := native.refuses(suite, "cuda", dtype, (1,)):
        pytest.skip(reason)
    x, t = (torch.rand(3, 5001, device="cuda").to(dtype) for _ in range(2))
    if suite == "reconstruction":
        for kind in test_reconstruction.KINDS:
            found = test_reconstruction.value_and_grad(x, t, kind, backend="native")
            exact = test_reconstruction.exact_of(x, t, kind)
            test_reconstruction.assert_agrees(found, exact, dtype)
    elif suite == "l2_sp":
        value = torch.ops.ssl_fast.l2_sp([x, x[:1]], [t, t[:1]], 0.5, backend="native")
        exact = test_l2_sp.exact_of([x, x[:1]], [t, t[:1]], 0.5)[0]
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0.0)
    else:
        labels = torch.randint(-1, 9, (3, 1667), device="cuda")
        rows = x[:, :5001].reshape(3, 1667, 3)
        found = centroid_update.centroid_update(rows, labels, None, None, 9)
        exact = test_centroid_update.plain_update(rows.cpu(), labels.cpu(), None, None, 9)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.cpu(), b)

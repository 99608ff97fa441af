"""Compiles Triton kernels ahead of time, for GPUs that this machine needn't have.

`python compile_triton.py compile_triton_kernels` prints a JSON object a line: names of that
module's cases with what the assembler said of them. A module has cases(), each with a name and a
target, and source_of(case), the kernel with its types and its launch options.
compiled_reports.py runs it, without TRITON_INTERPRET and with a fresh cache: a kernel that was
compiled before would have no log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma", "cp.async")
# A compilation takes one core and up to half a gigabyte.
MOST_WORKERS = 2


def report_of(module: str, case: Any) -> dict[str, Any]:
    """What the assembler says of a case's kernel on its target, sm_xx or gfxxxx."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = importlib.import_module(module).source_of(case)
    target = case.target
    cuda = target.startswith("sm_")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64),
            options={**options, "enable_fp_fusion": True},
        )
    if cuda:
        log, assembly = said.getvalue(), compiled.asm["ptx"]
        registers = re.search(r"Used (\d+) registers", log)
        spilled = re.findall(r"(\d+) bytes spill", log)
    else:
        log, assembly = "", compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
        # bytes a thread has in memory; scalars that move to lanes of a vector register stay on chip
        spilled = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return {
        "shared": compiled.metadata.shared,
        "registers": int(registers[1]),  # type: ignore[index]
        "spilled": sum(map(int, spilled)),
        # C75xx: the assembler's remarks that it serialised wgmma
        "remarks": sorted(set(re.findall(r"C75\d\d", log))),
        "instructions": [x for x in INSTRUCTIONS if x in assembly],
    }


def main(module: str) -> None:
    """Reports on every case, in order; those that come to the same kernel are compiled once."""
    family = importlib.import_module(module)
    same: dict[tuple[str, ...], list[Any]] = {}
    for case in family.cases():
        source, options = family.source_of(case)
        key = (source.hash(), case.target, repr(sorted(options.items())))
        same.setdefault(key, []).append(case)
    with ProcessPoolExecutor(min(MOST_WORKERS, len(os.sched_getaffinity(0)))) as pool:
        first = [alike[0] for alike in same.values()]
        reports = pool.map(functools.partial(report_of, module), first)
        for alike, report in zip(same.values(), reports, strict=True):
            print(json.dumps({case.name: report for case in alike}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

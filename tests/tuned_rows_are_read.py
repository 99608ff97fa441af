"""Whether each of the table's rows is read by the call that measures it.

`python tuned_rows_are_read.py sm_90 bfloat16` prints the keys of those that aren't, in Triton's
interpreter, which has no architecture: the lookup is told this one. test_tune.py runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ssl_fast.backends.triton import choice, device, tuning

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.tune import calls, rows


def call_of(key):
    sizes = calls.Sizes(tiny=True)
    if key in tuning.TABLE:
        return calls.call_of(key, "cpu", "triton", sizes)
    kind, dtype, depth, _ = key
    return calls.call_for(calls.OF_KIND[kind], getattr(torch, dtype), depth, "cpu", "triton", sizes)


def unread(architecture, dtype):
    device._properties = lambda _: (architecture, 2)
    found = []
    for key, row in (tuning.TABLE | choice.TABLE).items():
        if key[1] != dtype or key[3] != architecture:
            continue
        with rows.in_place(key, row) as table:
            call_of(key)()
        found += [] if key in table.read else [key]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(unread(*sys.argv[1:]))

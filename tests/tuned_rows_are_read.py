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


def unread(architecture, dtype):
    device._properties = lambda _: (architecture, 2)
    found = []
    for table, call_of in ((tuning.TABLE, calls.call_of), (choice.TABLE, calls.call_of_kind)):
        for key in [key for key in table if key[1] == dtype and key[3] == architecture]:
            call = call_of(key, "cpu", "triton", calls.Sizes(tiny=True))
            with rows.in_place(key, table[key]) as watched:
                call()
            found += [] if key in watched.read else [key]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(unread(*sys.argv[1:]))

"""plus_plus on the CPU: from tensors to the pointers of csrc/cpu/plus_plus.cpp.

The function and its arguments are the reference's (backends/reference/plus_plus.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import batch_address, batch_of, check, hold_batch, run

__all__ = ["plus_plus"]


def plus_plus(
    x: Tensor,  # [B, N, D]
    x_scale: Tensor | None,  # [B, N]
    weight: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    drawn: Tensor,  # [B, T]
    limits: Tensor,  # [B, T]
    wanted: Tensor,  # [B]
    closest: Tensor,  # [B, N], overwritten
    each: int,
    room: int,
) -> Tensor:
    """The choices among the drawn rows, from one sweep over all rows."""
    (b, n, d), t = x.shape, drawn.shape[1]
    check("x", x, (b, n, d), x.dtype)
    check("drawn", drawn, (b, t), torch.int64)
    check("closest", closest, (b, n), torch.float32)
    ends = n if lengths is None else lengths.unsqueeze(1).clamp_max(n)
    if drawn.numel() > 0 and not bool(((drawn >= 0) & (drawn < ends)).all()):
        raise ValueError(f"drawn must be places of rows, from 0 to N = {n} or the problem's length")
    problems = torch.arange(b)[:, None]
    # Contiguous copies must outlive the call: they are held by these names.
    x, candidates = batch_of(x), x[problems, drawn]
    held = hold_batch(
        {
            "x_scale": (x_scale, (b, n), torch.float32),
            "weight": (weight, (b, n), torch.float32),
            "lengths": (lengths, (b,), torch.int64),
            "drawn": (drawn, (b, t), torch.int64),
            "limits": (limits, (b, t), torch.float64),
            "wanted": (wanted, (b,), torch.int64),
        }
    )
    if x_scale is not None:
        held["candidate_scale"] = x_scale.gather(1, drawn)
    near = closest.contiguous()
    chosen = torch.empty((b, t // each), dtype=torch.int64)
    written = {"closest": near, "chosen": chosen}
    run(
        _native.plus_plus(
            DTYPES[x.dtype],
            b,
            n,
            t,
            d,
            each,
            room,
            batch_address(x),
            batch_address(candidates),
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in (*held.items(), *written.items())},
        )
    )
    if near is not closest:
        closest.copy_(near)
    return chosen

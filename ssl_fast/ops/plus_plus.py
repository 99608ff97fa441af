"""plus_plus: greedy choices of k-means++ among rows that were drawn, for a batch of problems.

The arguments of the operator ``torch.ops.ssl_fast.plus_plus`` are those of the backends' function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.registration import implementation, register

__all__ = ["ROOM", "plus_plus"]

# Pairs of a row and a closer candidate, 8 bytes each.
ROOM = 1 << 20


def _check(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor | None,
    lengths: Tensor | None,
    drawn: Tensor,
    limits: Tensor,
    wanted: Tensor,
    closest: Tensor,
    each: int,
    room: int,
) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [B, N, D]; got {x.dtype} {tuple(x.shape)}")
    wide, (batch, rows) = accumulation_dtype(x), x.shape[:2]
    if drawn.dim() != 2 or not 1 <= each <= drawn.shape[1]:
        raise ValueError(
            f"each must be between 1 and T of drawn [B, T]; got {each} and {tuple(drawn.shape)}"
        )
    if room < 0:
        raise ValueError(f"room must be at least 0; got {room}")
    check_tensor("x_scale", x_scale, (batch, rows), wide, x)
    check_tensor("weight", weight, (batch, rows), wide, x)
    check_tensor("lengths", lengths, (batch,), torch.int64, x)
    check_tensor("drawn", drawn, (batch, drawn.shape[1]), torch.int64, x)
    check_tensor("limits", limits, tuple(drawn.shape), torch.float64, x)
    check_tensor("wanted", wanted, (batch,), torch.int64, x)
    check_tensor("closest", closest, (batch, rows), wide, x)


def _fake(*arguments: Any, **_: str) -> Tensor:
    drawn: Tensor = arguments[4]
    return drawn.new_empty(drawn.shape[0], drawn.shape[1] // arguments[8])


_plus_plus = register(
    "plus_plus(Tensor x, Tensor? x_scale, Tensor? weight, Tensor? lengths, Tensor drawn, "
    "Tensor limits, Tensor wanted, Tensor(a!) closest, int each, int room, *, "
    'str backend="") -> Tensor',
    implementation("plus_plus", 8, "plus_plus", _check),
    _fake,
)


def plus_plus(
    x: Tensor,  # [B, N, D]
    drawn: Tensor,  # [B, T]
    limits: Tensor,  # [B, T]
    closest: Tensor,  # [B, N]
    each: int,
    *,
    wanted: Tensor,  # [B]
    x_scale: Tensor | None = None,  # [B, N]
    weight: Tensor | None = None,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    room: int = ROOM,
    backend: str | None = None,
) -> Tensor:
    """``drawn[torch.minimum(torch.cdist(x[drawn], x).square(), closest).sum(1).argmin()]``, often.

    Gives the rows chosen, [B, T // each] int64, -1 after a problem's last. Each choice is the line
    above for the first ``each`` drawn rows that stand in no earlier choice and whose ``closest`` is
    not below their limit; then ``closest`` becomes the minimum with the distances from it. So a row
    drawn by an older distance, with a limit uniform below that, is compared with the probability
    that its present distance has. No more than ``wanted`` of a problem; where more than ``room``
    pairs of a row and a closer candidate would have to be kept, one choice is made.

    closest (overwritten), x_scale and weight are fp32, or float64 beside a float64 x; drawn, wanted
    and lengths int64, limits float64. ValueError for arguments that don't fit each other.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007).
    """
    with torch.no_grad():
        chosen: Tensor = _plus_plus(
            x, x_scale, weight, lengths, drawn, limits, wanted, closest, each, room,
            backend=backend or "",
        )  # fmt: skip
    return chosen

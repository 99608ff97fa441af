"""plus_plus in plain torch: greedy choices among rows that were drawn by their distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast.backends.reference.nearest import scaled, tiles
from ssl_fast.backends.reference.pairs import accumulation_dtype

__all__ = ["plus_plus"]

# Distances between all candidates and all rows are kept up to here, since a product of 64 rows has
# 4 times the speed of one of 8; of more, those of one choice's candidates alone.
_STORE_BYTES = 28 << 20


def _distances(
    x: Tensor,  # [B, N, D]
    x_scale: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    drawn: Tensor,  # [B, T]
) -> Tensor:
    """Squared, of the drawn rows from all rows, [B, T, N]; infinite from padding."""
    batch, rows, depth = x.shape
    problems = torch.arange(batch, device=x.device)[:, None]
    chosen_scale = None if x_scale is None else x_scale.gather(1, drawn)
    candidates = scaled(x[problems, drawn], chosen_scale)
    origin = candidates.mean(1, keepdim=True)
    candidates = candidates - origin
    found = x.new_empty(*drawn.shape, rows, dtype=candidates.dtype)
    for these, part in tiles(batch, rows, max(drawn.shape[1], depth)):
        u = scaled(x[these, part], None if x_scale is None else x_scale[these, part])
        u = u - origin[these]
        squared = -2.0 * (candidates[these] @ u.mT)
        squared += candidates[these].square().sum(2).unsqueeze(2)
        squared += u.square().sum(2).unsqueeze(1)
        found[these, :, part] = squared.clamp_min_(0.0)
    if lengths is not None:
        padding = torch.arange(rows, device=x.device) >= lengths[:, None]
        found.masked_fill_(padding.unsqueeze(1), torch.inf)
    return found


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
    """The rows chosen, [B, T / each], -1 after the last of a problem.

    Each choice compares the first ``each`` drawn rows that none has compared yet and whose closest
    distance is not below their limit, takes the one that leaves the least sum of weight * closest,
    and lowers ``closest`` to the distances from it. A problem's choices end after ``wanted``, or
    where fewer rows than that are left. ``room`` bounds what a backend keeps; it changes no choice,
    only their number.
    """
    del room
    wide = accumulation_dtype(x)
    batch, count = drawn.shape
    chosen = drawn.new_full((batch, count // each), -1)
    all_at_once = batch * count * x.shape[1] * wide.itemsize <= _STORE_BYTES
    stored = _distances(x, x_scale, lengths, drawn) if all_at_once else None
    free = torch.ones_like(drawn, dtype=torch.bool)
    for made in range(count // each):
        accepted = free & (limits <= closest.gather(1, drawn))
        goes_on = (accepted.sum(1) >= each) & (made < wanted)
        if not bool(goes_on.any()):
            break
        tried = (~accepted).to(torch.uint8).argsort(dim=1, stable=True)[:, :each]
        free.scatter_(1, tried, value=False)
        rows = drawn.gather(1, tried)
        if stored is None:
            distances = _distances(x, x_scale, lengths, rows)
        else:
            distances = stored.gather(1, tried.unsqueeze(2).expand(-1, -1, x.shape[1]))
        capped = torch.minimum(distances, closest.unsqueeze(1))
        mass = capped if weight is None else capped * weight.unsqueeze(1)
        best = mass.sum(2, dtype=torch.float64).argmin(1, keepdim=True)
        nearer = capped.gather(1, best.unsqueeze(2).expand(-1, -1, x.shape[1])).squeeze(1)
        nearer.scatter_(1, rows.gather(1, best), 0.0)
        closest.copy_(torch.where(goes_on[:, None], nearer.to(closest.dtype), closest))
        chosen[:, made] = torch.where(goes_on, rows.gather(1, best)[:, 0], -1)
    return chosen

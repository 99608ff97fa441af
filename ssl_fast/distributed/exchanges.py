"""From the arguments group, mode and sizes to the exchange that a loss goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssl_fast.distributed.all_gather import AllGather
from ssl_fast.distributed.processes import Processes
from ssl_fast.distributed.ring import Ring
from ssl_fast.losses.contrastive import check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["exchange_over"]

MODES = {"ring": Ring, "all_gather": AllGather}


def exchange_over(
    group: Any,
    mode: Any,
    sizes: Sequence[int] | None,
    batch: Any,  # [N, ...], this rank's share
    *,
    views: int = 1,
    others: Any = None,  # [M, ...], this rank's share of keys that aren't part of the batch
) -> Any:
    """The exchange for keys with ``views`` rows for each of the batch, or for ``others``."""
    check_choice("mode", mode, tuple(MODES))
    processes = Processes(group)
    if not isinstance(batch, Tensor) or batch.dim() == 0:
        return MODES[mode](group, [])  # the loss tells what is wrong with it
    key_sizes = processes.sizes(sizes, batch.shape[0], views=views)
    if isinstance(others, Tensor) and others.dim() > 0:
        rows = others.shape[0]
        equal = sizes is None
        key_sizes = (
            [rows] * processes.world_size if equal else processes.gather_sizes(rows, batch.device)
        )
    return MODES[mode](group, key_sizes)

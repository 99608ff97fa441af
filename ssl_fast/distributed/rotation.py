"""One rotation of a ring: every rank's rows visit all ranks; what is made of them comes home."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_fast.distributed.processes import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ssl_fast.distributed.processes import Processes

__all__ = ["rotate"]


class _Passing:
    """A message under way to the next rank while another comes from the previous one."""

    def __init__(
        self,
        processes: Processes,
        step: int,
        outgoing: Tensor,
        layout: Layout,
        rows: int,
    ) -> None:
        self.processes = processes
        self.layout, self.rows = layout, rows
        world_size = processes.world_size
        self.outgoing = outgoing
        self.incoming = torch.empty(layout.size(rows), dtype=torch.uint8, device=outgoing.device)
        following = (processes.rank + 1) % world_size
        previous = (processes.rank - 1) % world_size
        shapes = ", ".join(
            f"{str(field[1])[6:]} {[rows, *field[0]]}" for field in layout.fields if field
        )
        where = f"step {step + 1} of {world_size} of the ring"
        self.sent = f"{processes.name(following)} to take its share, {where}"
        self.received = f"{processes.name(previous)} to send {shapes}, {where}"
        with processes.waiting(f"{self.received} (or {self.sent})"):
            self.works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, outgoing, group=processes.group, group_peer=following),
                    dist.P2POp(
                        dist.irecv, self.incoming, group=processes.group, group_peer=previous
                    ),
                ]
            )

    def arrive(self) -> list[Tensor | None]:
        """Wait, and give what has come."""
        # NCCL gives one handle for both directions.
        for work, what in zip(reversed(self.works), (self.received, self.sent), strict=False):
            with self.processes.waiting(what):
                work.wait()
        return self.layout.unpack(self.incoming, self.rows)


def rotate(
    processes: Processes,
    sizes: Sequence[int],
    kind: str,
    travelling: Sequence[Tensor | None],
    visit: Callable[[bool, list[Any]], Sequence[Tensor]],
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
    *,
    gradient: bool = False,
) -> list[Any]:
    """Send ``travelling`` around the ring, ``visit`` it at every rank, give what ``visit`` made.

    ``visit(own, tensors)`` gets every rank's tensors once, this rank's first, and gives tensors
    with a row for each of theirs, which follow them, merged with what other ranks made, and come
    home.
    The next tensors are under way while visit computes. A rank holds two shares at a time.
    """
    rank, world_size = processes.rank, processes.world_size
    present = next(x for x in travelling if x is not None)
    layout = Layout.of(travelling)
    checked = world_size > 1 and present.device.type == "cpu"
    if checked:
        processes.greet(kind, gradient, layout, sizes)
    tensors: list[Any] = list(travelling)
    buffer = layout.pack(tensors, present.device) if world_size > 1 else None
    following: _Passing | None = None
    for step in range(world_size):
        arriving = None
        next_rows = sizes[(rank - step - 1) % world_size]
        if buffer is not None and step + 1 < world_size:
            arriving = _Passing(processes, step, buffer, layout, next_rows)
        made = list(visit(step == 0, tensors))
        if following is not None:
            before: list[Any] = following.arrive()
            made = [merge(x, y) for x, y in zip(before, made, strict=True)]
        if world_size == 1:
            return made
        if made:
            parts = Layout.of(made)
            packed = parts.pack(made, present.device)
            following = _Passing(processes, step, packed, parts, next_rows)
        if arriving is not None:
            tensors = arriving.arrive()
            buffer = arriving.incoming
    return [] if following is None else following.arrive()

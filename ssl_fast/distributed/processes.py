"""The processes of a group: their shares of the batch, messages between them, what goes wrong."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Layout", "Processes", "first_derivatives_only"]

ALIGNMENT = 64  # bytes, at which a field of a message starts: any dtype may be viewed there
GREETING = 10  # int64: the call, the step's kind, and what the share is made of


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Layout(NamedTuple):
    """The fields of a message, which are tensors with a row for every row of a share."""

    fields: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # (shape of a row, dtype)

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Layout:
        """The layout of these tensors; an absent one stays absent."""
        return cls(tuple(None if x is None else (tuple(x.shape[1:]), x.dtype) for x in tensors))

    def _sizes(self, rows: int) -> list[int]:
        return [
            0 if field is None else rows * torch.Size(field[0]).numel() * field[1].itemsize
            for field in self.fields
        ]

    def size(self, rows: int) -> int:
        """Bytes of a message of so many rows; never 0, which not every transport can send."""
        return max(ALIGNMENT, sum(_aligned(size) for size in self._sizes(rows)))

    def pack(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """One buffer that holds the tensors, uint8 [size]."""
        rows = next((x.shape[0] for x in tensors if x is not None), 0)
        buffer = torch.empty(self.size(rows), dtype=torch.uint8, device=device)
        for part, tensor in zip(self.unpack(buffer, rows), tensors, strict=True):
            if part is not None and tensor is not None:
                part.copy_(tensor)
        return buffer

    def unpack(self, buffer: Tensor, rows: int) -> list[Tensor | None]:
        """The tensors in a buffer, as views."""
        parts: list[Tensor | None] = []
        start = 0
        for field, size in zip(self.fields, self._sizes(rows), strict=True):
            if field is None:
                parts.append(None)
                continue
            shape, dtype = field
            parts.append(buffer[start : start + size].view(dtype).view(rows, *shape))
            start += _aligned(size)
        return parts


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def _describe(numbers: Sequence[int]) -> str:
    """Part of a greeting in words."""
    kind, rows, *fields = numbers
    words = []
    for code in fields:
        if code >= 0:
            dtype, components = DTYPES[code % len(DTYPES)], code // len(DTYPES)
            words.append(f"{str(dtype)[6:]} [{rows}, {components}]")
    name = ("the gradient of " if kind % 2 else "") + KINDS[kind // 2]
    return f"{name} with {', '.join(words) or 'nothing'}"


KINDS = ("pair_softmax", "pair_sigmoid", "class_sums")


class Processes:
    """A process group as the losses see it."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ssl_fast.distributed needs torch.distributed.init_process_group to be called "
                "first; with one process, call the function of the same name in ssl_fast"
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            # new_group gives a process that is no member an object of its own.
            raise ValueError(
                f"group must be a process group that this process (rank {dist.get_rank()}) is a "
                f"member of, or None; got {group!r}"
            )
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(
                f"group must hold this process, rank {dist.get_rank()}; it holds "
                f"{dist.get_process_group_ranks(self.group)}"
            )
        self.world_size = dist.get_world_size(self.group)

    def name(self, rank: int) -> str:
        """A rank of the group, as an error message calls it."""
        everywhere = dist.get_global_rank(self.group, rank)
        return f"rank {rank}" + (f" (global rank {everywhere})" if everywhere != rank else "")

    @contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        """Turn what a broken or late peer causes into an error that tells what was waited for."""
        try:
            yield
        except RuntimeError as error:  # torch's own DistBackendError is one
            raise RuntimeError(
                f"ssl_fast.distributed, rank {self.rank} of {self.world_size}: waited in vain "
                f"for {for_what}: {error}"
            ) from error

    def sizes(self, sizes: Any, rows: int, *, views: int = 1) -> list[int]:
        """The rows of every rank, from the argument ``sizes``; None stands for equal shares."""
        if sizes is None:
            return [rows * views] * self.world_size
        given = list(sizes) if isinstance(sizes, (list, tuple, torch.Size)) else None
        if given is None or not all(type(size) is int and size >= 0 for size in given):
            raise TypeError(
                f"sizes must be None or a list of {self.world_size} row counts; got {sizes!r}"
            )
        if len(given) != self.world_size:
            raise ValueError(
                f"sizes must have one row count per rank, {self.world_size}; got {sizes!r}"
            )
        if given[self.rank] != rows:
            raise ValueError(
                f"sizes must say {rows} rows for this process, rank {self.rank} of the group, "
                f"as its features do; got {sizes!r}"
            )
        return [size * views for size in given]

    def gather_sizes(self, rows: int, device: torch.device) -> list[int]:
        """The row counts of all ranks, exchanged."""
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=device)
        counts[self.rank] = rows
        with self.waiting("the row counts of all ranks"):
            dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def greet(self, kind: str, gradient: bool, layout: Layout, sizes: Sequence[int]) -> None:
        """Raise where a rank is gone, in another call, or has not the shapes expected of it.

        gloo ends the whole process when a message is longer than its receiver expected, hence a
        first message of fixed length between all pairs. Tensors on a GPU are not announced: NCCL
        would have to be waited for, and a mismatch there ends with the group's timeout.
        """
        which = 2 * KINDS.index(kind) + gradient
        codes = [
            -1 if f is None else DTYPES.index(f[1]) + len(DTYPES) * torch.Size(f[0]).numel()
            for f in layout.fields
        ]

        def greeting(rank: int) -> list[int]:
            numbers = [which, sizes[rank], *codes]
            return numbers + [-1] * (GREETING - len(numbers))

        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        mine = torch.tensor(greeting(self.rank))
        theirs = {rank: torch.empty_like(mine) for rank in peers}
        pending: dict[int, tuple[Any, Any]] = {}
        for rank in peers:
            with self.waiting(f"{self.name(rank)}, to open {_describe(greeting(rank))}"):
                pending[rank] = (
                    dist.isend(mine, group=self.group, group_dst=rank),
                    dist.irecv(theirs[rank], group=self.group, group_src=rank),
                )
        for rank in peers:
            with self.waiting(f"{self.name(rank)}, to open {_describe(greeting(rank))}"):
                pending[rank][1].wait()
        for rank in peers:
            with self.waiting(f"{self.name(rank)}, to take a greeting"):
                pending[rank][0].wait()
        for rank in peers:
            came = theirs[rank].tolist()
            if came != greeting(rank):
                raise RuntimeError(
                    f"ssl_fast.distributed, rank {self.rank} of {self.world_size}: "
                    f"{self.name(rank)} must bring {_describe(greeting(rank))}; it brings "
                    f"{_describe(came)} (uneven batches need sizes=)"
                )

    def total(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes; the gradient comes times ``world_size``."""
        return _Total.apply(self, value)  # type: ignore[no-any-return, no-untyped-call]

    def everywhere(self, value: Tensor) -> Tensor:
        """The sum over the processes, of which each makes another use: gradients are summed too."""
        return _Everywhere.apply(self, value)  # type: ignore[no-any-return, no-untyped-call]

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        result = value.clone(memory_format=torch.contiguous_format)
        if result.numel():
            with self.waiting(f"all ranks to send {list(value.shape)} for a sum"):
                dist.all_reduce(result, group=self.group)
        return result


class _Total(Function):
    """A sum over processes whose gradient DistributedDataParallel's average makes whole."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, value: Tensor) -> Tensor:
        ctx.world_size = processes.world_size
        return processes.summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad * ctx.world_size


class _Everywhere(Function):
    """A sum over processes that each of them uses in its own way."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, value: Tensor) -> Tensor:
        ctx.processes = processes
        return processes.summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        first_derivatives_only()
        return None, ctx.processes.summed(grad)


def first_derivatives_only() -> None:
    """Raise in a backward that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses of ssl_fast.distributed have first derivatives only: call backward "
            "without create_graph=True, or the function of the same name in ssl_fast"
        )

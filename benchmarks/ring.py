"""A loss over several gloo processes on this machine, which take a step when told to."""

from __future__ import annotations

import contextlib
import datetime as dt
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import Case, inputs
from benchmarks.sides import Outcome

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TIMEOUT = dt.timedelta(seconds=120)


class RingError(Exception):
    """The processes could not be started, or one of them failed."""


class Ring:
    """Processes that each hold a share of a case's rows, started on entering."""

    def __init__(self, case: Case, backend: str | None, processes: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._workers = []
        context = multiprocessing.get_context("spawn")
        store = Path(self._folder.name) / "store"
        for rank in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work,
                args=(theirs, case, backend, rank, processes, threads, store),
                daemon=True,
            )
            worker.start()
            theirs.close()  # so that a dead worker is seen
            self._connections.append(ours)
            self._workers.append(worker)

    def __enter__(self) -> Self:
        try:
            self._receive()
        except RingError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        """One pass in every process, over when the last has its gradients."""
        self._send("step")
        self._receive()

    def outcome(self) -> Outcome:
        """Of a pass: the loss, and the gradients put together as a data-parallel average would."""
        self._send("outcome")
        parts = self._receive()
        losses = [torch.from_numpy(loss) for loss, _ in parts]
        if any(loss != losses[0] for loss in losses):
            raise RingError(f"the processes' losses differ: {losses}")
        gradients = []
        for shares in zip(*(gradients for _, gradients in parts), strict=True):
            tensors = [torch.from_numpy(share) for share in shares]
            whole = torch.cat(tensors) if tensors[0].dim() else torch.stack(tensors).sum()
            # Each process's gradient comes times their number, which the average takes out again.
            gradients.append(whole / len(parts))
        return Outcome(losses[0], tuple(gradients))

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for worker in self._workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._folder.cleanup()

    def _send(self, command: str) -> None:
        try:
            for connection in self._connections:
                connection.send(command)
        except OSError as error:
            raise RingError(f"a process is gone: {error}") from error

    def _receive(self) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            try:
                answer = connection.recv()
            except (EOFError, OSError) as error:
                raise RingError(f"process {rank} is gone") from error
            if isinstance(answer, str):
                raise RingError(f"process {rank}: {answer}")
            answers.append(answer)
        return answers


def difference(one: Outcome, other: Outcome) -> float:
    """The worst relative difference of two passes' losses and gradients."""
    pairs = zip((one.loss, *one.gradients), (other.loss, *other.gradients), strict=True)
    wanted = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return torch.stack([(a - b).norm() / a.norm() for a, b in wanted]).max().item()


def _work(
    connection: Connection,
    case: Case,
    backend: str | None,
    rank: int,
    processes: int,
    threads: int,
    store: Path,
) -> None:
    """A process's life: make ready, then do as told until the connection closes."""
    if sys.platform == "linux":
        # gloo would look for the machine's name, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=TIMEOUT
        )
        one_pass = _pass(case, backend, rank, processes)
        one_pass()
        connection.send(())
        while True:
            command = connection.recv()
            outcome = one_pass()
            arrays = outcome.loss.detach().numpy(), [x.numpy() for x in outcome.gradients]
            connection.send(arrays if command == "outcome" else ())
    except (EOFError, BrokenPipeError):
        pass  # the parent has what it wanted
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody may be there to be told
            connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _pass(case: Case, backend: str | None, rank: int, processes: int) -> Any:
    """A call that runs one pass on this process's share."""
    from ssl_fast import distributed

    learned = [_share(tensor, rank, processes) for tensor in inputs(case).learned]
    for tensor in learned:
        tensor.requires_grad_()

    def loss() -> Tensor:
        if case.workload == "clip":
            return distributed.clip_loss(*learned, mode="ring", backend=backend)
        return distributed.info_nce(
            *learned, temperature=case.temperature, normalize=case.normalize, mode="ring",
            backend=backend,
        )  # fmt: skip

    def one_pass() -> Outcome:
        value = loss()
        return Outcome(value, torch.autograd.grad(value, learned))

    return one_pass


def _share(tensor: Tensor, rank: int, processes: int) -> Tensor:
    """This process's rows; a number is everyone's."""
    return tensor.tensor_split(processes)[rank].clone() if tensor.dim() else tensor

"""Runs a function in several gloo processes on this machine and passes on what goes wrong."""

from __future__ import annotations

import datetime as dt
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank, function, world_size, port, timeout, errors, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=timeout),
    )
    try:
        function(rank, world_size, *arguments)
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    dist.destroy_process_group()
    # Past the end of the interpreter: gloo's threads may still run there, and abort the process.
    os._exit(0)


def run(function, world_size, *arguments, timeout=60):
    """``function(rank, world_size, *arguments)`` in each of ``world_size`` processes."""
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    given = function, world_size, free_port(), timeout, errors, arguments
    workers = [
        context.Process(target=_enter, args=(rank, *given), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(4 * timeout)
    late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for rank in late:
        workers[rank].kill()
    found = []
    while not errors.empty():
        found.append(errors.get())
    codes = [worker.exitcode for worker in workers]
    assert not late, f"ranks {late} hang\n" + "\n".join(found)
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(found)

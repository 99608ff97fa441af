"""What ssl_fast.distributed does about peers gone, late or different, and bad arguments."""

from __future__ import annotations

import os
import re
import time

import processes
import pytest
import torch
import torch.distributed as dist
from test_distributed import MODES

import ssl_fast.distributed

TIMEOUT = 4  # seconds, of the process group


def features(rows=4, components=3, dtype=torch.float32):
    return torch.randn(rows, components, dtype=dtype, requires_grad=True)


def fails(function, *patterns, within=3 * TIMEOUT):
    """``function()`` raises a RuntimeError of ours, in time, with all of these in its message."""
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        function()
    assert time.monotonic() - start < within
    for pattern in ("ssl_fast.distributed", *patterns):
        assert re.search(pattern, str(caught.value)), f"{pattern!r} not in {caught.value}"


def _gone(rank, world_size, mode, when):

    loss = None
    if rank != 1 or when == "backward":
        query, key = features(), features()

        def call():
            return ssl_fast.distributed.info_nce(query, key, mode=mode)

        if when == "forward":
            fails(call, r"rank 1\b")
            return
        loss = call()
    if rank == 1:
        if when == "backward":
            time.sleep(2)  # until the others have the loss
        os._exit(0)
    fails(loss.backward, r"rank 1\b|all ranks", "gradient|rows" if mode == "ring" else "rows|rank")


@pytest.mark.parametrize(
    ("mode", "when"), [("ring", "forward"), ("ring", "backward"), ("all_gather", "backward")]
)
def test_a_rank_that_has_gone(mode, when):
    processes.run(_gone, 2, mode, when, timeout=TIMEOUT)


def _late(rank, world_size):
    if rank == 1:
        time.sleep(2 * TIMEOUT)
        return

    def call():
        return ssl_fast.distributed.clip_loss(features(), features(), 1.0)

    fails(call, r"rank 1\b", "pair_softmax", r"float32 \[4, 3\]", "Timed out|timeout")


def test_a_late_rank_ends_with_the_timeout_of_the_group():
    processes.run(_late, 2, timeout=TIMEOUT)


def _different(rank, world_size):
    over = ssl_fast.distributed
    odd = rank == 1

    def call(name, mode, first, second, *more, **options):
        return lambda: getattr(over, name)(first, second, *more, mode=mode, **options)

    for mode in MODES:
        for shape in ((7, 3), (2, 3), (4, 9), (4, 1), (0, 3)):
            rows = shape if odd else (4, 3)
            other = "x".join(map(str, (4, 3) if odd else shape))
            found = r"float32 \[{}, {}\]".format(*other.split("x"))
            peer = "rank 0" if odd else "rank 1"
            for name, more in (
                ("info_nce", ()),
                ("clip_loss", (2.0,)),
                ("siglip_loss", (2.0, 0.0)),
            ):
                fails(
                    call(name, mode, features(*rows), features(*rows), *more),
                    f"{peer} must bring",
                    f"it brings {name and 'pair'}.*{found}",
                )
        dtype = torch.float64 if odd else torch.float32
        fails(
            call("nt_xent", mode, features(dtype=dtype), features(dtype=dtype)),
            "must bring .*float", "float64", "float32",
        )  # fmt: skip
        ids = {"query_ids": torch.arange(4)} if odd else {}
        fails(call("info_nce", mode, features(), features(), **ids), "must bring", "int64")
        other = ("siglip_loss", (2.0, 0.0)) if odd else ("clip_loss", (2.0,))
        fails(
            call(other[0], mode, features(), features(), *other[1]),
            "pair_sigmoid", "pair_softmax",
        )  # fmt: skip
    # What failed that way has left nothing behind.
    for mode in MODES:
        over.info_nce(features(), features(), mode=mode).backward()


def test_ranks_that_differ():
    processes.run(_different, 2, timeout=TIMEOUT)


def _arguments(rank, world_size):
    over = ssl_fast.distributed
    x = features()
    elsewhere = dist.new_group([1])
    for wrong, error, message in (
        ({"mode": "star"}, ValueError, "mode must be one of 'ring', 'all_gather'; got 'star'"),
        ({"sizes": [4]}, ValueError, r"sizes must have one row count per rank, 2; got \[4\]"),
        ({"sizes": [3, 3]}, ValueError, rf"sizes must say 4 rows .*rank {rank}.*got \[3, 3\]"),
        ({"sizes": 4}, TypeError, "sizes must be None or a list of 2 row counts; got 4"),
        ({"sizes": [4, -4]}, TypeError, "sizes must be None or a list"),
        ({"sizes": [4.0, 4]}, TypeError, "sizes must be None or a list"),
        ({"group": 3}, ValueError, "group must be a process group .* member of, or None; got 3"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"positive_key": features(3)}, ValueError, "positive_key must have as many rows"),
    ):
        with pytest.raises(error, match=message):
            over.info_nce(**{"query": x, "positive_key": x, **wrong})
    if rank == 0:
        with pytest.raises(ValueError, match="group must be a process group that this process"):
            over.info_nce(x, x, group=elsewhere)
    for mode in MODES:
        for name, more in (("info_nce", ()), ("clip_loss", (2.0,)), ("siglip_loss", (2.0, 0.0))):
            loss = getattr(over, name)(x, features(), *more, mode=mode)
            with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph=True"):
                loss.backward(create_graph=True)


def test_bad_arguments():
    processes.run(_arguments, 2, timeout=TIMEOUT)


def test_without_a_process_group():

    with pytest.raises(RuntimeError, match="init_process_group"):
        ssl_fast.distributed.info_nce(features(), features())

"""For each row of the table a public call that reads it, at a size that says something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from ssl_fast.backends.triton import tuning

if TYPE_CHECKING:
    from ssl_fast.backends.triton.measured import Key

TEMPERATURE = 0.1
# Of rows for any depth: beyond the buckets where the op has such, and a usual depth where not.
DEEP, USUAL = 768, 256
Call = Callable[[], Sequence[Tensor]]


class Sizes:
    """Rows of the calls: as many as fill a card for some milliseconds, or a few for a test."""

    def __init__(self, *, tiny: bool = False, batch: int = 16384) -> None:
        self.batch = 48 if tiny else batch
        self.rows = 64 if tiny else 262144
        self.clusters = 16 if tiny else 1024
        self.hidden = 16 if tiny else 4096


def depth_for(bucket: int, *, has_buckets: bool) -> int:
    """The features' depth by which a row is looked up."""
    return bucket or (DEEP if has_buckets else USUAL)


def _random(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    made = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=made, device=device).to(dtype)


def _with_gradient(loss: Callable[..., Tensor], *learned: Tensor) -> Call:
    leaves = [x.requires_grad_() for x in learned]

    def run() -> Sequence[Tensor]:
        value = loss(*leaves)
        # Of a mean, fp16 gradients would vanish.
        return value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 1e3))

    return run


def _value(loss: Callable[..., Tensor], *inputs: Tensor) -> Call:
    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return (loss(*inputs),)

    return run


def call_for(
    op: str, dtype: torch.dtype, depth: int, device: str, backend: str, sizes: Sizes
) -> Call:
    """A call whose time depends on the op's row; KeyError for an op that has none here."""
    calls = {
        "sweep": (_info_nce, _value),
        "weights": (_info_nce, _with_gradient),
        "weights_by_row": (_info_nce_by_row, _with_gradient),
        "fused": (_nt_xent, _with_gradient),
        "flash": (_info_nce, _with_gradient),
        "sweep_columns": (_clip, _value),
        "weights_moments": (_clip, _with_gradient),
        "weights_mirror": (_nt_xent, _with_gradient),
        "weights_symmetric": (_sup_con, _with_gradient),
        "sigmoid_sweep": (_siglip, _value),
        "sigmoid_weights": (_siglip, _with_gradient),
    }
    ids = None
    name = op.removesuffix("_ids")
    if name in calls:
        loss, run = calls[name]
        first, second = (
            F.normalize(_random(device, dtype, sizes.batch, depth, seed=seed), dim=1)
            for seed in (0, 1)
        )
        if name != op:
            ids = torch.arange(sizes.batch, device=device) // 4
        if op in ("weights_ids", "flash"):
            return _with_gradient(_queue(backend, ids, second), first)
        return run(loss(backend, ids), first, second)
    if op == "linear_reconstruction":
        x, t = (
            _random(device, dtype, sizes.batch, size, seed=i)
            for i, size in enumerate((depth, sizes.hidden))
        )
        w = _random(device, dtype, sizes.hidden, depth, seed=2) / depth**0.5
        return _with_gradient(
            lambda x, w: ssl_fast.linear_reconstruction_loss(x, w, t, backend=backend), x, w
        )
    x = _random(device, dtype, sizes.rows, depth)
    others = _random(device, dtype, sizes.clusters, depth, seed=1)
    searches: dict[str, Call] = {
        "nearest": lambda: ssl_fast.kmeans_assign(x, others, backend=backend),
        "top_k": lambda: ssl_fast.knn(x[: sizes.batch], others, 10, backend=backend),
    }
    return searches[op]


def _info_nce(backend: str, ids: Tensor | None) -> Any:
    return lambda query, key: ssl_fast.info_nce(
        query, key, temperature=TEMPERATURE, normalize=False, query_ids=ids, backend=backend
    )


def _info_nce_by_row(backend: str, _: Tensor | None) -> Any:
    """The gradients of losses that aren't reduced: made behind the forward pass, both at once."""
    return lambda query, key: ssl_fast.info_nce(
        query, key, temperature=TEMPERATURE, normalize=False, reduction="none", backend=backend
    )


def _queue(backend: str, ids: Tensor | None, queue: Tensor) -> Any:
    """The one call whose weights leave moments out and look at ids: its keys get no gradient."""
    return lambda query: ssl_fast.info_nce(
        query, queue, queue, TEMPERATURE, normalize=False, query_ids=ids, key_ids=ids,
        backend=backend,
    )  # fmt: skip


def _clip(backend: str, ids: Tensor | None) -> Any:
    return lambda image, text: ssl_fast.clip_loss(
        image, text, 1 / TEMPERATURE, query_ids=ids, backend=backend
    )


def _nt_xent(backend: str, _: Tensor | None) -> Any:
    return lambda z0, z1: ssl_fast.nt_xent(z0, z1, TEMPERATURE, normalize=False, backend=backend)


def _sup_con(backend: str, ids: Tensor | None) -> Any:
    def loss(first: Tensor, second: Tensor) -> Any:
        labels = torch.arange(len(first), device=first.device) % 100
        return ssl_fast.sup_con(
            first + 0 * second, labels, TEMPERATURE, normalize=False, query_ids=ids, backend=backend
        )

    return loss


def _siglip(backend: str, _: Tensor | None) -> Any:
    return lambda image, text: ssl_fast.siglip_loss(image, text, 10.0, -10.0, backend=backend)


# For each kind of sums that choice.py tells apart, the op of a call whose time depends on it.
OF_KIND = {
    "one_side": "flash",
    "both_sides": "weights_by_row",
    "both_sides_and_softmaxes": "weights_moments",
}


def call_of_kind(key: Key, device: str, backend: str, sizes: Sizes) -> Call:
    """The call for a row of choice.py."""
    kind, dtype, depth, _ = key
    return call_for(OF_KIND[kind], getattr(torch, dtype), depth, device, backend, sizes)


def call_of(key: Key, device: str, backend: str, sizes: Sizes) -> Call:
    """The call for a row's key."""
    op, dtype, bucket, architecture = key
    # With ids, an op's own rows serve the depths for which it has none with them.
    names = op, op.removesuffix("_ids")
    buckets = any(
        row[2]
        for row in tuning.TABLE
        if row[0] in names and (row[1], row[3]) == (dtype, architecture)
    )
    depth = depth_for(bucket, has_buckets=buckets)
    return call_for(op, getattr(torch, dtype), depth, device, backend, sizes)

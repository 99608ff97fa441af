"""Sizes whose pairs or elements pass 2^31, beside the formula in float64 a part at a time.

Features have unit length and bf16 is their dtype: what is looked for is an offset that wrapped
around, which is no small error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from benchmarks.gpu.compare import RELATIVE, generator
from benchmarks.gpu.findings import Finding, Place, Task, attempt

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 2**30
DTYPE = torch.bfloat16
TEMPERATURE, BIAS = 0.1, -5.0
PART = 2**26  # float64 numbers at a time
CLASSES = 1000
# Part of a batch, of the last rows of it and of some others.
SAMPLE = 128


class Pairs(NamedTuple):
    """A loss over all pairs: our call, and the sum of the losses of some rows in plain torch."""

    name: str
    ours: Callable[..., Tensor]
    part: Callable[..., Tensor]  # (rows, first, second)


def random_rows(place: Place, *shape: int, seed: int = 0) -> Tensor:
    """Made on the card: the host would take longer than the check."""
    made = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(shape, generator=made, device=place.device, dtype=DTYPE)


def _unit(place: Place, rows: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(random_rows(place, rows, dim, seed=seed), dim=1)


def size_of(place: Place, full: int, tiny: int) -> int:
    return tiny if place.tiny else full


def off_by(found: Tensor, exact: Tensor) -> float:
    """The relative error in the 2-norm; NaN stays NaN."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


def within(what: str, found: Tensor, exact: Tensor, allowed: float = RELATIVE[DTYPE]) -> float:
    error = off_by(found, exact)
    if not error <= allowed:
        raise AssertionError(f"{what}: off by {error:.1e}, allowed {allowed:.0e}")
    return error


def _info_nce(backend: str, first: Tensor, second: Tensor) -> Tensor:
    return ssl_fast.info_nce(first, second, normalize=False, reduction="sum", backend=backend)


def _part_info_nce(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.cross_entropy(first[rows] @ second.T / TEMPERATURE, rows, reduction="sum")


def _nt_xent(backend: str, first: Tensor, second: Tensor) -> Tensor:
    return ssl_fast.nt_xent(
        first, second, TEMPERATURE, reduction="sum", normalize=False, backend=backend
    )


def _part_nt_xent(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of the rows and their partners."""
    z, count = torch.cat([first, second]), len(first)
    both = torch.cat([rows, rows + count])
    logits = z[both] @ z.T / TEMPERATURE
    logits = logits.scatter(1, both[:, None], -torch.inf)
    return F.cross_entropy(logits, (both + count) % (2 * count), reduction="sum")


def _sup_con(backend: str, first: Tensor, second: Tensor) -> Tensor:
    return ssl_fast.sup_con(
        torch.cat([first, second]), _classes(first), TEMPERATURE, reduction="sum",
        normalize=False, backend=backend,
    )  # fmt: skip


def _classes(first: Tensor) -> Tensor:
    return torch.arange(2 * len(first), device=first.device) % min(CLASSES, len(first))


def _part_sup_con(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    z, labels = torch.cat([first, second]), _classes(first)
    both = torch.cat([rows, rows + len(first)])
    logits = z[both] @ z.T / TEMPERATURE
    lse = logits.scatter(1, both[:, None], -torch.inf).logsumexp(1)
    positive = (labels[both][:, None] == labels).scatter(1, both[:, None], False)
    return (lse - torch.where(positive, logits, 0.0).sum(1) / positive.sum(1)).sum()


def _clip(backend: str, first: Tensor, second: Tensor) -> Tensor:
    return ssl_fast.clip_loss(first, second, 1 / TEMPERATURE, reduction="sum", backend=backend)


def _part_clip(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    one, other = _part_info_nce(rows, first, second), _part_info_nce(rows, second, first)
    return (one + other) / 2


def _siglip(backend: str, first: Tensor, second: Tensor) -> Tensor:
    return ssl_fast.siglip_loss(
        first, second, 1 / TEMPERATURE, BIAS, reduction="sum", backend=backend
    )


def _part_siglip(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    logits = first[rows] @ second.T / TEMPERATURE + BIAS
    return F.softplus(logits).sum() - logits.gather(1, rows[:, None]).sum()


# Rows of each view: the pairs are the square of all rows.
PAIRS = (
    (Pairs("info_nce", _info_nce, _part_info_nce), 65536),
    (Pairs("nt_xent", _nt_xent, _part_nt_xent), 32768),
    (Pairs("sup_con", _sup_con, _part_sup_con), 32768),
    (Pairs("clip_loss", _clip, _part_clip), 65536),
    (Pairs("siglip_loss", _siglip, _part_siglip), 65536),
)


def _check_pairs(pairs: Pairs, rows: int, place: Place) -> str:
    dim = 64
    first, second = (_unit(place, rows, dim, seed) for seed in (0, 1))
    leaves = first.requires_grad_(), second.requires_grad_()
    loss = pairs.ours(place.backend, *leaves)
    gradients = torch.autograd.grad(loss, leaves)
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    exact = torch.zeros((), dtype=torch.float64, device=place.device)
    sums = [torch.zeros_like(x) for x in wide]
    for part in torch.arange(rows, device=place.device).split(max(1, PART // (2 * rows))):
        value = pairs.part(part, *wide)
        for total, gradient in zip(sums, torch.autograd.grad(value, wide), strict=True):
            total.add_(gradient)
        exact += value.detach()
    of_loss = within("loss", loss.detach(), exact, 1e-4)
    worst = max(
        within(f"gradient {i}", g, e)
        for i, (g, e) in enumerate(zip(gradients, sums, strict=True))
    )  # fmt: skip
    return f"loss off by {of_loss:.0e}, gradients by {worst:.0e}"


def _pairs_task(pairs: Pairs, rows: int) -> Task:
    name = f"{pairs.name}, pairs above 2^31"

    def run(place: Place) -> list[Finding]:
        count = size_of(place, rows, 24)
        return [attempt("large", name, lambda: _check_pairs(pairs, count, place))]

    return Task("large", name, run, bytes=8 * GIB)


def _task(name: str, check: Callable[[Place], str], gib: int) -> Task:
    def run(place: Place) -> list[Finding]:
        return [attempt("large", name, lambda: check(place))]

    return Task("large", name, run, bytes=gib * GIB)


def sample(rows: int, device: str) -> Tensor:
    """Some of the rows, the last ones among them."""
    some = torch.randint(rows, (SAMPLE,), generator=generator(rows))
    last = torch.arange(max(0, rows - SAMPLE), rows)
    return torch.cat([some, last]).unique().to(device)


def _keys(place: Place) -> str:
    """A queue whose elements pass 2^31, and the gradient of the few queries."""
    rows, dim, count = 64, 512, size_of(place, 4_300_000, 300)
    query, key = (_unit(place, rows, dim, seed) for seed in (0, 1))
    queue = _unit(place, count, dim, 2)
    leaf = query.requires_grad_()
    loss = ssl_fast.info_nce(
        leaf, key, queue, TEMPERATURE, "sum", normalize=False, backend=place.backend
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    wide, own = leaf.detach().double(), key.double()
    positive = (wide * own).sum(1) / TEMPERATURE
    parts = queue.split(PART // dim)
    lse = positive
    for part in parts:
        lse = torch.logaddexp(lse, (wide @ part.double().T / TEMPERATURE).logsumexp(1))
    expected = (positive - lse).exp()[:, None] * own
    for part in parts:
        keys = part.double()
        expected += (wide @ keys.T / TEMPERATURE - lse[:, None]).exp() @ keys
    of_loss = within("loss", loss.detach(), (lse - positive).sum(), 1e-4)
    of_gradient = within("gradient", gradient, (expected - own) / TEMPERATURE)
    return f"loss off by {of_loss:.0e}, gradient by {of_gradient:.0e}"


def _queries(place: Place) -> str:
    """Queries whose elements pass 2^31, beside a few negatives."""
    rows, dim, count = size_of(place, 4_300_000, 300), 512, 64
    leaf = _unit(place, rows, dim, 0).requires_grad_()
    key, negatives = _unit(place, rows, dim, 1), _unit(place, count, dim, 2)
    loss = ssl_fast.info_nce(
        leaf, key, negatives, TEMPERATURE, "sum", normalize=False, backend=place.backend
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = torch.zeros((), dtype=torch.float64, device=place.device)
    wide = negatives.double()
    for q, k in zip(leaf.detach().split(PART // dim), key.split(PART // dim), strict=True):
        logits = torch.cat([(q.double() * k.double()).sum(1, keepdim=True), q.double() @ wide.T], 1)
        exact += F.cross_entropy(
            logits / TEMPERATURE, torch.zeros(len(q), dtype=torch.long, device=place.device),
            reduction="sum",
        )  # fmt: skip
    rows_seen = sample(rows, place.device)
    q, k = leaf.detach()[rows_seen].double(), key[rows_seen].double()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ wide.T], 1) / TEMPERATURE
    weights = logits.softmax(1)
    expected = (weights[:, 1:] @ wide + (weights[:, :1] - 1) * k) / TEMPERATURE
    of_loss = within("loss", loss.detach(), exact, 1e-4)
    of_gradient = within("gradient", gradient[rows_seen], expected)
    return f"loss off by {of_loss:.0e}, gradient by {of_gradient:.0e}"


def _linear(place: Place) -> str:
    """A layer whose output passes 2^31 elements."""
    rows, hidden, out = size_of(place, 65536, 40), 32, size_of(place, 33000, 50)
    x, w = random_rows(place, rows, hidden), random_rows(place, out, hidden, seed=1) / hidden**0.5
    t = random_rows(place, rows, out, seed=2)
    leaves = x.requires_grad_(), w.requires_grad_()
    loss = ssl_fast.linear_reconstruction_loss(*leaves, t, reduction="sum", backend=place.backend)
    gradients = torch.autograd.grad(loss, leaves)
    wide, weight = x.detach().double(), w.detach().double()
    exact = torch.zeros((), dtype=torch.float64, device=place.device)
    of_x, of_w = torch.empty_like(wide), torch.zeros_like(weight)
    step = max(1, PART // out)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        difference = wide[part] @ weight.T - t[part].double()
        exact += difference.square().sum()
        of_x[part] = 2 * difference @ weight
        of_w += 2 * difference.T @ wide[part]
    of_loss = within("loss", loss.detach(), exact, 1e-4)
    worst = max(
        within(name, g, e)
        for name, g, e in zip(
            ("gradient of input", "gradient of linear_weight"), gradients, (of_x, of_w), strict=True
        )
    )
    return f"loss off by {of_loss:.0e}, gradients by {worst:.0e}"


def tasks() -> list[Task]:
    from benchmarks.gpu import checks_large_rows

    every: list[Any] = [_pairs_task(*entry) for entry in PAIRS]
    return [
        *every,
        _task("info_nce, elements of the queue above 2^31", _keys, 12),
        _task("info_nce, elements of the queries above 2^31", _queries, 44),
        _task("linear_reconstruction_loss, outputs above 2^31", _linear, 16),
        *(_task(name, check, gib) for name, check, gib in checks_large_rows.CHECKS),
    ]

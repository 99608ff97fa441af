"""Elements above 2^31 where there is no product of all pairs: clusters, pixels, parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from benchmarks.gpu.checks_clusters import distances
from benchmarks.gpu.checks_large import PART, off_by, random_rows, sample, size_of, within

if TYPE_CHECKING:
    from benchmarks.gpu.findings import Place

ABOVE = 2**31 + 4096


def _clusters(place: Place) -> str:
    """Rows around centroids far from each other: every label is known."""
    rows, dim, count = size_of(place, 17_000_000, 200), 128, 16
    centroids = 4 * random_rows(place, count, dim, seed=1)
    labels = torch.arange(rows, device=place.device) * 7 % count
    x = random_rows(place, rows, dim)
    for part, own in zip(x.split(PART // dim), labels.split(PART // dim), strict=True):
        part.add_(centroids[own])
    found, squared = ssl_fast.kmeans_assign(x, centroids, backend=place.backend)
    if not torch.equal(found, labels):
        wrong = int((found != labels).sum())
        raise AssertionError(f"labels: {wrong} of {rows} are not the planted ones")
    means, counts = ssl_fast.kmeans_update(x, labels, count, backend=place.served)
    sums = torch.zeros(count, dim, dtype=torch.float64, device=place.device)
    error = size = 0.0
    pieces = (v.split(PART // dim) for v in (x, labels, squared))
    for part, own, near in zip(*pieces, strict=True):
        wide = part.double()
        sums.index_add_(0, own, wide)
        exact = (wide - centroids[own].double()).square().sum(1)
        error += float((near.double() - exact).square().sum())
        size += float(exact.square().sum())
    if not error <= 1e-10 * size:
        raise AssertionError(f"distances: off by {(error / size) ** 0.5:.1e}, allowed 1e-05")
    exact_counts = torch.bincount(labels, minlength=count).double()
    within("counts", counts, exact_counts, 1e-6)
    of_means = within("centroids", means, sums / exact_counts[:, None])
    return f"all labels, centroids off by {of_means:.0e}"


def _neighbours(place: Place) -> str:
    """Pairs above 2^31; the exact distances of a sample of the queries."""
    rows, others, dim, k = size_of(place, 2048, 20), size_of(place, 1_100_000, 300), 16, 5
    x, y = random_rows(place, rows, dim), random_rows(place, others, dim, seed=1)
    squared, indices = ssl_fast.knn(x, y, k, backend=place.backend)
    seen = sample(rows, place.device)[-48:]
    exact = distances(x[seen][None], y[None])[0]
    best = exact.topk(k, largest=False).values
    chosen = exact.gather(1, indices[seen])
    of_chosen = within("neighbours", chosen, best, 1e-5)
    within("distances", squared[seen], chosen, 1e-5)
    return f"neighbours off by {of_chosen:.0e}"


def _check_parts(what: str, gradient: Tensor, exact, pieces: int, allowed: float = 8e-3) -> float:
    """The gradient against ``exact`` (of a slice of it), a piece at a time; the worst error."""
    flat = gradient.reshape(-1)
    worst = 0.0
    for first in range(0, len(flat), pieces):
        part = slice(first, min(first + pieces, len(flat)))
        error = off_by(flat[part], exact(part))
        if not error <= allowed:
            raise AssertionError(
                f"{what}: off by {error:.1e} from element {first} on, allowed {allowed:.0e}"
            )
        worst = max(worst, error)
    return worst


def _pixels(place: Place) -> str:
    count = size_of(place, ABOVE, 5000)
    x, t = random_rows(place, count), random_rows(place, count, seed=1)
    x.requires_grad_()
    loss = ssl_fast.reconstruction_loss(x, t, reduction="sum", backend=place.backend)
    (gradient,) = torch.autograd.grad(loss, x)
    flat = x.detach()
    exact = sum(
        (a.double() - b.double()).square().sum()
        for a, b in zip(flat.split(PART), t.split(PART), strict=True)
    )
    of_loss = within("loss", loss.detach(), torch.as_tensor(exact), 1e-5)
    worst = _check_parts(
        "gradient", gradient, lambda s: 2 * (flat[s].double() - t[s].double()), PART
    )
    return f"loss off by {of_loss:.0e}, gradient by {worst:.0e}"


def _patches(place: Place) -> str:
    batch, length, size = size_of(place, 14_300, 3), 196, 768
    pred, target = (
        random_rows(place, batch, length, size),
        random_rows(place, batch, length, size, seed=1),
    )
    pred.requires_grad_()
    mask = (torch.arange(batch * length, device=place.device) % 4 != 0).view(batch, length).float()
    loss = ssl_fast.mae_loss(pred, target, mask, backend=place.backend)
    counted = float(mask.sum(dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, pred, torch.full_like(loss, counted * size))
    rows = pred.detach().view(-1, size)
    goals, kept = target.view(-1, size), mask.view(-1, 1).double()

    def difference(part: slice) -> Tensor:
        t = goals[part].double()
        t = (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True) + 1e-6).sqrt()
        return (rows[part].double() - t) * kept[part]

    step = PART // size
    spans = [slice(first, first + step) for first in range(0, len(rows), step)]
    exact = sum(difference(span).square().sum() for span in spans) / (counted * size)
    of_loss = within("loss", loss.detach(), torch.as_tensor(exact), 1e-4)
    found = gradient.view(-1, size)
    worst = max(within("gradient", found[span], 2 * difference(span)) for span in spans)
    return f"loss off by {of_loss:.0e}, gradient by {worst:.0e}"


def _latents(place: Place) -> str:
    """The divergence of latents above 2^31, beside a small reconstruction."""
    batch, size = size_of(place, 1049, 9), size_of(place, 2**21, 64)
    mu, logvar = random_rows(place, batch, size), random_rows(place, batch, size, seed=1)
    recon, target = random_rows(place, batch, 4, seed=2), torch.zeros(batch, 4, device=place.device)
    leaves = mu.requires_grad_(), logvar.requires_grad_()
    terms = ssl_fast.vae_loss(recon, target, *leaves, reduction="sum", backend=place.backend)
    gradients = torch.autograd.grad(terms.loss, leaves)
    m, v = (x.detach().view(-1) for x in leaves)
    exact = sum(
        0.5 * (a.double().square() + b.double().exp() - 1 - b.double()).sum()
        for a, b in zip(m.split(PART), v.split(PART), strict=True)
    )
    of_kl = within("kl", terms.kl.detach(), torch.as_tensor(exact), 1e-5)
    pixels = F.binary_cross_entropy_with_logits(recon.double(), target.double(), reduction="sum")
    within("reconstruction", terms.reconstruction.detach(), pixels, 1e-4)
    worst = max(
        _check_parts("gradient of mu", gradients[0], lambda s: m[s].double(), PART),
        _check_parts(
            "gradient of logvar", gradients[1], lambda s: 0.5 * (v[s].double().exp() - 1), PART
        ),
    )
    return f"kl off by {of_kl:.0e}, gradients by {worst:.0e}"


def _parameters(place: Place) -> str:
    count = size_of(place, ABOVE, 5000)
    parameter, anchor = random_rows(place, count), random_rows(place, count, seed=1)
    parameter.requires_grad_()
    loss = ssl_fast.l2_sp([parameter], [anchor], 0.5, backend=place.backend)
    (gradient,) = torch.autograd.grad(loss, parameter)
    flat = parameter.detach()
    exact = sum(
        0.25 * (a.double() - b.double()).square().sum()
        for a, b in zip(flat.split(PART), anchor.split(PART), strict=True)
    )
    of_loss = within("loss", loss.detach(), torch.as_tensor(exact), 1e-5)
    worst = _check_parts(
        "gradient", gradient, lambda s: 0.5 * (flat[s].double() - anchor[s].double()), PART
    )
    return f"loss off by {of_loss:.0e}, gradient by {worst:.0e}"


# With the memory that each takes, in GiB.
CHECKS = (
    ("kmeans_assign and kmeans_update, elements above 2^31", _clusters, 16),
    ("knn, pairs above 2^31", _neighbours, 8),
    ("reconstruction_loss, elements above 2^31", _pixels, 24),
    ("mae_loss, elements above 2^31", _patches, 28),
    ("vae_loss, latents above 2^31", _latents, 36),
    ("l2_sp, elements above 2^31", _parameters, 24),
)

"""Where the centroids start: greedy k-means++, k-means||, rows at random, an array, a callable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast.cluster.checks import check_choice, check_finite, describe
from ssl_fast.cluster.plus_plus import draw, plus_plus
from ssl_fast.cluster.problem import Problem
from ssl_fast.cluster.rows import flattened, select

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INITS", "accept_init", "seed"]

INITS = ("k-means++", "k-means||", "random")
# Bahmani et al. found 5 rounds of 2 K rows enough.
_ROUNDS = 5


def accept_init(init: Any, lead: tuple[int, ...], shape: tuple[int, int], x: Tensor) -> Any:
    """A name or a callable as it is; an array as centroids [B, K, D] of x's dtype and device."""
    if isinstance(init, str) or callable(init):
        if isinstance(init, str):
            check_choice("init", init, INITS)
        return init
    names = ", ".join(map(repr, INITS))
    made = _as_centroids(init, f"init must be one of {names}, a callable or centroids")
    init = made if isinstance(init, Tensor) else made.to(x.device)
    if init.device != x.device:
        raise ValueError(f"init must be on the device of x, {x.device}; got {init.device}")
    if tuple(init.shape) not in {shape, (*lead, *shape)}:
        raise ValueError(
            f"init must have shape [n_clusters, D], {shape}, with or without the leading "
            f"dimensions of x, {lead}; got {tuple(init.shape)}"
        )
    centroids: Tensor = init.detach().to(x.dtype).expand(*lead, *shape)
    centroids = flattened(centroids)
    check_finite("init", centroids)
    return centroids


def _as_centroids(given: Any, expected: str) -> Tensor:
    """A tensor of real numbers, or TypeError."""
    try:
        made = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        made = None
    if made is None or made.is_complex():
        raise TypeError(f"{expected} of real numbers; got {describe(given)}")
    return made


def _random(problem: Problem, n_clusters: int, generator: torch.Generator | None) -> Tensor:
    """Rows without replacement: the K largest of log(weight) plus Gumbel noise (Efraimidis)."""
    x = problem.x
    if problem.weight is None and problem.lengths is None:
        orders = (
            torch.randperm(x.shape[1], generator=generator, device=x.device)[:n_clusters].clone()
            for _ in range(x.shape[0])
        )
        return select(x, torch.cat([*orders, x.new_empty(0).long()]).view(-1, n_clusters))
    mass = problem.mass()
    noise = torch.rand(mass.shape, generator=generator, dtype=torch.float64, device=mass.device)
    noise.clamp_(min=1e-300).log_().neg_().log_().neg_()
    if problem.weight is not None:
        # Rows without weight come after all others.
        noise += mass.double().log().clamp_(min=-1e6)
    if problem.lengths is not None:
        noise.masked_fill_(problem.padding(), -torch.inf)
    return select(x, noise.topk(n_clusters, dim=1).indices)


def _parallel(problem: Problem, n_clusters: int, generator: torch.Generator | None) -> Tensor:
    """k-means||: rounds that draw 2 K rows each by their distance, then k-means++ among those.

    Bahmani et al., "Scalable k-means++" (arXiv:1203.6402), with a fixed number of rows to a round
    in place of a number that is so on average. Each candidate weighs what is nearest to it.
    """
    x, mass = problem.x, problem.mass()
    chosen = [draw(mass, 1, generator, problem.lengths)]
    owner, closest = problem.nearest(select(x, chosen[0]))
    total = 1
    for _ in range(_ROUNDS):
        new = draw(closest * mass, 2 * n_clusters, generator, problem.lengths)
        labels, distances = problem.nearest(select(x, new))
        closer = distances < closest
        torch.where(closer, distances, closest, out=closest)
        torch.where(closer, labels.add_(total), owner, out=owner)
        del labels, distances  # before the next round makes its own
        chosen.append(new)
        total += new.shape[1]
    indices = torch.cat(chosen, dim=1)
    weights = mass.new_zeros(indices.shape, dtype=torch.float64)
    weights.scatter_add_(1, owner.clamp_min_(0), mass.double())
    candidates = Problem(
        select(x, indices),
        None if problem.x_scale is None else problem.x_scale.gather(1, indices),
        weights.to(mass.dtype), None, problem.backend,
    )  # fmt: skip
    return select(candidates.x, plus_plus(candidates, n_clusters, generator))


def seed(
    problem: Problem,
    n_clusters: int,
    init: str | Tensor | Callable[..., Any],
    generator: torch.Generator | None,
) -> Tensor:
    """The first centroids [B, K, D] of each problem."""
    x = problem.x
    shape = (x.shape[0], n_clusters, x.shape[2])
    if isinstance(init, Tensor):
        return init
    if init == "k-means++":
        return select(x, plus_plus(problem, n_clusters, generator))
    if init == "random":
        return _random(problem, n_clusters, generator)
    if init == "k-means||":
        return _parallel(problem, n_clusters, generator)
    made = init(x, n_clusters, generator=generator)  # type: ignore[operator]
    made = _as_centroids(made, "init must return centroids")
    if tuple(made.shape) not in {shape, shape[1:]}:
        raise ValueError(
            f"init must return centroids of shape {shape}, or {shape[1:]} for all problems; "
            f"got {tuple(made.shape)}"
        )
    made = made.to(device=x.device, dtype=x.dtype).expand(shape).contiguous()
    check_finite("what init returns", made)
    return made

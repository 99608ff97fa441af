"""Is a side's result right?  A row is shown only after this said so.

The loss is compared whole. The gradients of InfoNCE and NT-Xent are compared on a sample of rows,
from the closed formula in chunks, so that the largest batch can be checked too; the others whole,
from ``formulas``. The tests hold both against ssl_fast's reference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulas
from benchmarks.cases import Case, inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.sides import Outcome

SAMPLE = 512
CHUNK_ELEMENTS = 2**25
AUTOGRAD_CHUNKS = 8  # of one such chunk: autograd keeps a few matrices of a part's size
# Above this many rows the reference is taken in fp32: in fp64 it would outlast what it checks.
DOUBLE_ROWS = 8192

# Relative errors that still count as agreement. A dense bf16 implementation rounds its logits to
# 8 bits: the gate is wide enough for it, and the errors seen stand in the JSON.
LOSS_TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
GRADIENT_TOLERANCE = {"fp32": 2e-4, "bf16": 6e-2}


class Expected(NamedTuple):
    """The right answer: the loss, and the gradient of each learned input or of some of its rows."""

    loss: float
    sample: Tensor | None  # [S] rows of every learned input; None: all
    gradients: tuple[Tensor, ...]


class Errors(NamedTuple):
    """Relative errors; ``gradient`` is the worst learned input's and None without one."""

    loss: float
    gradient: float | None


def compare(case: Case, outcome: Outcome, grad_output: float = 1.0) -> Errors:
    """Relative errors of an outcome."""
    wanted = expected(case)
    loss_error = abs(outcome.loss.item() - wanted.loss) / abs(wanted.loss)
    if not case.gradient:
        return Errors(loss_error, None)
    errors = []
    for got, want in zip(outcome.gradients, wanted.gradients, strict=True):
        rows = got if wanted.sample is None else got[wanted.sample.to(got.device)]
        rows = rows.detach().cpu().double() / grad_output
        errors.append((rows - want).norm() / want.norm())
    # torch's maximum keeps a NaN, Python's may lose it.
    return Errors(loss_error, torch.stack(errors).max().item())


def complaint(case: Case, errors: Errors) -> str | None:
    """Why the errors are too large, or None."""
    # Written so that a NaN complains.
    if not errors.loss <= LOSS_TOLERANCE[case.dtype]:
        return f"loss is off by {errors.loss:.1e}"
    if errors.gradient is not None and not errors.gradient <= GRADIENT_TOLERANCE[case.dtype]:
        return f"gradient is off by {errors.gradient:.1e}"
    return None


def expected(case: Case) -> Expected:
    """The reference for a case; the same for every dtype, pass and device."""
    return _expected(replace(case, dtype="fp32", gradient=True, device="cpu"))


@lru_cache(maxsize=2)
def _expected(case: Case) -> Expected:
    dtype = torch.float64 if case.rows <= DOUBLE_ROWS else torch.float32
    learned, fixed = (
        tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)
        for tensors in inputs(case)
    )
    return EXPECTED[case.workload](case, learned, fixed)


def _info_nce(case: Case, learned: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Expected:
    query, key = (_Rows(view, case.normalize) for view in learned)
    sample = _sample(case.rows)
    positives = torch.arange(case.rows)
    pairs = _Pairs(query.unit, key.unit, positives, case.temperature, exclude_self=False)
    of_query, of_key = pairs.of_query(sample), pairs.of_key(sample)
    gradients = query.through(of_query, sample), key.through(of_key, sample)
    return Expected(pairs.loss, sample, tuple(x.double() for x in gradients))


def _nt_xent(case: Case, learned: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Expected:
    count = case.rows // 2
    both = _Rows(torch.cat(learned), case.normalize)
    sample = _sample(count)
    positives = torch.arange(2 * count).roll(count)
    pairs = _Pairs(both.unit, both.unit, positives, case.temperature, exclude_self=True)
    gradients = (
        both.through(pairs.of_query(rows) + pairs.of_key(rows), rows)
        for rows in (sample, sample + count)
    )
    return Expected(pairs.loss, sample, tuple(x.double() for x in gradients))


def _in_parts(
    part: formulas.Part, case: Case, learned: tuple[Tensor, ...], fixed: tuple[Tensor, ...]
) -> Expected:
    elements = CHUNK_ELEMENTS // AUTOGRAD_CHUNKS
    loss, gradients = formulas.in_parts(part, case, learned, fixed, elements)
    return Expected(loss, None, tuple(x.double() for x in gradients))


EXPECTED: dict[str, Callable[..., Expected]] = {
    "info_nce": _info_nce,
    "nt_xent": _nt_xent,
    "clip": partial(_in_parts, formulas.clip),
    "siglip": partial(_in_parts, formulas.siglip),
    "sup_con": partial(_in_parts, formulas.sup_con),
    "info_nce_queue": partial(_in_parts, formulas.queue),
}


def _sample(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE]


class _Rows:
    """Rows [N, D], normalised or not, and the way a gradient takes back through that."""

    def __init__(self, rows: Tensor, normalize: bool) -> None:
        self.norms = rows.norm(dim=1, keepdim=True) if normalize else None  # [N, 1]
        self.unit = F.normalize(rows, dim=1) if normalize else rows

    def through(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """From the gradient [S, D] of ``unit[rows]`` to that of the rows themselves."""
        if self.norms is None:
            return gradient
        unit = self.unit[rows]
        return (gradient - unit * (unit * gradient).sum(1, keepdim=True)) / self.norms[rows]


class _Pairs:
    """Mean cross-entropy of scaled products against one positive key per query."""

    def __init__(
        self,
        query: Tensor,  # [N, D]
        key: Tensor,  # [N, D]
        positives: Tensor,  # [N] index of each query's positive key
        temperature: float,
        *,
        exclude_self: bool,
    ) -> None:
        self.query, self.key, self.positives = query, key, positives
        self.temperature, self.exclude_self = temperature, exclude_self
        self.everyone = torch.arange(query.shape[0])
        size = max(1, CHUNK_ELEMENTS // key.shape[0])
        self.lse = torch.cat(
            [self._logits(rows, self.everyone).logsumexp(1) for rows in self.everyone.split(size)]
        )  # [N]
        positive = (query * key[positives]).sum(1) / temperature
        self.loss = (self.lse - positive).double().mean().item()

    def _logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        logits = self.query[rows] @ self.key[columns].T / self.temperature
        if self.exclude_self:
            logits.masked_fill_(rows[:, None] == columns, float("-inf"))
        return logits

    def _weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        """D (sum of losses) / d logits for some rows and columns."""
        weights = (self._logits(rows, columns) - self.lse[rows, None]).exp_()
        weights -= (self.positives[rows, None] == columns).to(weights.dtype)
        return weights

    def of_query(self, rows: Tensor) -> Tensor:
        """Gradient of the mean loss for ``query[rows]``, [S, D]."""
        weights = self._weights(rows, self.everyone)
        return weights @ self.key / (self.temperature * self.lse.shape[0])

    def of_key(self, columns: Tensor) -> Tensor:
        """Gradient of the mean loss for ``key[columns]``, [S, D]."""
        weights = self._weights(self.everyone, columns)
        return weights.T @ self.query / (self.temperature * self.lse.shape[0])

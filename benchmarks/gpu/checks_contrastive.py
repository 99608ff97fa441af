"""The contrastive losses: the plain formula of each, and options beside the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from benchmarks.cases import Case
from benchmarks.gpu.compare import Inputs, Shape, Subject, generator
from benchmarks.workloads import CLIP_SCALE, SIGLIP_BIAS, SIGLIP_SCALE, WORKLOADS


def _views(shape: Shape, dtype: torch.dtype, device: str, *, unit: bool) -> list[Tensor]:
    """Two correlated views, [rows, dim] each."""
    first = torch.randn(shape, generator=generator(*shape))
    second = first + torch.randn(shape, generator=generator(*shape, 1))
    views = (first, second)
    return [(F.normalize(x, dim=1) if unit else x).to(device, dtype) for x in views]


def _number(value: float, device: str) -> Tensor:
    """A learned number, in fp32 beside features of any dtype."""
    return torch.tensor(value, device=device)


def _pairs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return Inputs((*_views(shape, dtype, device, unit=False), _number(0.2, device)))


def _padded_pairs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Rows inside of longer ones, which begin at an odd element; what lies between is NaN."""
    first, second, temperature = _pairs(shape, dtype, device).learned
    padded = []
    for x in (first, second):
        room = torch.full((shape.rows, shape.dim + 5), torch.nan, dtype=dtype, device=device)
        padded.append(room[:, 1 : shape.dim + 1].copy_(x))
    return Inputs((*padded, temperature))


def _with_queue(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    queue = torch.randn(3 * shape.rows + 5, shape.dim, generator=generator(*shape, 2))
    return Inputs(
        (
            *_views(shape, dtype, device, unit=False),
            queue.to(device, dtype),
            _number(0.2, device),
        )
    )


def _with_scale(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return Inputs((*_views(shape, dtype, device, unit=True), _number(CLIP_SCALE, device)))


def _with_scale_and_bias(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    learned = _number(SIGLIP_SCALE, device), _number(SIGLIP_BIAS, device)
    return Inputs((*_views(shape, dtype, device, unit=True), *learned))


def _labels(shape: Shape, device: str) -> Tensor:
    order = torch.randperm(shape.rows, generator=generator(*shape, 3))
    return (order % max(2, shape.rows // 8)).to(device)


def _labelled(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    embeddings, _ = _views(shape, dtype, device, unit=False)
    return Inputs((embeddings, _number(0.2, device)), (_labels(shape, device),))


def _pairs_with_ids(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Ids that repeat, weights, and rows to leave out."""
    weight = torch.rand(shape.rows, generator=generator(*shape, 4)).to(device)
    ignore = torch.arange(shape.rows, device=device) % 7 == 3
    first, second, temperature = _pairs(shape, dtype, device).learned
    return Inputs((first, second, temperature), (_labels(shape, device), weight, ignore))


def _formula(workload: str) -> Any:
    """The eager side of the benchmarks, with a temperature that learns."""
    of = Case(workload, 1, 1)
    return WORKLOADS[workload].eager(of)


def _plain_info_nce(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    labels = torch.arange(len(query), device=query.device)
    return F.cross_entropy(query @ key.T / temperature, labels)


def _plain_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    query, key, queue = (F.normalize(x, dim=1) for x in (query, key, queue))
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, labels)


def _plain_nt_xent(first: Tensor, second: Tensor, temperature: Tensor) -> Tensor:
    z = F.normalize(torch.cat([first, second]), dim=1)
    rows = torch.arange(len(z), device=z.device)
    itself = rows == rows[:, None]
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, rows.roll(len(first)))


def _plain_sup_con(embeddings: Tensor, temperature: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(embeddings, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    counts = positive.sum(1)
    of_pairs = logits.log_softmax(1).masked_fill(~positive, 0.0).sum(1)
    return -(of_pairs / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def _info_nce(backend: str, query: Tensor, key: Tensor, temperature: Tensor) -> Any:
    return ssl_fast.info_nce(query, key, temperature=temperature, backend=backend)


def _queue(backend: str, query: Tensor, key: Tensor, queue: Tensor, temperature: Tensor) -> Any:
    return ssl_fast.info_nce(query, key, queue, temperature, backend=backend)


def _nt_xent(backend: str, first: Tensor, second: Tensor, temperature: Tensor) -> Any:
    return ssl_fast.nt_xent(first, second, temperature, backend=backend)


def _sup_con(backend: str, embeddings: Tensor, temperature: Tensor, labels: Tensor) -> Any:
    return ssl_fast.sup_con(embeddings, labels, temperature, backend=backend)


def _clip(backend: str, image: Tensor, text: Tensor, scale: Tensor) -> Any:
    return ssl_fast.clip_loss(image, text, scale, backend=backend)


def _siglip(backend: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Any:
    return ssl_fast.siglip_loss(image, text, scale, bias, backend=backend)


def _with_options(loss: str, **options: Any) -> Any:
    """The loss per row with ids, weights and rows left out, and other options."""

    def call(
        backend: str, first: Tensor, second: Tensor, temperature: Tensor,
        ids: Tensor, weight: Tensor, ignore: Tensor,
    ) -> Any:  # fmt: skip
        rules = {"query_ids": ids, "row_weight": weight, "ignore": ignore}
        every = {**rules, **options, "reduction": "none", "backend": backend}
        if loss == "info_nce":
            return ssl_fast.info_nce(first, second, temperature=temperature, **every)
        if loss == "nt_xent":
            return ssl_fast.nt_xent(first, second, temperature, **every)
        return ssl_fast.clip_loss(first, second, 1 / temperature, normalize=True, **every)

    return call


def _stats(backend: str, query: Tensor, key: Tensor, temperature: Tensor) -> Any:
    loss, stats = ssl_fast.info_nce(
        query, key, temperature=temperature, return_stats=True, backend=backend
    )
    return loss, stats.lse, stats.positive_similarity


_SMOOTH = {"label_smoothing": 0.1, "margin": 0.1}
_HARD = {"hard_negative_beta": 0.5, "decoupled": True}
SUBJECTS = (
    Subject("info_nce", _info_nce, _plain_info_nce, _pairs),
    Subject("info_nce of padded rows", _info_nce, _plain_info_nce, _padded_pairs),
    Subject("info_nce with negatives", _queue, _plain_queue, _with_queue),
    Subject("nt_xent", _nt_xent, _plain_nt_xent, _pairs),
    Subject("sup_con", _sup_con, _plain_sup_con, _labelled),
    Subject("clip_loss", _clip, _formula("clip"), _with_scale),
    Subject("siglip_loss", _siglip, _formula("siglip"), _with_scale_and_bias),
    Subject("info_nce stats", _stats, None, _pairs),
    Subject("info_nce options", _with_options("info_nce", **_SMOOTH), None, _pairs_with_ids),
    Subject("info_nce hard", _with_options("info_nce", **_HARD), None, _pairs_with_ids),
    Subject("nt_xent options", _with_options("nt_xent", **_SMOOTH), None, _pairs_with_ids),
    Subject("clip_loss options", _with_options("clip_loss", **_SMOOTH), None, _pairs_with_ids),
)

"""The loss's formula for some rows at a time, from which autograd makes the whole gradient.

In float64 these say what CLIP, SigLIP, SupCon and a queue must give. They share nothing with
``workloads``' eager sides, which are measured and checked like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.cases import Case

# The sum of the losses of some rows, of the case, the rows' indices and the loss's arguments.
Part = Callable[..., Tensor]


def in_parts(
    part: Part,
    case: Case,
    learned: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
    elements: int,
) -> tuple[float, tuple[Tensor, ...]]:
    """The mean loss and the gradients of ``learned``, with ``elements`` logits at a time."""
    leaves = [tensor.detach().requires_grad_() for tensor in learned]
    totals = [torch.zeros_like(tensor) for tensor in learned]
    loss = 0.0
    for rows in torch.arange(case.rows).split(max(1, elements // case.columns)):
        value = part(case, rows, *leaves, *fixed) / case.rows
        gradients = torch.autograd.grad(value, leaves)
        totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
        loss += value.item()
    return loss, tuple(totals)


def clip(case: Case, rows: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Half of the cross-entropies of the rows' images and texts."""
    of_image = scale * (image[rows] @ text.T)
    of_text = scale * (text[rows] @ image.T)
    return sum(F.cross_entropy(logits, rows, reduction="sum") for logits in (of_image, of_text)) / 2


def siglip(
    case: Case, rows: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """softplus(s) over all pairs; softplus(-s) = softplus(s) - s over the positive ones."""
    logits = scale * (image[rows] @ text.T) + bias
    return F.softplus(logits).sum() - logits.gather(1, rows[:, None]).sum()


def sup_con(case: Case, rows: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The log-sum-exp over the others, less the mean logit of those of the same label."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    logits = unit[rows] @ unit.T / case.temperature
    itself = rows[:, None] == torch.arange(case.rows)
    positive = (labels[rows, None] == labels) & ~itself
    lse = logits.masked_fill(itself, float("-inf")).logsumexp(1)
    # Every row of a case has a positive.
    return (lse - torch.where(positive, logits, 0.0).sum(1) / positive.sum(1)).sum()


def queue(case: Case, rows: Tensor, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """The logaddexp of the positive's logit and the log-sum-exp over the queue, less the former."""
    of_positive = (query[rows] * key[rows]).sum(1) / case.temperature
    of_queue = (query[rows] @ queue.T / case.temperature).logsumexp(1)
    return F.softplus(of_queue - of_positive).sum()

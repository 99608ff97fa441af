"""The losses that are measured: their inputs, our call, the eager formula, and how work is counted.

A new loss is one entry of ``WORKLOADS`` and, for the check of its results, one of
``agreement.EXPECTED``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from ssl_fast.demo.plain import plain_nt_xent

if TYPE_CHECKING:
    from benchmarks.cases import Case

# Of the learned tensors and then the fixed ones.
Loss = Callable[..., Tensor]

CLASSES = 100  # of SupCon's labels
CLIP_SCALE = 1 / 0.07  # where open_clip's training starts
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


class Inputs(NamedTuple):
    """A loss's arguments: those that get a gradient, and those that don't."""

    learned: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Workload:
    """One loss."""

    title: str
    op: str  # the primitive below it; its name is that of the results' files
    # Matrix products that the forward pass, and both passes, need, in units of rows x columns x
    # dim. Every side of a group is credited with the same work, whatever it really did.
    products: tuple[float, float]
    gradients: int  # how many of [rows, dim] a pass returns
    inputs: Callable[[Case], Inputs]
    ours: Callable[[Case, str], Loss]  # with a backend's name
    eager: Callable[[Case], Loss]
    temperature: float = 0.1  # unused where a scale is learned
    telling: int = 8192  # columns of the size that gets every side's row


def _views(case: Case, rows: int, *, unit: bool) -> tuple[Tensor, Tensor]:
    """Two correlated views, [rows, dim] each.

    All values are representable in bf16, so that one reference serves every dtype.
    """
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.dim)
    first = torch.randn(rows, case.dim, generator=generator)
    second = first + torch.randn(rows, case.dim, generator=generator)
    if unit:
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    return _finish(case, first), _finish(case, second)


def _finish(case: Case, rows: Tensor) -> Tensor:
    return rows.to(torch.bfloat16).to(case.device, case.torch_dtype)


def _scalar(case: Case, value: float) -> Tensor:
    """A learned number; in fp32 beside features of any dtype, as in a training run."""
    return torch.tensor(value, device=case.device)


def _one_view_each(case: Case) -> Inputs:
    return Inputs(_views(case, case.rows, unit=not case.normalize))


def _half_view_each(case: Case) -> Inputs:
    return Inputs(_views(case, case.rows // 2, unit=not case.normalize))


def _with_scale(case: Case) -> Inputs:
    return Inputs((*_views(case, case.rows, unit=True), _scalar(case, CLIP_SCALE)))


def _with_scale_and_bias(case: Case) -> Inputs:
    image, text = _views(case, case.rows, unit=True)
    return Inputs((image, text, _scalar(case, SIGLIP_SCALE), _scalar(case, SIGLIP_BIAS)))


def _labelled(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.rows)
    order = torch.randperm(case.rows, generator=generator)
    # Never so many classes that a row of a small case is alone in its own.
    labels = order % max(1, min(CLASSES, case.rows // 8))
    centres = torch.randn(CLASSES, case.dim, generator=generator)
    embeddings = centres[labels] + 2 * torch.randn(case.rows, case.dim, generator=generator)
    return Inputs((_finish(case, embeddings),), (labels.to(case.device),))


def _with_queue(case: Case) -> Inputs:
    query, key = _views(case, case.rows, unit=True)
    generator = torch.Generator().manual_seed(case.queue)
    queue = F.normalize(torch.randn(case.queue, case.dim, generator=generator), dim=1)
    # A momentum encoder's keys get no gradient.
    return Inputs((query,), (key, _finish(case, queue)))


def _our_info_nce(case: Case, backend: str) -> Loss:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        return ssl_fast.info_nce(
            query,
            key,
            temperature=case.temperature,
            normalize=case.normalize,
            backend=backend,
        )

    return loss


def _our_nt_xent(case: Case, backend: str) -> Loss:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        return ssl_fast.nt_xent(
            first,
            second,
            temperature=case.temperature,
            normalize=case.normalize,
            backend=backend,
        )

    return loss


def _our_clip(case: Case, backend: str) -> Loss:
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return ssl_fast.clip_loss(image, text, scale, backend=backend)

    return loss


def _our_siglip(case: Case, backend: str) -> Loss:
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return ssl_fast.siglip_loss(image, text, scale, bias, backend=backend)

    return loss


def _our_sup_con(case: Case, backend: str) -> Loss:
    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        return ssl_fast.sup_con(embeddings, labels, case.temperature, backend=backend)

    return loss


def _our_queue(case: Case, backend: str) -> Loss:
    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        return ssl_fast.info_nce(
            query, key, queue, case.temperature, normalize=False, backend=backend
        )

    return loss


def _eager_info_nce(case: Case) -> Loss:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        if case.normalize:
            query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        labels = torch.arange(query.shape[0], device=query.device)
        return F.cross_entropy(query @ key.T / case.temperature, labels)

    return loss


def _eager_nt_xent(case: Case) -> Loss:
    return lambda first, second: plain_nt_xent(first, second, case.temperature)


def _eager_clip(case: Case) -> Loss:
    """What open_clip's ClipLoss does: the logits of each direction are a product of their own."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        of_image = scale * image @ text.T
        of_text = scale * text @ image.T
        own = torch.arange(image.shape[0], device=image.device)
        return (F.cross_entropy(of_image, own) + F.cross_entropy(of_text, own)) / 2

    return loss


def _eager_siglip(case: Case) -> Loss:
    """What open_clip's SigLipLoss does: log-sigmoid of the logits, signed by a dense matrix."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.T
        logits += bias
        count = image.shape[0]
        # In as many steps, in place or not, as there.
        signs = -torch.ones(count, count, device=image.device, dtype=image.dtype)
        signs = 2 * torch.eye(count, device=image.device, dtype=image.dtype) + signs
        return -F.logsigmoid(signs * logits).sum() / count

    return loss


def _eager_sup_con(case: Case) -> Loss:
    """Khosla et al. 2020: the mean log-probability of an anchor's positives."""

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        unit = F.normalize(embeddings, dim=1)
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        logits = (unit @ unit.T / case.temperature).masked_fill(itself, float("-inf"))
        positive = (labels[:, None] == labels) & ~itself
        counts = positive.sum(1)
        log_probability = logits.log_softmax(1).masked_fill(~positive, 0.0)
        of_anchor = log_probability.sum(1) / counts.clamp(min=1)  # 0 without a positive
        return -of_anchor.sum() / (counts > 0).sum()

    return loss


def _eager_queue(case: Case) -> Loss:
    """What MoCo does: the positive's logit is put before those of the queue's rows."""

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], dim=1) / case.temperature
        return F.cross_entropy(logits, logits.new_zeros(len(query), dtype=torch.long))

    return loss


# NT-Xent's and SupCon's matrix is symmetric, and a sweep of half of its tiles makes the loss from
# half a product and loss and gradient from two. CLIP's backward pass makes the logits once more. A
# queue's rows get no gradient.
WORKLOADS = {
    "info_nce": Workload(
        "InfoNCE, in-batch", "pair_softmax", (1.0, 3.0), 2,
        _one_view_each, _our_info_nce, _eager_info_nce,
    ),
    "nt_xent": Workload(
        "NT-Xent", "pair_softmax", (0.5, 2.0), 1,
        _half_view_each, _our_nt_xent, _eager_nt_xent, temperature=0.5,
    ),
    "clip": Workload(
        "CLIP", "pair_softmax", (1.0, 4.0), 2,
        _with_scale, _our_clip, _eager_clip,
    ),
    "sup_con": Workload(
        f"SupCon, {CLASSES} classes", "pair_softmax", (0.5, 2.0), 1,
        _labelled, _our_sup_con, _eager_sup_con,
    ),
    "info_nce_queue": Workload(
        "InfoNCE, queue", "pair_softmax", (1.0, 2.0), 1,
        _with_queue, _our_queue, _eager_queue, telling=65536,
    ),
    "siglip": Workload(
        "SigLIP", "pair_sigmoid", (1.0, 3.0), 2,
        _with_scale_and_bias, _our_siglip, _eager_siglip,
    ),
}  # fmt: skip
OPS = tuple(dict.fromkeys(work.op for work in WORKLOADS.values()))

"""The losses of images and texts, of classes, and with options: dense, a row at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tolerances import assert_near


def row_with_options(
    negatives,  # [K]: the logits of those that stay
    positive,  # []
    scale,
    label_smoothing=0.0,
    margin=0.0,
    decoupled=False,
    hard_negative_beta=0.0,
):
    """The loss of one row."""
    if len(negatives) == 0:
        return 0.0 * positive
    positive = positive - scale * margin
    logits = torch.cat([positive[None], negatives])
    denominator = negatives.exp().sum()
    if hard_negative_beta:
        weights = (hard_negative_beta * negatives).softmax(dim=0)
        denominator = len(negatives) * (weights * negatives.exp()).sum()
    if not decoupled:
        denominator = denominator + positive.exp()
    return denominator.log() - positive + label_smoothing * (positive - logits.mean())


def rows_with_options(logits, away, positive, scale, **options):
    """Of a matrix of logits, where ``away`` marks the pairs that are no negatives."""
    rows = [
        row_with_options(logits[i][~away[i]], positive[i], scale, **options)
        for i in range(len(logits))
    ]
    return torch.stack(rows) if rows else logits.sum(dim=1)


def reduced(losses, keep, reduction, row_weight):
    """Losses [kept] of the rows that ``keep`` marks."""
    weight = None if row_weight is None else row_weight[keep]
    weighted = losses if weight is None else losses * weight
    if reduction == "sum":
        return weighted.sum()
    if reduction == "none":
        return weighted.new_zeros(len(keep)).masked_scatter(keep, weighted)
    return weighted.sum() / (len(losses) if weight is None else weight.sum())


def unit(x, normalize):
    return F.normalize(x, dim=-1) if normalize else x


def kept_rows(ignore, *tensors):
    keep = torch.ones(len(tensors[0]), dtype=torch.bool) if ignore is None else ~ignore
    return keep, *(None if x is None else x[keep] for x in tensors)


def alike(query_ids, key_ids, n, m):
    if query_ids is None:
        return torch.zeros(n, m, dtype=torch.bool)
    return query_ids[:, None] == key_ids


def info_nce(
    query, positive_key, negative_keys=None, temperature=0.1, reduction="mean",
    negative_mode="unpaired", *, normalize=True, query_ids=None, key_ids=None, row_weight=None,
    ignore=None, **numbers,
):  # fmt: skip
    keep, query, positive_key, query_ids = kept_rows(ignore, query, positive_key, query_ids)
    query, key = unit(query, normalize), unit(positive_key, normalize)
    positive = (query * key).sum(dim=1) / temperature
    if negative_keys is None:
        key_ids = query_ids if key_ids is None else key_ids[keep]
        logits = query @ key.T / temperature
        away = alike(query_ids, key_ids, *logits.shape) | torch.eye(len(query), dtype=torch.bool)
    elif negative_mode == "paired":
        negatives = unit(negative_keys[keep], normalize)
        logits = torch.einsum("nd,nmd->nm", query, negatives) / temperature
        away = torch.zeros_like(logits, dtype=torch.bool)
    else:
        logits = query @ unit(negative_keys, normalize).T / temperature
        away = alike(query_ids, key_ids, *logits.shape)
    losses = rows_with_options(logits, away, positive, 1.0 / temperature, **numbers)
    return reduced(losses, keep, reduction, row_weight)


def nt_xent(
    z0, z1, temperature=0.5, reduction="mean", *, normalize=True, query_ids=None, row_weight=None,
    ignore=None, **numbers,
):  # fmt: skip
    keep, z0, z1, query_ids = kept_rows(ignore, z0, z1, query_ids)
    n, z = len(z0), unit(torch.cat([z0, z1]), normalize)
    images = torch.arange(n).repeat(2)
    ids = images if query_ids is None else query_ids.repeat(2)
    logits = z @ z.T / temperature
    away = (images[:, None] == images) | (ids[:, None] == ids)
    positive = logits[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    losses = rows_with_options(logits, away, positive, 1.0 / temperature, **numbers)
    row_weight = None if row_weight is None else row_weight.repeat(2)
    return reduced(losses, keep.repeat(2), reduction, row_weight)


def clip(
    images, texts, logit_scale, reduction="mean", *, normalize=False, query_ids=None, key_ids=None,
    row_weight=None, ignore=None, **numbers,
):  # fmt: skip
    key_ids = query_ids if key_ids is None else key_ids
    keep, images, texts, query_ids, key_ids = kept_rows(ignore, images, texts, query_ids, key_ids)
    logits = logit_scale * unit(images, normalize) @ unit(texts, normalize).T
    away = alike(query_ids, key_ids, *logits.shape) | torch.eye(len(images), dtype=torch.bool)
    losses = [
        rows_with_options(s, gone, s.diagonal(), logit_scale, **numbers)
        for s, gone in ((logits, away), (logits.T, away.T))
    ]
    return reduced((losses[0] + losses[1]) / 2, keep, reduction, row_weight)


def siglip(images, texts, logit_scale, logit_bias, reduction="mean", normalize=False):
    logits = logit_scale * unit(images, normalize) @ unit(texts, normalize).T + logit_bias
    labels = 2 * torch.eye(len(images), dtype=logits.dtype) - 1
    losses = -F.logsigmoid(labels * logits).sum(dim=1)
    return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


def sup_con(
    embeddings, labels, temperature=0.1, reduction="mean", *, ref_emb=None, ref_labels=None,
    normalize=True, query_ids=None, key_ids=None, row_weight=None, ignore=None, label_smoothing=0.0,
    margin=0.0, decoupled=False, hard_negative_beta=0.0,
):  # fmt: skip
    """Of [N, D]; every anchor with its positives, its denominator and all of its keys written."""
    keep, rows, labels, query_ids = kept_rows(ignore, embeddings, labels, query_ids)
    rows = unit(rows, normalize)
    keys = rows if ref_emb is None else unit(ref_emb, normalize)
    key_labels, key_ids = (labels, query_ids) if ref_emb is None else (ref_labels, key_ids)
    losses, anchors = [], []
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        others = torch.arange(len(keys)) != (i if ref_emb is None else -1)
        logits = keys[others] @ row / temperature
        same = key_labels[others] == label
        away = same if query_ids is None else same | (key_ids[others] == query_ids[i])
        positive, negative = logits[same] - margin / temperature, logits[~away]
        anchors.append(bool(same.any()))
        if not same.any() or (decoupled and len(negative) == 0):
            losses.append(0.0 * row.sum())
            continue
        beta = hard_negative_beta
        parts = []
        if len(negative):
            parts.append(((1 + beta) * negative).logsumexp(dim=0))
            if beta:
                parts[0] = parts[0] + math.log(len(negative)) - (beta * negative).logsumexp(dim=0)
        parts += [] if decoupled else [positive.logsumexp(dim=0)]
        loss = torch.stack(parts).logsumexp(dim=0) - positive.mean()
        everything = torch.cat([positive, negative]).mean()
        losses.append(loss + label_smoothing * (positive.mean() - everything))
    losses = torch.stack(losses) if losses else rows.sum(dim=1)
    anchors = torch.tensor(anchors, dtype=torch.bool)
    if reduction == "mean":
        weight = anchors.to(losses.dtype)
        weight = weight if row_weight is None else weight * row_weight[keep]
        return (losses * weight).sum() / (weight.sum() or 1.0)
    return reduced(losses, keep, reduction, row_weight)


def value_and_gradients(function, inputs, weight=None):
    """The loss and its gradients for the inputs that ask for one; zeros where none arrives."""
    loss = function(*inputs)
    asking = [x for x in inputs if x is not None and x.requires_grad]
    total = loss.sum() if weight is None else (loss * weight.to(loss.dtype)).sum()
    return [loss, *torch.autograd.grad(total, asking, allow_unused=True, materialize_grads=True)]


def assert_equals_float64(ours, plain, inputs, dtype, what=""):
    """Value and gradients of ``ours`` at ``dtype`` are those of ``plain`` in float64."""
    wide = [
        x.detach().double().requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point() else x
        for x in inputs
    ]  # fmt: skip
    with torch.no_grad():
        weight = torch.randn(plain(*wide).shape, dtype=torch.float64)
    turned = [
        x.detach().flip(-1).requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point() and x.dim() > 1 else x
        for x in inputs
    ]  # fmt: skip
    out, exact, rounded, other = (
        value_and_gradients(function, given, weight)
        for function, given in ((ours, inputs), (plain, wide), (plain, inputs), (plain, turned))
    )
    assert out[0].dtype is torch.promote_types(dtype, torch.float32)
    asking = [x for x in inputs if x is not None and x.requires_grad]
    for x, given in zip(out[1:], asking, strict=True):
        assert x.dtype is given.dtype, what
    # Where terms cancel, one plain result may hit the exact one by luck: the worse of two counts,
    # the second with the features in another order, which no exact result depends on.
    back = [other[0], *(o.flip(-1) if o.dim() > 1 else o for o in other[1:])]
    for i, (x, e, *plains) in enumerate(zip(out, exact, rounded, back, strict=True)):
        worse = max(plains, key=lambda p, e=e: (p.double() - e).nan_to_num().norm())
        assert_near(x, e, dtype, plain=worse, what=f"{what} result {i}")

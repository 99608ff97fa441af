"""The losses written plainly, as users and other packages write them: what ours must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED_ID = -(2**63)


def info_nce(
    query,
    positive_key,
    negative_keys=None,
    temperature=0.1,
    reduction="mean",
    negative_mode="unpaired",
    normalize=True,
):
    if normalize:
        query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
        negative_keys = None if negative_keys is None else F.normalize(negative_keys, dim=-1)
    if negative_keys is None:
        logits = query @ positive_key.T
        labels = torch.arange(len(query))
    else:
        positive = (query * positive_key).sum(dim=1, keepdim=True)
        if negative_mode == "paired":
            negative = torch.einsum("nd,nmd->nm", query, negative_keys)
        else:
            negative = query @ negative_keys.T
        logits = torch.cat([positive, negative], dim=1)
        labels = torch.zeros(len(query), dtype=torch.long)
    return F.cross_entropy(logits / temperature, labels, reduction=reduction)


def nt_xent(z0, z1, temperature=0.5, reduction="mean", normalize=True):
    z = torch.cat([z0, z1])
    if normalize:
        z = F.normalize(z, dim=-1)
    rows = torch.arange(len(z))
    logits = (z @ z.T / temperature).masked_fill(rows == rows[:, None], -torch.inf)
    return F.cross_entropy(logits, rows.roll(len(z0)), reduction=reduction)


def pair_softmax(query, key, query_scale, key_scale, query_ids, key_ids, diagonals):
    """Row and column log-sum-exps from logits in the features' dtype."""
    logits = (query @ key.T) * (query_scale[:, None] * key_scale).to(query.dtype)
    rows, columns = torch.arange(len(query)), torch.arange(len(key))
    for diagonal in diagonals:
        logits = logits.masked_fill(columns - rows[:, None] == diagonal, -torch.inf)
    if query_ids is not None:
        ignored = (query_ids[:, None] == IGNORED_ID) | (key_ids == IGNORED_ID)
        logits = logits.masked_fill((query_ids[:, None] == key_ids) | ignored, -torch.inf)
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def diagonal_logit(query, key, query_scale, key_scale, diagonal):
    """The logits at j = i + diagonal in the features' dtype, 0 where there is no such key."""
    rows = torch.arange(len(query))
    exists = (rows + diagonal >= 0) & (rows + diagonal < len(key))
    rows = rows[exists]
    columns = rows + diagonal
    scales = (query_scale[rows] * key_scale[columns]).to(query.dtype)
    logits = (query[rows] * key[columns]).sum(dim=1) * scales
    return logits.new_zeros(len(query)).index_put((rows,), logits)


def pair_sigmoid(query, key, query_scale, key_scale, bias, positive_diagonal):
    """The loss of each row from logits in the features' dtype."""
    logits = (query @ key.T) * (query_scale[:, None] * key_scale).to(query.dtype)
    logits = logits + bias.to(query.dtype)
    if positive_diagonal is not None:
        steps = torch.arange(len(key)) - torch.arange(len(query))[:, None]
        logits = torch.where(steps == positive_diagonal, -logits, logits)
    return F.softplus(logits).sum(dim=1)


def gradients(function, inputs, weights):
    """Of sum(weights * outputs): zeros for an input that isn't reached, and in place of NaN."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    total = sum((w * x).sum() for w, x in zip(weights, function(*inputs), strict=False))
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in zeros]

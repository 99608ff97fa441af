"""pair_sigmoid in plain torch: the definition.

Differentiable torch without in-place writes, in chunks of rows, as reference/pair_softmax.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks, on_diagonal

__all__ = ["pair_sigmoid"]


def pair_sigmoid(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    bias: Tensor,  # []
    row_weight: Tensor | None,  # [N]
    positive_diagonal: int | None,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over keys of softplus(s_ij), s_ij = query_scale_i key_scale_j <q_i, k_j> + bias.

    The pair j = i + positive_diagonal counts softplus(-s_ij). Gives loss [N], and the gradients of
    sum(row_weight * loss) (of the plain sum without row_weight): grad_query [N, D] and grad_key
    [M, D] ([0] where not needed), grad_query_scale [N], grad_key_scale [M] and each row's part of
    the bias's, grad_bias [N]; all [0] when neither feature's is needed.
    """
    wide = accumulation_dtype(query)
    queries, keys = query.to(wide), key.to(wide)
    need_any = need_query or need_key
    loss, grad_query = [query_scale[:0]], [queries[:0]]
    grad_query_scale, grad_bias = [query_scale[:0]], [query_scale[:0]]
    grad_key, grad_key_scale = torch.zeros_like(keys), torch.zeros_like(key_scale)
    for start, stop in chunks(query.shape[0], key.shape[0], queries.element_size()):
        rows = queries[start:stop]
        row_scale = query_scale[start:stop, None]
        products = rows @ keys.T  # [n, M]
        logits = products * key_scale * row_scale + bias
        sign = logits.new_ones(())
        if positive_diagonal is not None:
            sign = torch.where(on_diagonal(start, stop, keys, positive_diagonal), -sign, sign)
        logits = sign * logits
        # softplus, exact in relative terms near zero.
        loss.append(-F.logsigmoid(-logits).sum(dim=1))
        if not need_any:
            continue
        weights = sign * torch.sigmoid(logits)
        if row_weight is not None:
            weights = weights * row_weight[start:stop, None]
        grad_bias.append(weights.sum(dim=1))
        by_query = weights * row_scale
        weights = weights * key_scale
        grad_query_scale.append((weights * products).sum(dim=1))
        grad_key_scale = grad_key_scale + (by_query * products).sum(dim=0)
        if need_query:
            grad_query.append((weights @ keys) * row_scale)
        if need_key:
            grad_key = grad_key + by_query.T @ rows
    return (
        torch.cat(loss),
        torch.cat(grad_query).to(query.dtype) if need_query else query.new_empty(0),
        (grad_key * key_scale[:, None]).to(key.dtype) if need_key else key.new_empty(0),
        torch.cat(grad_query_scale),
        grad_key_scale if need_any else key_scale.new_empty(0),
        torch.cat(grad_bias),
    )

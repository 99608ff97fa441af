"""The ops by formulas of their own in float64, and Triton's functions checked against them.

For the interpreted_*.py files: imports the kernels, so TRITON_INTERPRET must be set before.
"""

from __future__ import annotations

import torch
from tolerances import assert_near

from ssl_fast.backends.triton import pair_sigmoid as triton_sigmoid
from ssl_fast.backends.triton import pair_softmax as triton_backend

IGNORED_ID = -(2**63)


def wide(*tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def logits_of(query, key, query_scale, key_scale, query_ids, key_ids, diagonals):
    """The definition, -inf where a pair is left out."""
    logits = query_scale[:, None] * (query @ key.T) * key_scale
    distance = torch.arange(len(key)) - torch.arange(len(query))[:, None]
    out = torch.zeros_like(distance, dtype=torch.bool)
    for diagonal in diagonals:
        out |= distance == diagonal
    if query_ids is not None:
        out |= query_ids[:, None] == key_ids
        out |= (query_ids == IGNORED_ID)[:, None] | (key_ids == IGNORED_ID)
    return logits.masked_fill(out, -torch.inf)


def lse_of(logits, dim):
    """Log-sum-exp whose gradient is 0 where nothing is kept."""
    empty = (logits == -torch.inf).all(dim, keepdim=True)
    lse = torch.where(empty, 0.0, logits).logsumexp(dim)
    return torch.where(empty.squeeze(dim), -torch.inf, lse)


def arguments(features, shape, rule, dtype):
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    scales = [torch.rand(size, generator=generator) * 4 for size in (n, m)]
    for scale in scales:
        scale[1::7] = 0.0
    ids = [torch.randint(-2, 3, (size,), generator=generator) for size in (n, m)]
    for x in ids:
        x[2::9] = IGNORED_ID
    query_ids, key_ids = ids if rule in ("ids", "both") else (None, None)
    diagonals = [0, 2, -3, n + m] if rule in ("diagonals", "both") else []
    query, key = features(n, d, dtype=dtype), features(m, d, dtype=dtype)
    return query, key, *scales, query_ids, key_ids, diagonals


def diagonal_of(query, key, query_scale, key_scale, diagonal):
    """The logits of a diagonal, whatever the rules say of them; 0 where there is no such key."""
    columns = torch.arange(len(query)) + diagonal
    there = (columns >= 0) & (columns < len(key))
    if not there.any():
        return torch.zeros(len(query)).double()
    columns = columns.clamp(0, len(key) - 1)
    logits = query_scale * key_scale[columns] * (query * key[columns]).sum(1)
    return torch.where(there, logits, 0.0)


def check_sweep(given, dtype, columns=True):
    """Statistics and gradients of one set of arguments; gives the results."""
    query, key, query_scale, key_scale, *rules = given
    leaves = wide(query, key, query_scale, key_scale)
    logits = logits_of(*leaves, *rules)
    diagonals = rules[-1]
    exact = [lse_of(logits, 1), logits.amax(1), lse_of(logits, 0)]
    diagonal = diagonal_of(*leaves, diagonals[0]) if diagonals else None
    out = triton_backend.pair_softmax(*given, columns)
    for name, x, e in zip(("row_lse", "row_max", "column_lse"), out, exact):  # noqa: B905
        if name != "column_lse" or columns:
            assert_near(x, e, torch.float32, what=name)
    generator = torch.Generator().manual_seed(1)
    row_grad = torch.randn(len(query), generator=generator)
    column_grad = torch.randn(len(key), generator=generator) if columns else None
    diagonal_grad = torch.randn(len(query), generator=generator) if diagonals else None
    total = (row_grad * exact[0])[exact[0] > -torch.inf].sum()
    if columns:
        total = total + (column_grad * exact[2])[exact[2] > -torch.inf].sum()
    if diagonals:
        assert_near(out[3], diagonal, torch.float32, what="diagonal_logit")
        total = total + (diagonal_grad * diagonal).sum()
    else:
        assert out[3].shape == (0,)
    expected = torch.autograd.grad(total, leaves)
    column_lse = out[2] if columns else None
    gradients = triton_backend.pair_softmax_backward(
        *given, out[0], column_lse, row_grad, column_grad, diagonal_grad, True, True
    )
    names = ("grad_query", "grad_key", "grad_query_scale", "grad_key_scale")
    for name, x, e, like in zip(names, gradients, expected, leaves, strict=True):
        assert x.dtype is (dtype if like.dim() == 2 else torch.float32)
        assert_near(x, e, dtype, what=name)
    return *out, *gradients


def check_expectation(given, dtype):
    """The expected keys, and the statistics beside them."""
    leaves = wide(*given[:4])
    logits = logits_of(*leaves, *given[4:])
    kept = (logits > -torch.inf).any(1)
    probability = torch.where(kept[:, None], logits, 0.0).softmax(1) * kept[:, None]
    out = triton_backend.pair_softmax_expectation(*given)
    assert_near(out[0], lse_of(logits, 1), torch.float32, what="row_lse")
    assert_near(out[1], logits.amax(1), torch.float32, what="row_max")
    assert torch.equal(out[2], triton_backend.pair_softmax(*given, False)[3])
    assert out[3].dtype is torch.float32
    assert_near(out[3], probability @ (leaves[3][:, None] * leaves[1]), dtype, what="expectation")
    return out


def check_symmetric(features, scale, row_scale, ids, pairs, dtype):
    """Statistics, gradient and moment of a set of rows against itself."""
    x, s, r = wide(features, scale, row_scale)
    diagonals = [0, pairs, -pairs] if pairs else [0]
    logits = logits_of(x, x, s * r, r, ids, ids, diagonals)
    exact = lse_of(logits, 1)
    out = triton_backend.pair_softmax_symmetric(features, scale, row_scale, ids, pairs)
    assert_near(out[0], exact, torch.float32, what="lse")
    assert_near(out[1], logits.amax(1), torch.float32, what="max")
    row_grad = torch.randn(len(features), generator=torch.Generator().manual_seed(1))
    total = (row_grad * exact)[exact > -torch.inf].sum()
    grads = torch.autograd.grad(total, [x, s, r])
    shift = exact.masked_fill(exact == -torch.inf, 0.0)
    weights = row_grad[:, None] * (logits - shift[:, None]).exp()
    exact_moment = ((weights + weights.T) * r * (x @ x.T)).sum(1)
    gradient, moment = triton_backend.pair_softmax_symmetric_backward(
        features, scale, row_scale, ids, pairs, out[0], row_grad
    )
    assert gradient.dtype is dtype
    assert moment.dtype is torch.float32
    assert_near(gradient, grads[0], dtype, what="grad_features")
    assert_near(moment, exact_moment, dtype, what="moment")
    # what the moment is for
    assert_near(scale * exact_moment, grads[2], torch.float64, what="grad_row_scale")
    assert_near(0.5 * (row_scale * exact_moment).sum(), grads[1], torch.float64, what="grad_scale")
    return *out, gradient, moment


def sigmoid_loss_of(query, key, query_scale, key_scale, bias, positive):
    """The definition of pair_sigmoid's loss [N]; bias [N] to get each row's part of it."""
    logits = query_scale[:, None] * (query @ key.T) * key_scale + bias[:, None]
    if positive is not None:
        distance = torch.arange(len(key)) - torch.arange(len(query))[:, None]
        logits = torch.where(distance == positive, -logits, logits)
    return -torch.nn.functional.logsigmoid(-logits).sum(1)


def check_sigmoid(given, dtype, need=(True, True)):
    """Loss and gradients; `given` is all of pair_sigmoid's arguments up to positive_diagonal."""
    query, key, query_scale, key_scale, bias, row_weight, positive = given
    per_row = bias.expand(len(query))
    leaves = wide(query, key, query_scale, key_scale, per_row)
    exact = sigmoid_loss_of(*leaves, positive)
    weight = torch.ones(len(query)) if row_weight is None else row_weight
    total = (weight.double() * exact).sum()
    expected = torch.autograd.grad(total, leaves)
    loss, *gradients = triton_sigmoid.pair_sigmoid(*given, *need)
    assert loss.dtype is torch.float32
    assert_near(loss, exact, torch.float32, what="loss")
    alone, *nothing = triton_sigmoid.pair_sigmoid(*given, False, False)
    assert_near(alone, exact, torch.float32, what="loss alone")
    assert [x.shape for x in nothing] == [(0,)] * 5
    names = ("grad_query", "grad_key", "grad_query_scale", "grad_key_scale", "grad_bias")
    wanted = (*need, True, True, True)
    for name, x, e, want in zip(names, gradients, expected, wanted, strict=True):
        if want:
            assert x.dtype is (dtype if e.dim() == 2 else torch.float32)
            # nothing that 16 bits hold enters the vectors
            near = dtype if e.dim() == 2 else torch.float32
            assert_near(x, e, near, what=name)
        else:
            assert x.shape == (0,)
    return loss, *gradients


def unit(rows):
    """Rows over their norms; a row of zeros is constant."""
    zero = (rows == 0).all(1, keepdim=True)
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, rows).norm(dim=1, keepdim=True))


def exact_loss(query, positive, key, scale, query_ids, key_ids, diagonals, normalize):
    """Loss, negatives' lse, positive logit and negatives' maximum per row; scale [N] to get d_i."""
    if normalize:
        query, key = unit(query), unit(key)
        positive = None if positive is None else unit(positive)
    if positive is None:
        positive = key[: len(query)]
    logits = logits_of(
        query, key, scale, torch.ones(len(key)).double(), query_ids, key_ids, diagonals
    )
    positive_logit = scale * (query * positive).sum(1)
    lse = lse_of(logits, 1)
    kept = lse > -torch.inf
    loss = torch.nn.functional.softplus(torch.where(kept, lse, 0.0) - positive_logit)
    return torch.where(kept, loss, 0.0), lse, positive_logit, logits.amax(1)


def check_loss(given, dtype, names=("query", "positive", "key")):
    """The fused loss; `given` is all of pair_softmax_loss's arguments up to normalize."""
    query, positive, key, scale, *rest = given
    q, p, k = wide(query, positive, key)
    per_row = scale.double().expand(len(query)).clone().requires_grad_()
    exact = exact_loss(q, p, k, per_row, *rest)
    leaves = {"query": q, "positive": p, "key": k, "scale": per_row}
    wanted = [name for name in (*names, "scale") if leaves[name] is not None]
    expected = dict(
        zip(
            wanted,
            torch.autograd.grad(exact[0].sum(), [leaves[name] for name in wanted]),
            strict=True,
        )
    )
    out = triton_backend.pair_softmax_loss(
        *given, *(name in wanted for name in ("query", "positive", "key"))
    )
    for what, x, e in zip(("loss", "row_lse", "positive_logit", "row_max"), out, exact):  # noqa: B905
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32, what=what)
    for name, x in zip(("query", "positive", "key", "scale"), out[4:], strict=True):
        if name in expected:
            assert x.dtype is (torch.float32 if name == "scale" else dtype)
            assert_near(x, expected[name], dtype, what=f"grad_{name}")
        else:
            assert x.shape == (0,)
    return out

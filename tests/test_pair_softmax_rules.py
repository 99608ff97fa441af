"""Pairs kept by their ids: two ids in a row, and only those that match."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.ops.pair_softmax import IGNORED_ID, pair_softmax
from ssl_fast.ops.pair_softmax_symmetric import pair_softmax_symmetric

SHAPES = [(0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 1, 1), (3, 5, 2), (33, 13, 97), (130, 257, 33)]
WAYS = pytest.mark.parametrize(("matching", "each"), [(False, 2), (True, 1), (True, 2)])


def ids_of(count, each, seed=1):
    """Ids that some rows share; a few rows are ignored, by their first id or by their last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 5, (count, 2), generator=generator)
    ids[2::7, 0] = ids[4::9, -1] = IGNORED_ID
    return ids if each == 2 else ids[:, 0].clone()


def kept(query_ids, key_ids, matching):
    """The rule, pair by pair."""
    stays = torch.zeros(len(query_ids), len(key_ids), dtype=torch.bool)
    query_ids, key_ids = (x[:, None] if x.dim() == 1 else x for x in (query_ids, key_ids))
    for i, own in enumerate(query_ids.tolist()):
        for j, other in enumerate(key_ids.tolist()):
            common = any(a == b for a, b in zip(own, other, strict=True))
            stays[i, j] = common == matching and IGNORED_ID not in own + other
    return stays


def dense(inputs, stays):
    """Log-sum-exps of rows and columns over the pairs that stay."""
    query, key, query_scale, key_scale = inputs
    logits = (query @ key.T) * query_scale[:, None] * key_scale
    logits = logits.masked_fill(~stays, -torch.inf)
    if logits.numel() == 0:
        return logits.sum(dim=1) - torch.inf, logits.sum(dim=0) - torch.inf
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def gradients(inputs, stays, grads):
    """Of both log-sum-exps; a row without pairs has none."""
    inputs = [x.double().requires_grad_() for x in inputs]
    terms = [
        (grad * lse)[stays.any(dim=1 - axis)].sum()
        for axis, (grad, lse) in enumerate(zip(grads, dense(inputs, stays), strict=True))
    ]
    found = torch.autograd.grad(sum(terms), inputs)
    return [torch.nan_to_num(x, 0.0) for x in found]


@WAYS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs(backend, features, shape, matching, each, dtype):
    n, m, d = shape
    inputs = [features(n, d, dtype=dtype), features(m, d, dtype=dtype)]
    inputs += [torch.rand(n) * 2, torch.rand(m) * 2]
    ids = ids_of(n, each), ids_of(m, each, seed=2)
    stays = kept(*ids, matching)
    module, rule = dispatch.load(backend, "pair_softmax"), {"matching": matching}
    exact = dense([x.double() for x in inputs], stays)
    row_lse, _, column_lse, _ = module.pair_softmax(*inputs, *ids, [], True, **rule)
    assert_near(row_lse, exact[0], torch.float32, what="row_lse")
    assert_near(column_lse, exact[1], torch.float32, what="column_lse")
    grads = torch.randn(n).double(), torch.randn(m).double()
    saved = [x.float() for x in (*exact, *grads)]
    found = module.pair_softmax_backward(*inputs, *ids, [], *saved, None, True, True, **rule)
    for x, e in zip(found, gradients(inputs, stays, grads), strict=True):
        assert_near(x, e, dtype)
    row_lse, _, _, expectation = module.pair_softmax_expectation(*inputs, *ids, [], **rule)
    assert_near(row_lse, exact[0], torch.float32, what="row_lse")
    ones = torch.ones(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    by_query, *_ = gradients(inputs, stays, ones)
    scaled = expectation.double() * inputs[2].double()[:, None]
    assert_near(scaled, by_query, dtype, what="expectation")


@WAYS
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 2), (97, 33), (258, 5)], ids=str)
def test_symmetric(backend, features, shape, matching, each, dtype):
    n, d = shape
    rows, scale, row_scale = features(n, d, dtype=dtype), torch.tensor(3.0), torch.rand(n) + 0.2
    ids = ids_of(n, each)
    stays = kept(ids, ids, matching) & ~torch.eye(n, dtype=torch.bool)
    inputs = [rows, rows, scale * row_scale, row_scale]
    module, rule = dispatch.load(backend, "pair_softmax"), {"matching": matching}
    exact, _ = dense([x.double() for x in inputs], stays)
    lse, _ = module.pair_softmax_symmetric(rows, scale, row_scale, ids, 0, **rule)
    assert_near(lse, exact, torch.float32, what="lse")
    grad = torch.randn(n).double()
    nothing = torch.zeros(n, dtype=torch.float64)
    by_query, by_key, _, _ = gradients(inputs, stays, (grad, nothing))
    found, _ = module.pair_softmax_symmetric_backward(
        rows, scale, row_scale, ids, 0, exact.float(), grad.float(), **rule
    )
    assert_near(found, by_query + by_key, dtype, what="grad_features")


@WAYS
def test_gradients_of_the_ops(features, matching, each):
    """To the second order, a sweep whose keys need no gradient included."""
    inputs = [features(6, 3, dtype=torch.float64), features(5, 3, dtype=torch.float64)]
    inputs += [torch.rand(6).double() + 0.5, torch.rand(5).double() + 0.5]
    ids = {"query_ids": ids_of(6, each), "key_ids": ids_of(5, each, seed=2), "matching": matching}

    def finite(lse):
        return torch.where(lse == -torch.inf, 0.0, lse)

    def both(*given):
        found = pair_softmax(*given, **ids, columns=True)
        return finite(found.row_lse), finite(found.column_lse)

    def of_query(query, scale):
        return finite(pair_softmax(query, inputs[1], scale, inputs[3], **ids).row_lse)

    def symmetric(rows, scale):
        lse, _ = pair_softmax_symmetric(rows, scale.sum(), scale, ids=rows_ids, matching=matching)
        return finite(lse)

    rows_ids = ids["query_ids"]
    for function, inputs_of_it in (
        (both, inputs),
        (of_query, inputs[::2]),
        (symmetric, inputs[::2]),
    ):
        given = [x.detach().clone().requires_grad_() for x in inputs_of_it]
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_ids_that_do_not_fit(features):
    rows, scale = features(4, 3), torch.ones(4)
    one, two, three = (torch.zeros(4, n, dtype=torch.int64) for n in (1, 2, 3))
    for query_ids, key_ids, message in (
        (two, one[:, 0], "ids must give each row as many ids; got 2 and 1"),
        (three, three, r"query_ids must be a torch.int64 tensor of shape \(4, 2\)"),
    ):
        ids = {"query_ids": query_ids, "key_ids": key_ids}
        with pytest.raises(ValueError, match=message):
            pair_softmax(rows, rows, scale, scale, **ids, backend="native")

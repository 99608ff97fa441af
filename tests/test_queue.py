"""Keys that need no gradient, as a queue's: the expected keys, and overwriting before backward."""

from __future__ import annotations

import plain as plainly
import pytest
import torch
from test_pair_softmax import RULES, SHAPES, module, sweep_arguments, widened
from tolerances import assert_near

import ssl_fast
from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.pair_softmax import pair_softmax


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expectation(backend, features, shape, rule, dtype):
    arguments = sweep_arguments(features, shape, rule, dtype)
    exact = reference.pair_softmax_expectation(*widened(arguments))
    plain = reference.pair_softmax_expectation(*arguments)
    expected = plainly.gradients(
        lambda q: plainly.pair_softmax(q, *arguments[1:])[:1],
        arguments[:1],
        [torch.ones(shape[0])],
    )[0]
    out = module(backend).pair_softmax_expectation(*arguments)
    names = ("row_lse", "row_max", "diagonal_logit")
    for name, x, e, p in zip(names, out, exact, plain, strict=False):
        assert_near(x, e, torch.float32, plain=p, what=name)
    assert out[3].dtype is torch.float32
    assert_near(out[3], exact[3], dtype, plain=plain[3], what="expectation")
    scaled = out[3] * arguments[2][:, None]
    assert_near(scaled, exact[3] * arguments[2][:, None], dtype, plain=expected, what="gradient")


def penalty(total, query):
    """The squared norm of the gradient, differentiable."""
    (grad,) = torch.autograd.grad(total, query, create_graph=True)
    return grad.square().sum()


def queue_loss(query, key, query_scale, key_scale, backend, diagonals=(), ids=(None, None)):
    found = pair_softmax(
        query, key, query_scale, key_scale, query_ids=ids[0], key_ids=ids[1],
        diagonals=diagonals, backend=backend,
    )  # fmt: skip
    return found.row_lse.square().sum() + found.diagonal_logit.sum()


@pytest.mark.parametrize(("query_asks", "scale_asks"), [(False, True), (True, False), (True, True)])
def test_the_keys_of_a_sweep_may_be_overwritten(backend, features, dtype, query_asks, scale_asks):
    query, queue = features(13, 8, dtype=dtype), features(40, 8, dtype=dtype)
    scales = [torch.rand(13) * 3, torch.rand(40)]
    ids = [torch.arange(13), torch.arange(40) // 2]
    query.requires_grad_(query_asks)
    scales[0].requires_grad_(scale_asks)
    asking = [x for x in (query, scales[0]) if x.requires_grad]
    exact = [x.detach().double().requires_grad_() for x in asking]
    wide = iter(exact)
    wide_query = next(wide) if query_asks else query.double()
    wide_scale = next(wide) if scale_asks else scales[0].double()
    value = queue_loss(wide_query, queue.double(), wide_scale, scales[1].double(), None, ids=ids)
    expected = torch.autograd.grad(value, exact)
    found = queue_loss(query, queue, *scales, backend, ids=ids)
    with torch.no_grad():
        for taken in (queue, scales[1], ids[1]):
            taken.zero_()
    for x, e in zip(torch.autograd.grad(found, asking), expected, strict=True):
        assert_near(x, e, dtype)


@pytest.mark.parametrize("diagonals", [(), (0,)], ids=str)
def test_second_derivatives_beside_a_queue(backend, features, diagonals):
    results = []
    values = features(6, 4), features(9, 4), torch.rand(6) + 0.5, torch.rand(9)
    for kind, name in ((torch.float32, backend), (torch.float64, None)):
        query, queue, scale, key_scale = (x.to(kind) for x in values)
        inputs = [query.requires_grad_(), scale.requires_grad_()]
        total = queue_loss(query, queue, scale, key_scale, name, diagonals)
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)
        results.append([x.double() for x in (*grads, *second)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_second_derivatives_notice_overwritten_keys(features, backend):
    query, queue = features(6, 4, requires_grad=True), features(9, 4)
    total = queue_loss(query, queue, torch.ones(6), torch.ones(9), backend)
    queue.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty(total, query).backward()


def queue_losses():
    """Losses of queries and a queue that takes new keys between forward and backward."""
    yield "info_nce", lambda q, queue, **o: ssl_fast.info_nce(q, q.detach() * 0.9, queue, **o)
    yield (
        "sum",
        lambda q, queue, **o: ssl_fast.info_nce(q, q.detach() * 0.9, queue, reduction="sum", **o),
    )
    yield "rows", lambda q, queue, **o: ssl_fast.info_nce(
        q, q.detach() * 0.9, queue, reduction="none", **o
    ).square().sum()  # fmt: skip


@pytest.mark.parametrize("name", [name for name, _ in queue_losses()])
def test_a_queue_may_be_overwritten_before_the_backward(features, dtype, backend, name):
    loss = dict(queue_losses())[name]
    query, queue = features(13, 8, dtype=dtype, requires_grad=True), features(40, 8, dtype=dtype)
    expected = torch.autograd.grad(loss(query, queue.clone(), backend=backend), query)
    total = loss(query, queue, backend=backend)
    queue[3:20] = 1.0
    assert torch.equal(torch.autograd.grad(total, query)[0], expected[0])


@pytest.mark.parametrize("name", ["info_nce", "sum"])
def test_a_compiled_loss_lets_its_queue_be_overwritten(features, name):
    torch._dynamo.reset()
    loss = dict(queue_losses())[name]
    query, queue = features(13, 8, requires_grad=True), features(40, 8)
    expected = torch.autograd.grad(loss(query, queue.clone()), query)
    total = torch.compile(loss, fullgraph=True, backend="aot_eager")(query, queue)
    queue[3:20] = 1.0
    torch.testing.assert_close(torch.autograd.grad(total, query), expected)


@pytest.mark.parametrize("name", [name for name, _ in queue_losses()])
def test_second_derivatives_notice_an_overwritten_queue(features, backend, name):
    loss = dict(queue_losses())[name]
    query, queue = features(13, 8, requires_grad=True), features(40, 8)
    for overwritten in (False, True):
        total = loss(query, queue, backend=backend)
        if overwritten:
            queue[3:20] = 1.0
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                penalty(total, query).backward()
        else:
            (second,) = torch.autograd.grad(penalty(total, query), query)
            assert second.norm() > 0.0


def test_a_queue_made_in_inference_mode(features, backend):
    query = features(13, 8, requires_grad=True)
    with torch.inference_mode():
        queue = features(40, 8)
    total = ssl_fast.info_nce(query, query.detach(), queue, backend=backend)
    expected = ssl_fast.info_nce(query, query.detach(), queue.clone(), backend=backend)
    torch.testing.assert_close(
        torch.autograd.grad(total, query), torch.autograd.grad(expected, query)
    )

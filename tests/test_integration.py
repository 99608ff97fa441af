"""The losses inside torch: compile, autocast, scalers, second derivatives, processes, threads."""

from __future__ import annotations

import threading

import plain as plainly
import pytest
import torch
import torch.distributed as dist
from conftest import thread_counts
from torch.nn.parallel import DistributedDataParallel

import ssl_fast


def times_lse(query, key, **options):
    loss, stats = ssl_fast.info_nce(query, key, return_stats=True, **options)
    return loss * stats.lse.mean()


LOSSES = {
    "info_nce": ssl_fast.info_nce,
    "info_nce rows": lambda q, k, **o: ssl_fast.info_nce(q, k, reduction="none", **o).mean(),
    "unpaired": lambda q, k, **o: ssl_fast.info_nce(q, k, k * 0.5 + q.detach(), **o),
    "paired": lambda q, k, **o: ssl_fast.info_nce(
        q, k, k[:, None] - q[None, :3], negative_mode="paired", **o
    ),
    "nt_xent": ssl_fast.nt_xent,
    "nt_xent rows": lambda q, k, **o: ssl_fast.nt_xent(q, k, reduction="none", **o).mean(),
    "same tensor": lambda q, k, **o: ssl_fast.info_nce(q, q, k, **o),
    "stats": times_lse,
    "clip": lambda q, k, **o: ssl_fast.clip_loss(q, k, 5.0, normalize=True, **o),
    "siglip": lambda q, k, **o: ssl_fast.siglip_loss(q, k, 5.0, -2.0, normalize=True, **o),
    "siglip rows": lambda q, k, **o: ssl_fast.siglip_loss(
        q, k, 5.0, -2.0, reduction="none", **o
    ).square().mean(),
    "sup_con": lambda q, k, **o: ssl_fast.sup_con(
        torch.stack([q, k], 1), torch.arange(len(q)) // 2, **o
    ),
    "options": lambda q, k, **o: ssl_fast.nt_xent(
        q, k, query_ids=torch.arange(len(q)) // 2, ignore=torch.arange(len(q)) == 1,
        label_smoothing=0.1, margin=0.1, hard_negative_beta=0.5, **o,
    ),
    "decoupled": lambda q, k, **o: ssl_fast.info_nce(
        q, k, query_ids=torch.arange(len(q)) // 2, row_weight=torch.arange(1.0, len(q) + 1.0),
        decoupled=True, **o,
    ),
    "queue": lambda q, k, **o: ssl_fast.info_nce(q, k, k.detach() * 0.5 + 0.1, **o),
    "queue rows": lambda q, k, **o: ssl_fast.info_nce(
        q, k, k.detach() * 0.5 + 0.1, reduction="none", **o
    ).mean(),
    "linear reconstruction": lambda q, k, **o: ssl_fast.linear_reconstruction_loss(
        q, k, torch.eye(len(q)), kind="bce", **o
    ),
    "linear reconstruction elements": lambda q, k, **o: ssl_fast.linear_reconstruction_loss(
        q, k, torch.eye(len(q)), linear_bias=k[:, 0], reduction="none", **o
    ).mean(),
}  # fmt: skip


@pytest.fixture(params=LOSSES, ids=lambda name: name.replace(" ", "-"))
def loss(request):
    return LOSSES[request.param]


def pair(features, n=13, d=8, dtype=torch.float32):
    return [features(n, d, dtype=dtype, requires_grad=True) for _ in range(2)]


def op_calls(features, dtype, backend):
    """An operator's name and arguments, for every operator and the shapes of its results."""
    query, key, positive = (features(n, 4, dtype=dtype) for n in (5, 7, 5))
    scales = [torch.rand(5), torch.rand(7)]
    ids = [torch.arange(5), torch.arange(7)]
    scale = torch.tensor(3.0)
    grads = [torch.randn(5), torch.randn(7)]
    lse, _, column_lse, _ = torch.ops.ssl_fast.pair_softmax(
        query, key, *scales, None, None, [0], True, backend=backend
    )
    for columns in (True, False):
        yield "pair_softmax", (query, key, *scales, *ids, [0, 2], columns)
    for diagonals in ([], [1]):
        yield "pair_softmax_expectation", (query, key, *scales, *ids, diagonals)
    saved = (lse, column_lse, *grads, grads[0])
    yield "pair_softmax_backward", (query, key, *scales, None, None, [0], *saved, True, True)
    saved = (lse, None, grads[0], None, None)
    yield "pair_softmax_backward", (query, key, *scales, *ids, [], *saved, False, True)
    for given, needs in ((positive, (True, True, True)), (None, (True, False, True))):
        arguments = (query, given, key, scale, None, None, [0], True)
        yield "pair_softmax_loss", (*arguments, *needs)
        yield "pair_softmax_loss", (*arguments, False, False, False)
    for need in (True, False):
        yield "pair_softmax_symmetric_loss", (query[:4], scale, True, need)
    for arguments in (
        (query, scale, scales[0], ids[0], 0),
        (query[:4], scale, scales[0][:4], None, 2),
    ):
        yield "pair_softmax_symmetric", arguments
        rows = torch.rand(len(arguments[0]))
        yield "pair_softmax_symmetric_backward", (*arguments, rows + 3.0, rows)
    for weight, needs in ((None, (False, False)), (grads[0], (True, False)), (None, (True, True))):
        for diagonal in (None, 1):
            yield "pair_sigmoid", (query, key, *scales, scale, weight, diagonal, *needs)


def test_opcheck(features, dtype, backend):
    for name, arguments in op_calls(features, dtype, backend):
        operator = getattr(torch.ops.ssl_fast, name).default
        torch.library.opcheck(operator, arguments, {"backend": backend})
    tie = torch.ops.ssl_fast.first_derivative_only.default
    torch.library.opcheck(tie, (torch.ones(()), [torch.ones(3)]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(features, loss, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (13, 6):
        inputs = pair(features, n)
        expected = loss(*inputs)
        found = compiled(*inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
        )


def test_compile_with_inductor(features):
    """The default compiler and a learned temperature."""
    torch._dynamo.reset()
    temperature = torch.tensor(0.3, requires_grad=True)
    inputs = [*pair(features), temperature]

    def loss(query, key, temperature):
        return ssl_fast.info_nce(query * 2.0, key, temperature=temperature)

    found = torch.compile(loss, fullgraph=True)(*inputs)
    expected = loss(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs),
    )


@pytest.mark.parametrize("name", ["info_nce", "info_nce rows", "nt_xent"])
def test_compiled_losses_refuse_second_derivatives(features, name):
    """They raise: a gradient penalty is never silently taken for a constant."""
    torch._dynamo.reset()
    inputs = pair(features)
    total = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")(*inputs)
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (total + sum(grad.square().sum() for grad in grads)).backward()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_once(features, loss, half):
    inputs = pair(features)
    cast = [x.detach().to(half).requires_grad_() for x in inputs]
    for backend in ("reference", None):
        with torch.autocast("cpu", half):
            found = loss(*inputs, backend=backend)
            mixed = ssl_fast.info_nce(inputs[0], cast[1], backend=backend)
        assert found.dtype is mixed.dtype is torch.float32
        grads = torch.autograd.grad(found, inputs)
        assert all(grad.dtype is torch.float32 for grad in grads)
        expected = loss(*cast, backend=backend)
        tolerance = {"rtol": 2e-2, "atol": 2e-2}  # "unpaired" makes its keys before the cast
        torch.testing.assert_close(found, expected, **tolerance)
        for grad, other in zip(grads, torch.autograd.grad(expected, cast), strict=True):
            torch.testing.assert_close(grad, other.float(), **tolerance)
    with torch.autocast("cpu", half):
        assert ssl_fast.info_nce(*(x.double() for x in inputs)).dtype is torch.float64


def test_autocast_does_not_reach_into_the_reference(features):
    inputs = [x.bfloat16() for x in pair(features, 33, 64)]
    expected = ssl_fast.info_nce(*inputs, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssl_fast.info_nce(*inputs, backend="reference"), expected)


def test_grad_scaler(features, backend):
    """A loss scaled by 2**12 in fp16, up and down again."""
    encoder = torch.nn.Linear(8, 16)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    x = [features(512, 8), features(512, 8)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    exact = torch.autograd.grad(
        plainly.info_nce(encoder(x[0]), encoder(x[1])), encoder.parameters()
    )
    with torch.autocast("cpu", torch.float16):
        loss = ssl_fast.info_nce(encoder(x[0]), encoder(x[1]), backend=backend)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, expected in zip(encoder.parameters(), exact, strict=True):
        assert (parameter.grad - expected).norm() < 1e-2 * expected.norm()
    before = encoder.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12
    assert not torch.equal(encoder.weight, before)


def test_tiny_weights_do_not_underflow(features, backend):
    """grad_output * 1/N far below fp16's smallest number, times a gradient that brings it back."""
    query, key = (x.detach().half() * 1e-3 for x in pair(features, 64))
    query.requires_grad_()
    (grad,) = torch.autograd.grad(ssl_fast.info_nce(query, key, backend=backend) * 1e-5, query)
    wide = query.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(ssl_fast.info_nce(wide, key.double()) * 1e-5, wide)
    assert (grad - exact).norm() < 2e-2 * exact.norm()


def test_double_backward(features, loss, backend):
    """The kernels' losses give the second derivatives that the formula has in float64."""
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, None)):
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(6, 4, generator=generator).to(dtype).requires_grad_() for _ in range(2)
        ]
        grads = torch.autograd.grad(loss(*inputs, backend=name), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        second = torch.autograd.grad(penalty, inputs, create_graph=True)
        third = torch.autograd.grad(sum(x.square().sum() for x in second), inputs)
        results.append([x.double() for x in (*grads, *second, *third)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_func_grad(features, loss, backend):
    inputs = [x.detach() for x in pair(features)]

    def value(*x):
        return loss(*x, backend=backend)

    found = torch.func.grad(value, argnums=(0, 1))(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(found, torch.autograd.grad(value(*leaves), leaves))
    hessian_vector = torch.func.grad(lambda q, k: torch.func.grad(value)(q, k).square().sum())
    (grad,) = torch.autograd.grad(value(*leaves), leaves[0], create_graph=True)
    torch.testing.assert_close(
        hessian_vector(*inputs), torch.autograd.grad(grad.square().sum(), leaves[0])[0]
    )


def test_func_grad_inside_of_another_gradient(features, loss, backend):
    """An inner transform sees no requires_grad on what only an outer one differentiates."""
    query, key = (x.detach() for x in pair(features))

    def outer(q):
        grad, value = torch.func.grad_and_value(lambda k: loss(q * 1.0, k, backend=backend))(key)
        return value + grad.square().sum()

    leaf = query.clone().requires_grad_()
    inner = key.clone().requires_grad_()
    value = loss(leaf, inner, backend=backend)
    (grad,) = torch.autograd.grad(value, inner, create_graph=True)
    (expected,) = torch.autograd.grad(value + grad.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(outer)(query), expected)

    weight = torch.eye(query.shape[1], requires_grad=True)
    torch.func.grad_and_value(lambda k: loss(query @ weight, k, backend=backend))(key)[1].backward()
    plain = query.clone().requires_grad_()
    loss(plain, key, backend=backend).backward()
    torch.testing.assert_close(weight.grad, query.T @ plain.grad)


def test_second_backward_gives_the_same_gradient(features, loss, backend):
    inputs = pair(features)
    total = 3.0 * loss(*inputs, backend=backend)
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    torch.testing.assert_close(torch.autograd.grad(total, inputs, retain_graph=True), tuple(kept))
    total.backward()
    assert all(torch.equal(x.grad, k) for x, k in zip(inputs, kept, strict=True))


def test_changed_inputs_are_noticed(features, backend):
    """A gradient is never that of values which aren't there any more."""
    query, key = pair(features)
    doubled = query * 2.0
    rows = ssl_fast.info_nce(doubled, key, reduction="none", backend=backend)
    with torch.no_grad():
        doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


def test_hooks_see_gradients(features, backend):
    query, key = pair(features)
    seen = []
    hidden = query * 1.0
    hidden.register_hook(seen.append)
    key.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad))
    ssl_fast.nt_xent(hidden, key, backend=backend).backward()
    assert {tuple(x.shape) for x in seen} == {(13, 8)}
    assert len(seen) == 2


def _train_in_process(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 8))
    x = torch.randn(2, 2, 16, 4)[rank]
    ssl_fast.info_nce(model(x[0]), model(x[1])).backward()
    results[rank] = [p.grad.tolist() for p in model.parameters()]
    dist.destroy_process_group()


def test_data_parallel(tmp_path):
    """The gradients of two processes are the mean of each one's own."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        path = tmp_path / "rendezvous"
        torch.multiprocessing.spawn(_train_in_process, (str(path), results), nprocs=2)
        found = [[torch.tensor(x) for x in results[rank]] for rank in (0, 1)]
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 8)
    parts = torch.randn(2, 2, 16, 4)
    losses = [plainly.info_nce(model(x[0]), model(x[1])) for x in parts]
    expected = torch.autograd.grad(sum(losses) / 2, model.parameters())
    for grads in found:
        torch.testing.assert_close(tuple(grads), expected, rtol=1e-4, atol=1e-5)


def test_python_threads(features, loss, backend):
    inputs = [x.detach() for x in pair(features, 97)]

    def run():
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = loss(*leaves, backend=backend)
        return total.detach(), *torch.autograd.grad(total, leaves)

    expected = run()
    failures = []

    def work():
        for _ in range(10):
            same = [torch.equal(a, b) for a, b in zip(run(), expected, strict=True)]
            failures.extend([threading.get_ident()] * same.count(False))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class _Losses(torch.utils.data.Dataset):
    """Computes a loss in the process that loads."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = torch.randn(33, 8, generator=torch.Generator().manual_seed(index))
        return ssl_fast.info_nce(rows, rows.roll(1, 1))


def test_forked_loader_workers(features):
    """A worker forked after the parent's threads have run a kernel computes and doesn't hang."""
    torch.set_num_threads(2)
    big = features(600, 16)
    ssl_fast.info_nce(big, big)
    loader = torch.utils.data.DataLoader(
        _Losses(), num_workers=1, multiprocessing_context="fork", timeout=60
    )
    expected = torch.stack([_Losses()[index] for index in range(2)])
    torch.testing.assert_close(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("name", ["info_nce", "info_nce rows", "nt_xent", "nt_xent rows"])
def test_bits_are_the_same_every_time(name, backend):
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(200, 24, generator=generator).requires_grad_() for _ in range(2)]
        total = LOSSES[name](*inputs, backend=backend)
        results.append([total, *torch.autograd.grad(total, inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

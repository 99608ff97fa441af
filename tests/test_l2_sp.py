"""L2-SP: every backend against the python loop in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.tensor
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_near

import ssl_fast

# Of many sizes, of none, around a block and around a part of it.
SHAPES = [
    (3, 5),
    (0,),
    (),
    (7,),
    (1023,),
    (1024, 2),
    (16384,),
    (16385,),
    (64, 3, 7, 7),
    (1,),
    (0, 3),
]
WEIGHT = 0.75


def tensors_of(shapes=SHAPES, dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(len(shapes))
    pairs = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2)]
    return [x.requires_grad_(requires_grad) for x in pairs[0]], pairs[1]


def exact_of(parameters, anchors, weight=WEIGHT):
    """The value, and each gradient, in float64."""
    away = [p.detach().double() - a.double() for p, a in zip(parameters, anchors, strict=True)]
    return 0.5 * weight * sum(x.square().sum() for x in away), [weight * x for x in away]


def assert_agrees(value, grads, exact):
    assert_near(value, exact[0], torch.float32)
    for x, e in zip(grads, exact[1], strict=True):
        assert_near(x, e, x.dtype)


@pytest.mark.parametrize("shapes", [SHAPES, [(0,)], [()], [(40001,)], [(3,)] * 40], ids=len)
def test_values_and_gradients(backend, shapes, dtype):
    parameters, anchors = tensors_of(shapes, dtype)
    exact = exact_of(parameters, anchors)
    value = ssl_fast.l2_sp(iter(parameters), iter(anchors), WEIGHT, backend=backend)
    assert value.dtype is torch.float32
    grads = torch.autograd.grad(value, parameters, retain_graph=True)
    assert all(x.dtype is dtype for x in grads)
    assert_agrees(value, grads, exact)
    again = torch.autograd.grad(value, parameters)
    assert all(map(torch.equal, again, grads))
    tripled = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend) * 3.0
    assert_agrees(
        tripled / 3.0,
        [x / 3.0 for x in torch.autograd.grad(tripled, parameters)],
        exact,
    )


@pytest.mark.parametrize("shapes", [SHAPES, [(0,)], [()], [(40001,)]], ids=len)
def test_accumulate(backend, shapes, dtype):
    """Into gradients that are there, and into ones that aren't; frozen parameters get none."""
    parameters, anchors = tensors_of(shapes, dtype)
    exact = exact_of(parameters, anchors)
    for parameter in parameters[1::2]:
        parameter.grad = torch.ones_like(parameter)
    expected = [e if p.grad is None else e + 1.0 for e, p in zip(exact[1], parameters, strict=True)]
    parameters[-1].requires_grad_(False).grad = None
    kept = [p.grad for p in parameters]
    versions = [None if x is None else x._version for x in kept]
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
    assert not value.requires_grad
    assert parameters[-1].grad is None
    assert_near(value, exact[0], torch.float32)
    for p, grad, version, e in zip(parameters[:-1], kept, versions, expected, strict=False):
        assert p.grad.dtype is dtype
        assert not p.grad.requires_grad
        assert_near(p.grad, e, dtype)
        if grad is not None:
            assert p.grad is grad
            assert grad._version > version


def test_accumulate_equals_backward(backend):
    parameters, anchors = tensors_of()
    ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend).backward()
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
    assert all(torch.equal(p.grad, x) for p, x in zip(parameters, grads, strict=True))


def test_layouts(backend, dtype):
    """channels_last on either side or both, expanded anchors, transposed parameters, views."""
    images, away = torch.randn(4, 5, 6, 7).to(dtype), torch.randn(4, 5, 6, 7).to(dtype)
    last = {"memory_format": torch.channels_last}
    wide = torch.full((6, 70), torch.nan).to(dtype)
    wide[:, ::2] = torch.randn(6, 35)
    pairs = [
        (images.clone(), away.to(**last)),
        (images.to(**last), away.to(**last)),
        (images.to(**last), away.clone()),
        (images[0, 0].clone().T, away[0, 0].clone().T),
        (wide[:, ::2], wide[:, ::2] + 1.0),
        (images[0].clone(), torch.zeros(()).to(dtype).expand(5, 6, 7)),
        (images[0, 0, 0].clone(), away[0, 0, 0].flip(0)),
        (images[0, 0, 0].clone(), torch._neg_view(away[0, 0, 0])),
        (images[:, :1].clone(), away[:, :1].contiguous(**last)),
    ]
    parameters = [p.detach().requires_grad_() for p, _ in pairs]
    anchors = [a for _, a in pairs]
    exact = exact_of(parameters, anchors)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend)
    assert_agrees(value, torch.autograd.grad(value, parameters), exact)
    for memory_format in (torch.contiguous_format, torch.preserve_format, None):
        for p in parameters:
            p.grad = None
            if memory_format is not None:
                p.grad = torch.zeros_like(p, memory_format=memory_format)
        value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
        assert_agrees(value, [p.grad for p in parameters], exact)


def test_mixed_dtypes(backend):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    parameters, anchors = tensors_of([(33, 5)] * 6)
    parameters = [p.detach().to(dtypes[i % 3]).requires_grad_() for i, p in enumerate(parameters)]
    anchors = [a.to(p.dtype) for a, p in zip(anchors, parameters, strict=True)]
    exact = exact_of(parameters, anchors)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend)
    assert value.dtype is torch.float32
    assert_agrees(value, torch.autograd.grad(value, parameters), exact)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
    assert value.dtype is torch.float32
    assert_agrees(value, [p.grad for p in parameters], exact)


def test_float64_runs_on_the_reference():
    parameters, anchors = tensors_of()
    parameters.append(torch.randn(5).double().requires_grad_())
    anchors.append(torch.randn(5).double())
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT)
    assert value.dtype is torch.float64
    assert_agrees(value, torch.autograd.grad(value, parameters), exact_of(parameters, anchors))


def test_near_zero_and_far(backend):
    """Weights that moved by 1e-4 of themselves, and a sum of many small squares."""
    start = torch.randn(300000)
    now = (start + 1e-4 * torch.randn(300000)).requires_grad_()
    value = ssl_fast.l2_sp([now], [start], backend=backend)
    exact = exact_of([now], [start], 1.0)
    torch.testing.assert_close(value.detach().double(), exact[0], rtol=1e-6, atol=0.0)
    (grad,) = torch.autograd.grad(value, now)
    assert torch.equal(grad.double(), exact[1][0].float().double())


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(backend, dtype):
    parameters, anchors = tensors_of(dtype=dtype)
    value = ssl_fast.l2_sp(parameters, anchors, backend=backend)
    grads = torch.autograd.grad(value, parameters)
    ssl_fast.l2_sp(parameters, anchors, accumulate=True, backend=backend)
    assert not any(x.isnan().any() for x in (value, *grads, *(p.grad for p in parameters)))


def test_bits_do_not_depend_on_threads_or_repetition(backend, dtype):
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        parameters, anchors = tensors_of([(150001,), (3,), (70000,), *SHAPES], dtype)
        value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend)
        grads = torch.autograd.grad(value, parameters)
        ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
        results.append([value.detach(), *grads, *(p.grad for p in parameters)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_gradients_larger_than_the_cache(backend, dtype):
    """Stores past the caches, of a tensor and of what follows it."""
    shapes = [(3,), ((36 << 20) // dtype.itemsize + 5,), (1001,)]
    parameters, anchors = tensors_of(shapes, dtype)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
    assert_agrees(value, [p.grad for p in parameters], exact_of(parameters, anchors))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_values_propagate(backend, value):
    parameters, anchors = tensors_of(requires_grad=False)
    parameters[4][17] = value
    parameters = [p.requires_grad_() for p in parameters]
    found = ssl_fast.l2_sp(parameters, anchors, backend=backend)
    torch.testing.assert_close(found.item(), value, equal_nan=True)
    grads = torch.autograd.grad(found, parameters)
    assert [int((~x.isfinite()).sum()) for x in grads] == [int(i == 4) for i in range(len(grads))]


def test_gradients_reach_only_what_asks(backend):
    parameters, anchors = tensors_of([(3, 5)] * 4)
    parameters[1].requires_grad_(False)
    exact = exact_of(parameters, anchors)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend)
    assert_near(value, exact[0], torch.float32)
    value.backward()
    assert [p.grad is None for p in parameters] == [False, True, False, False]
    with torch.no_grad():
        assert not ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend).requires_grad
    frozen = [p.detach() for p in parameters]
    value = ssl_fast.l2_sp(frozen, anchors, WEIGHT, accumulate=True, backend=backend)
    assert_near(value, exact[0], torch.float32)
    assert all(p.grad is None for p in frozen)
    # Anchors are constants, whatever they ask for.
    asking = [a.clone().requires_grad_() for a in anchors]
    ssl_fast.l2_sp(parameters, asking, WEIGHT, backend=backend).backward()
    assert all(a.grad is None for a in asking)


def test_gradcheck_and_gradients_of_gradients(backend):
    parameters, anchors = tensors_of([(3, 4), (5,)])
    wide = [p.detach().double().requires_grad_() for p in parameters]
    constants = [a.double() for a in anchors]

    def loss(*values):
        return ssl_fast.l2_sp(values, constants, WEIGHT)

    assert torch.autograd.gradcheck(loss, wide)
    assert torch.autograd.gradgradcheck(loss, wide)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, backend=backend)
    first = torch.autograd.grad(value.square(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), parameters)
    expected = torch.autograd.grad(loss(*wide).square(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in expected), wide)
    for x, e in zip(second, expected, strict=True):
        assert_near(x, e, torch.float32)


def test_transforms_compile_and_opcheck(backend):
    parameters, anchors = tensors_of([(3, 4), (5,)])

    def loss(*values):
        return ssl_fast.l2_sp(values, anchors, WEIGHT, backend=backend) * 2.0

    expected = torch.autograd.grad(loss(*parameters), parameters)
    values = [p.detach() for p in parameters]
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(*values), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*parameters), parameters), expected)
    operators, options = torch.ops.ssl_fast, {"backend": backend}
    torch.library.opcheck(operators.l2_sp.default, (values, anchors, WEIGHT), options)
    arguments = (values, anchors, torch.tensor(2.0), WEIGHT, [True, False])
    torch.library.opcheck(operators.l2_sp_backward.default, arguments, options)


def test_fine_tuning(backend):
    """The same steps as with the penalty in the loss."""
    results = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
        anchors = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 5)).square().sum()
            if accumulate:
                loss.backward()
                ssl_fast.l2_sp(model.parameters(), anchors, 0.1, accumulate=True, backend=backend)
            else:
                (
                    loss + ssl_fast.l2_sp(model.parameters(), anchors, 0.1, backend=backend)
                ).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)


P, A = torch.zeros(3, requires_grad=True), torch.ones(3)
BAD = [
    ([], [], {}, ValueError, "parameters must hold a tensor at least"),
    ({"a": P}, [A], {}, TypeError, "parameters must be an iterable of tensors"),
    (3, [A], {}, TypeError, "parameters must be an iterable"),
    ([P], [2.0], {}, TypeError, r"anchors\[0\] must be a tensor"),
    ([P, P], [A], {}, ValueError, "anchors must have as many tensors as parameters, 2; got 1"),
    ([P], [A[:2]], {}, ValueError, r"anchors\[0\] must have the shape"),
    ([P], [A.half()], {}, TypeError, r"anchors\[0\] must have the dtype"),
    ([P], [A.to("meta")], {}, ValueError, r"anchors\[0\] must be on the device"),
    ([P, A.to("meta")], [A, A.to("meta")], {}, ValueError, r"parameters\[1\] must be on the dev"),
    ([A.int()], [A.int()], {}, TypeError, r"parameters\[0\] must be a dense tensor of float32"),
    ([P], [A], {"weight": -1.0}, ValueError, "weight must be 0 or more"),
    ([P], [A], {"weight": float("nan")}, ValueError, "weight must be 0 or more"),
    ([P], [A], {"weight": "1"}, TypeError, "weight must be a number"),
    ([P], [A], {"weight": True}, TypeError, "weight must be a number"),
    ([P], [A], {"backend": "fastest"}, ValueError, "backend must be one of"),
    ([P * 1.0], [A], {"accumulate": True}, ValueError, r"parameters\[0\] must be a leaf"),
    ([P, P], [A, A], {"accumulate": True}, ValueError, "must not be given twice"),
]


@pytest.mark.parametrize(("parameters", "anchors", "options", "error", "message"), BAD)
def test_bad_arguments(parameters, anchors, options, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.l2_sp(parameters, anchors, **options)
    assert P.grad is None


def test_sharded_parameters_are_refused():
    """Their address is not that of their elements; of shards the value is a rank's share."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        placed = dist.tensor.distribute_tensor(torch.randn(4), mesh, [dist.tensor.Shard(0)])
        placed.requires_grad_()
        for accumulate in (False, True):
            with pytest.raises(TypeError, match=r"parameters\[0\].*DTensor: pass its to_local"):
                ssl_fast.l2_sp([placed], [torch.zeros(4)], accumulate=accumulate)
        ssl_fast.l2_sp([placed.to_local()], [torch.zeros(4)], 2.0).backward()
        torch.testing.assert_close(placed.grad.to_local(), 2.0 * placed.detach().to_local())
    finally:
        dist.destroy_process_group()


def test_bad_arguments_of_the_operator(backend):
    x = torch.zeros(3)
    operators = torch.ops.ssl_fast
    wrong = [([x], []), ([x], [x[:2]]), ([x, x.half()], [x, x.half()]), ([x.int()], [x.int()])]
    for lists in wrong:
        with pytest.raises(ValueError, match=r"parameters|anchors"):
            operators.l2_sp(*lists, 1.0, backend=backend)
    with pytest.raises(ValueError, match="needed must have 1 entries"):
        operators.l2_sp_backward([x], [x], x[0], 1.0, [], backend=backend)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12),
    present=st.integers(0, 2**12 - 1),
    frozen=st.integers(0, 2**12 - 1),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_l2_sp(backend, shapes, present, frozen, kind):
    parameters, anchors = tensors_of(shapes, kind)
    expected = exact_of(parameters, anchors)
    for place, parameter in enumerate(parameters):
        if present >> place & 1:
            parameter.grad = torch.ones_like(parameter)
            expected[1][place].add_(1.0)
        if frozen >> place & 1:
            parameter.requires_grad_(False)
    value = ssl_fast.l2_sp(parameters, anchors, WEIGHT, accumulate=True, backend=backend)
    assert_near(value, expected[0], torch.float32)
    for place, (parameter, e) in enumerate(zip(parameters, expected[1], strict=True)):
        if frozen >> place & 1:
            assert parameter.grad is None or torch.all(parameter.grad == 1.0)
        else:
            assert_near(parameter.grad, e, kind)

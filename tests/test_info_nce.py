"""info_nce and InfoNCE: equal to the plain formula, and clear about what they don't take."""

from __future__ import annotations

import itertools
import pickle

import plain as plainly
import pytest
import torch
from tolerances import assert_near

import ssl_fast

NEGATIVES = ["in-batch", "unpaired", "paired"]
REDUCTIONS = ["mean", "sum", "none"]


def arguments_for(features, negatives, n=13, m=33, d=31, dtype=torch.float32, requires_grad=True):
    """query, positive_key, negative_keys and the mode."""
    make = {"dtype": dtype, "requires_grad": requires_grad}
    query, positive = features(n, d, **make), features(n, d, **make)
    keys = {"in-batch": None, "unpaired": (m, d), "paired": (n, m, d)}[negatives]
    keys = keys and features(*keys, **make)
    return query, positive, keys, "paired" if negatives == "paired" else "unpaired"


def widened(tensors):
    return [
        x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors
    ]


def with_gradients(function, tensors, weight, **options):
    """The loss and its gradients for the tensors that ask for one."""
    loss = function(*tensors, **options)
    inputs = [x for x in tensors if x is not None and x.requires_grad]
    temperature = options.get("temperature")
    if isinstance(temperature, torch.Tensor):
        inputs.append(temperature)
    return [loss, *torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), inputs)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_equals_the_plain_formula(backend, features, negatives, normalize, reduction, dtype):
    *tensors, mode = arguments_for(features, negatives, dtype=dtype)
    options = {"reduction": reduction, "negative_mode": mode, "normalize": normalize}
    weight = torch.randn(13).double() if reduction == "none" else torch.tensor(1.7).double()
    results = []
    for function, inputs, temperature in (
        (lambda *a, **o: ssl_fast.info_nce(*a, **o, backend=backend), tensors, torch.tensor(0.2)),
        (plainly.info_nce, widened(tensors), torch.tensor(0.2).double()),
        (plainly.info_nce, tensors, torch.tensor(0.2)),
    ):
        temperature.requires_grad_()
        results.append(with_gradients(function, inputs, weight, temperature=temperature, **options))
    out, exact, plain = results
    assert out[0].dtype is torch.float32
    for i, (x, e, p) in enumerate(zip(out, exact, plain, strict=True)):
        assert x.dtype is (torch.float32 if i in (0, len(out) - 1) else dtype)
        assert_near(x, e, dtype, plain=p, what=f"result {i}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_equals_info_nce_pytorch(features, negatives, reduction):
    peer = pytest.importorskip("info_nce")
    *tensors, mode = arguments_for(features, negatives)
    weight = torch.ones(())
    expected = with_gradients(
        peer.info_nce, tensors, weight, temperature=0.3, reduction=reduction, negative_mode=mode
    )
    found = with_gradients(
        ssl_fast.info_nce, tensors, weight, temperature=0.3, reduction=reduction, negative_mode=mode
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    modules = [made(0.3, reduction, mode)(*tensors) for made in (ssl_fast.InfoNCE, peer.InfoNCE)]
    torch.testing.assert_close(*modules, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradients_in_float64(features, negatives):
    *tensors, mode = arguments_for(features, negatives, 4, 3, 5, dtype=torch.float64)
    inputs = [x for x in tensors if x is not None]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for reduction in REDUCTIONS:

        def loss(*values, reduction=reduction):
            *given, temperature = values
            keys = given[2] if len(given) == 3 else None
            return ssl_fast.info_nce(given[0], given[1], keys, temperature, reduction, mode)

        assert torch.autograd.gradcheck(loss, (*inputs, temperature))
        assert torch.autograd.gradgradcheck(loss, (*inputs, temperature))


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_reach_only_what_asks(backend, features, negatives, reduction):
    *tensors, mode = arguments_for(features, negatives, requires_grad=False)
    for asked in itertools.product([False, True], repeat=4):
        inputs = [
            x if x is None else x.clone().requires_grad_(ask)
            for x, ask in zip((*tensors, torch.tensor(0.2)), asked, strict=True)
        ]
        loss = ssl_fast.info_nce(*inputs, reduction, mode, backend=backend)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        assert loss.requires_grad is bool(wanted)
        if not wanted:
            continue
        loss.sum().backward()
        exact = widened(inputs)
        plainly.info_nce(*exact, reduction, mode).sum().backward()
        for x, e in zip(inputs, exact, strict=True):
            if x is not None:
                assert (x.grad is None) is (e.grad is None)
                if x.grad is not None:
                    assert_near(x.grad, e.grad, torch.float32)


def test_nothing_is_made_without_grad(backend, features):
    query, positive, _, _ = arguments_for(features, "in-batch")
    with torch.no_grad():
        loss = ssl_fast.info_nce(query, positive, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ssl_fast.info_nce(query, positive).detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_stats(backend, features, negatives, reduction):
    query, positive, keys, mode = arguments_for(features, negatives)
    loss, stats = ssl_fast.info_nce(
        query, positive, keys, 0.2, reduction, mode, return_stats=True, backend=backend
    )
    torch.testing.assert_close(
        loss, ssl_fast.info_nce(query, positive, keys, 0.2, reduction, mode, backend=backend)
    )
    unit = torch.nn.functional.normalize
    similarity = (unit(query) * unit(positive)).sum(dim=1)
    rows = plainly.info_nce(query, positive, keys, 0.2, "none", mode)
    torch.testing.assert_close(stats.lse, (rows + similarity / 0.2).detach())
    torch.testing.assert_close(stats.positive_similarity, similarity.mean().detach())
    # The positive wins exactly where the loss is below that of a tie with the largest negative.
    if negatives == "in-batch":
        logits = (unit(query) @ unit(positive).T).detach()
        wins = logits.argmax(dim=1) == torch.arange(len(query))
        torch.testing.assert_close(stats.top1, wins.float().mean())
    assert 0 <= stats.top1 <= 1
    assert not any(x.requires_grad for x in stats)


def test_top1_counts_the_rows_that_find_their_positive(backend):
    query = torch.eye(4)
    keys = query.roll(1, 0).clone()
    keys[0] = query[0]
    for reduction in REDUCTIONS:
        _, stats = ssl_fast.info_nce(
            query, keys, reduction=reduction, return_stats=True, backend=backend
        )
        # Row 0 finds its key; row 3 sees only zeros, among them its positive; 1 and 2 lose.
        assert stats.top1.item() == 0.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_grows_with_the_batch_and_not_its_square(features, reduction):
    query, positive, _, _ = arguments_for(features, "in-batch", n=8192, d=8)
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.info_nce(query, positive, reduction=reduction).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 8192 * 8192 * 4 / 2


def test_meta_tensors_have_shapes():
    for negatives in NEGATIVES:
        *tensors, mode = arguments_for(lambda *s, **_: torch.empty(s, device="meta"), negatives)
        for reduction in REDUCTIONS:
            loss = ssl_fast.info_nce(*tensors, reduction=reduction, negative_mode=mode)
            assert loss.device.type == "meta"
            assert loss.shape == ((13,) if reduction == "none" else ())


def test_sizes_at_the_edge(backend):
    for negatives in (None, torch.randn(3, 5)):
        query = torch.empty(0, 5, requires_grad=True)
        keys = negatives if negatives is None else negatives.clone().requires_grad_()
        for reduction in REDUCTIONS:
            out = ssl_fast.info_nce(query, query.detach(), keys, 0.1, reduction, backend=backend)
            expected = plainly.info_nce(query, query.detach(), keys, 0.1, reduction)
            torch.testing.assert_close(out, expected, equal_nan=True)
            inputs = [query] if keys is None else [query, keys]
            for grad in torch.autograd.grad(out.sum(), inputs):
                assert torch.all(grad == 0.0)
    row = torch.randn(1, 5, requires_grad=True)
    loss = ssl_fast.info_nce(row, torch.randn(1, 5), backend=backend)
    assert loss.item() == 0.0
    assert torch.all(torch.autograd.grad(loss, row)[0] == 0.0)


def test_float64_goes_to_the_reference(features, recwarn):
    *tensors, _ = arguments_for(features, "unpaired", dtype=torch.float64)
    loss = ssl_fast.info_nce(*tensors)
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss, plainly.info_nce(*tensors))
    assert not recwarn.list


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_zero_rows(backend, features, negatives, dtype):
    *tensors, mode = arguments_for(features, negatives, dtype=dtype)
    for x in tensors:
        if x is not None:
            x.data[::3] = 0.0
    for reduction in REDUCTIONS:
        out = with_gradients(
            ssl_fast.info_nce, tensors, torch.ones(()), reduction=reduction,
            negative_mode=mode, backend=backend,
        )  # fmt: skip
        assert all(torch.isfinite(x).all() for x in out)
        assert all(torch.all(x[::3] == 0.0) for x in out[1:])


def test_temperature_forms(features):
    query, positive, _, _ = arguments_for(features, "in-batch", requires_grad=False)
    expected = ssl_fast.info_nce(query, positive, temperature=0.25)
    for temperature in (
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.tensor(0.25, dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(0.25)),
    ):
        for reduction in ("mean", "none"):
            loss = ssl_fast.info_nce(query, positive, None, temperature, reduction)
            torch.testing.assert_close(loss.detach().mean(), expected)
    assert ssl_fast.info_nce(query, positive, temperature=1).isfinite()


def test_module(features):
    query, positive, keys, _ = arguments_for(features, "unpaired")
    module = ssl_fast.InfoNCE(0.3, "sum", normalize=False, backend="reference")
    expected = ssl_fast.info_nce(
        query, positive, keys, 0.3, "sum", normalize=False, backend="reference"
    )
    assert torch.equal(module(query, positive, keys), expected)
    copy = pickle.loads(pickle.dumps(module))
    assert torch.equal(copy(query, positive, keys), expected)
    assert "temperature=0.3" in repr(module)
    learned = ssl_fast.InfoNCE(torch.nn.Parameter(torch.tensor(0.3)))
    learned(query, positive).backward()
    (temperature,) = learned.parameters()
    assert temperature.grad is not None
    loss, stats = ssl_fast.InfoNCE(return_stats=True)(query, positive)
    assert loss.dim() == 0
    assert stats.lse.shape == (13,)


X = torch.zeros(4, 3)
BAD = [
    ({"query": [1.0]}, TypeError, "query must be a tensor"),
    ({"query": X.long()}, TypeError, "query must be float32.*int64"),
    ({"query": X.to(torch.complex64)}, TypeError, "query must be float32.*complex64"),
    ({"query": X.to_sparse()}, TypeError, "query must be a dense tensor"),
    ({"query": X[0]}, ValueError, r"query must have shape \[N, D\]; got \(3,\)"),
    ({"query": X[None]}, ValueError, r"query must have shape \[N, D\]; got \(1, 4, 3\)"),
    ({"positive_key": X[:3]}, ValueError, "positive_key must have as many rows as query, 4; got"),
    ({"positive_key": X[:, :2]}, ValueError, "positive_key must have as many components"),
    ({"positive_key": X.half()}, TypeError, "positive_key must have the dtype of query, torch.fl"),
    ({"positive_key": X.to("meta")}, ValueError, "positive_key must be on the device of query"),
    ({"negative_keys": X.bool()}, TypeError, "negative_keys must be float32"),
    ({"negative_keys": X[:, :2]}, ValueError, "negative_keys must have as many components"),
    ({"negative_keys": X[None]}, ValueError, r"negative_keys must have shape \[M, D\]; got"),
    ({"negative_keys": X[:0]}, ValueError, "negative_keys must hold at least one key"),
    ({"negative_keys": X.double()}, TypeError, "negative_keys must have the dtype of query"),
    (
        {"negative_keys": X, "negative_mode": "paired"},
        ValueError,
        r"negative_keys must have shape \[N, M, D\]; got \(4, 3\)",
    ),
    (
        {"negative_keys": X.expand(3, 4, 3), "negative_mode": "paired"},
        ValueError,
        "negative_keys must have as many rows as query, 4",
    ),
    (
        {"negative_keys": X[:, None][:, :0], "negative_mode": "paired"},
        ValueError,
        "negative_keys must hold at least one key",
    ),
    ({"negative_mode": "both"}, ValueError, "negative_mode must be one of 'unpaired', 'paired'"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'; got 'max'"),
    ({"reduction": None}, ValueError, "reduction must be one of"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
    ({"temperature": 0}, ValueError, "temperature must be greater than 0; got 0"),
    ({"temperature": -0.1}, ValueError, "temperature must be greater than 0; got -0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be greater than 0; got nan"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be greater than 0; got -1"),
    ({"temperature": torch.tensor(torch.nan)}, ValueError, "temperature must be greater than 0"),
    ({"temperature": torch.ones(2)}, ValueError, "temperature must be one number; got a"),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature must be floating; got a torch.int6"),
    ({"temperature": "0.1"}, TypeError, "temperature must be a number or a tensor; got '0.1'"),
    ({"temperature": True}, TypeError, "temperature must be a number or a tensor"),
    ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be a number or"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.info_nce(**{"query": X, "positive_key": X, **wrong})
    options = {k: v for k, v in wrong.items() if not k.endswith(("query", "key", "keys"))}
    if options == wrong and "meta" not in str(wrong):
        with pytest.raises(error, match=message):
            ssl_fast.InfoNCE(**wrong)

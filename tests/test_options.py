"""The options of the softmax losses, alone and in pairs, against dense formulas in float64."""

from __future__ import annotations

import itertools

import plain_losses as plainly
import pytest
import torch
from tolerances import assert_near

import ssl_fast

N, M, D = 11, 17, 7
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
KEY_IDS = torch.tensor([2, 7, 1, 8, 3, 8, 5, 8, 4, 5, 9, 0, 4, 5, 2, 3, 5])
IGNORE = torch.arange(N) % 4 == 1

OPTIONS = {
    "ids": {"query_ids": IDS},
    "weight": {"row_weight": torch.linspace(-0.5, 2.0, N, dtype=torch.float64)},
    "ignore": {"ignore": IGNORE},
    "smoothing": {"label_smoothing": 0.3},
    "margin": {"margin": 0.2},
    "decoupled": {"decoupled": True},
    "hard": {"hard_negative_beta": 0.7},
}
COMBINATIONS = [
    *((name,) for name in OPTIONS),
    *itertools.combinations(OPTIONS, 2),
    tuple(OPTIONS),
]
LOSSES = ["info_nce", "unpaired", "nt_xent", "clip_loss"]


def arguments_for(loss, names, reduction, dtype):
    """The options with their tensors at ``dtype``."""
    options = {"reduction": reduction}
    for name in names:
        options.update(OPTIONS[name])
    if "row_weight" in options:
        options["row_weight"] = options["row_weight"].to(dtype).requires_grad_()
    if loss == "unpaired" and "query_ids" in options:
        options["key_ids"] = KEY_IDS
    return options


def evaluate(function, loss, tensors, options, weight):
    """The loss and the gradients of features, temperature or scale, and row weights."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    *features, number = leaves
    keys = features[2:] if loss == "unpaired" else []
    value = function(*features[:2], *keys, **{"logit_scale" if loss == "clip_loss" else
                                             "temperature": number}, **options)  # fmt: skip
    if options.get("row_weight") is not None:
        leaves.append(options["row_weight"])
    total = (value * weight[: value.numel()].view_as(value).to(value.dtype)).sum()
    return value, *torch.autograd.grad(total, leaves)


def functions(loss):
    name = "info_nce" if loss == "unpaired" else loss
    return getattr(ssl_fast, name), getattr(plainly, "clip" if name == "clip_loss" else name)


def inputs_for(features, loss, dtype):
    number = torch.tensor(4.0 if loss == "clip_loss" else 0.25)
    rows = [features(N, D, dtype=dtype), features(N, D, dtype=dtype)]
    if loss == "unpaired":
        rows.append(features(M, D, dtype=dtype))
    return [*rows, number]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_dense_formula(backend, features, loss, names):
    weight = torch.randn(2 * N)
    ours, plain = functions(loss)
    for reduction in ("mean", "none"):
        tensors = inputs_for(features, loss, torch.float32)
        out = evaluate(
            lambda *a, **o: ours(*a, **o, backend=backend), loss, tensors,
            arguments_for(loss, names, reduction, torch.float32), weight,
        )  # fmt: skip
        exact = evaluate(
            plain, loss, [x.double() for x in tensors],
            arguments_for(loss, names, reduction, torch.float64), weight,
        )  # fmt: skip
        for i, (x, e) in enumerate(zip(out, exact, strict=True)):
            assert_near(x, e, torch.float32, what=f"{reduction}, result {i}")


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_dense_formula_in_half(backend, features, loss, dtype):
    ours, plain = functions(loss)
    weight = torch.randn(2 * N)
    tensors = inputs_for(features, loss, dtype)
    out = evaluate(
        lambda *a, **o: ours(*a, **o, backend=backend), loss, tensors,
        arguments_for(loss, OPTIONS, "sum", torch.float32), weight,
    )  # fmt: skip
    wide = [x.double() for x in tensors]
    exact = evaluate(plain, loss, wide, arguments_for(loss, OPTIONS, "sum", torch.float64), weight)
    for i, (x, e) in enumerate(zip(out, exact, strict=True)):
        assert_near(x, e, dtype, what=f"result {i}")


@pytest.mark.parametrize("names", [(), *COMBINATIONS[:7], tuple(OPTIONS)], ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_in_float64(features, loss, names):
    function, _ = functions(loss)
    *rows, number = inputs_for(features, loss, torch.float64)
    number = number.double()
    name = "logit_scale" if loss == "clip_loss" else "temperature"

    def value(*tensors):
        *given, number = tensors
        options = arguments_for(loss, names, "mean", torch.float64)
        return function(*given, **{name: number}, **options)

    leaves = [x.requires_grad_() for x in (*rows, number)]
    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_ids_of_keys(backend, features, loss):
    """Texts and images have ids of their own; they needn't be the rows'."""
    if loss == "nt_xent":
        with pytest.raises(TypeError, match="key_ids"):
            ssl_fast.nt_xent(torch.zeros(3, 2), torch.zeros(3, 2), key_ids=IDS[:3])
        return
    ours, plain = functions(loss)
    tensors = inputs_for(features, loss, torch.float32)
    keys = {"query_ids": IDS, "key_ids": KEY_IDS if loss == "unpaired" else IDS.roll(2)}
    for number in ({}, {"label_smoothing": 0.2, "ignore": IGNORE, "hard_negative_beta": 0.4}):
        weight = torch.randn(N)
        out = evaluate(
            lambda *a, **o: ours(*a, **o, backend=backend), loss, tensors, {**keys, **number},
            weight,
        )  # fmt: skip
        wide = [x.double() for x in tensors]
        exact = evaluate(plain, loss, wide, {**keys, **number}, weight)
        for x, e in zip(out, exact, strict=True):
            assert_near(x, e, torch.float32)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("numbers", [{}, {"decoupled": True}, {"hard_negative_beta": 0.5}])
def test_nothing_left_gives_zero(backend, features, loss, numbers):
    """All rows ignored, no weight at all, one id for all: 0 and gradients 0, never NaN."""
    ours, _ = functions(loss)
    same = {"query_ids": torch.zeros(N, dtype=torch.int64)}
    if loss == "unpaired":
        same["key_ids"] = torch.zeros(M, dtype=torch.int64)
    for given, label_smoothing in itertools.product(
        (
            {"ignore": torch.ones(N, dtype=torch.bool)},
            {"row_weight": torch.zeros(N)},
            same,
        ),
        (0.0, 0.1),
    ):
        for reduction in ("mean", "sum", "none"):
            tensors = inputs_for(features, loss, torch.float32)
            options = {**numbers, **given, "label_smoothing": label_smoothing, "backend": backend}
            options["reduction"] = reduction
            if "row_weight" in given:
                options["row_weight"] = torch.zeros(N)
                leaves = tensors = [x.requires_grad_() for x in tensors]
                *rows, number = leaves
                name = "logit_scale" if loss == "clip_loss" else "temperature"
                value = ours(*rows, **{name: number}, **options)
                grads = torch.autograd.grad(value.sum(), leaves)
            else:
                value, *grads = evaluate(ours, loss, tensors, options, torch.ones(2 * N))
            assert torch.all(value == 0.0), (given, value)
            assert all(torch.all(grad == 0.0) for grad in grads), given


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_in_ignored_rows_stays_there(backend, features, loss, reduction):
    ours, _ = functions(loss)
    tensors = inputs_for(features, loss, torch.float32)
    numbers = {"label_smoothing": 0.1, "hard_negative_beta": 0.5, "margin": 0.1}
    options = {**numbers, "ignore": IGNORE, "reduction": reduction, "backend": backend}
    options["row_weight"] = torch.rand(N, requires_grad=True)
    expected = evaluate(ours, loss, tensors, options, torch.ones(2 * N))
    for x in tensors[:2]:
        x[IGNORE] = torch.nan
    found = evaluate(ours, loss, tensors, options, torch.ones(2 * N))
    for x, e in zip(found, expected, strict=True):
        assert torch.isfinite(e).all()
        assert torch.equal(x, e)
    for grad in found[1:3]:
        assert torch.all(grad[IGNORE] == 0.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_stats_leave_ignored_rows_out(backend, features, loss):
    ours, _ = functions(loss)
    tensors = inputs_for(features, loss, torch.float32)
    *rows, number = tensors
    name = {"logit_scale" if loss == "clip_loss" else "temperature": number}
    _, found = ours(*rows, **name, ignore=IGNORE, return_stats=True, backend=backend)
    fewer = [x[~IGNORE] for x in rows[:2]] + rows[2:]
    _, expected = ours(*fewer, **name, return_stats=True, backend=backend)
    torch.testing.assert_close(found.top1, expected.top1)
    torch.testing.assert_close(found.positive_similarity, expected.positive_similarity)
    kept = ~IGNORE.repeat(2) if loss == "nt_xent" else ~IGNORE
    torch.testing.assert_close(found.lse[kept], expected.lse)


@pytest.mark.parametrize("names", COMBINATIONS[1:7], ids="+".join)
def test_paired_negatives(features, names):
    """Each query with negatives of its own: a row alone with its keys."""
    tensors = [features(N, D), features(N, D), features(N, 5, D)]
    options = arguments_for("info_nce", names, "none", torch.float32)
    found = ssl_fast.info_nce(*tensors, 0.2, negative_mode="paired", **options)
    for i in range(N):
        own = {
            key: x[i : i + 1] if isinstance(x, torch.Tensor) else x for key, x in options.items()
        }
        query, positive, keys = (x[i : i + 1].double() for x in tensors)
        expected = plainly.info_nce(query, positive, keys[0], 0.2, **own)
        assert_near(found[i : i + 1], expected, torch.float32)


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_is_linear_with_every_option(loss):
    n = 4096
    options = {
        "query_ids": torch.arange(n) // 2,
        "row_weight": torch.rand(n),
        "ignore": torch.arange(n) % 7 == 0,
        "label_smoothing": 0.1,
        "margin": 0.1,
        "hard_negative_beta": 0.3,
    }
    tensors = [torch.randn(n, 8) for _ in range(3 if loss == "unpaired" else 2)]
    if loss == "unpaired":
        options["key_ids"] = options["query_ids"]
    function, _ = functions(loss)
    leaves = [x.requires_grad_() for x in tensors]
    number = {"logit_scale": 5.0} if loss == "clip_loss" else {}
    with torch.profiler.profile(profile_memory=True) as profile:
        function(*leaves, **number, **options).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < n * n * 4 / 2


X, IDENTITY = torch.zeros(4, 3), torch.arange(4)
BAD = [
    ({"query_ids": [0, 1, 2, 3]}, TypeError, "query_ids must be a int64 tensor"),
    ({"query_ids": IDENTITY.int()}, TypeError, "query_ids must be int64; got torch.int32"),
    ({"query_ids": IDENTITY[:3]}, ValueError, r"query_ids must have shape \(4,\); got \(3,\)"),
    ({"query_ids": IDENTITY.to("meta")}, ValueError, "query_ids must be on the device of the"),
    ({"row_weight": 1.0}, TypeError, "row_weight must be a floating tensor"),
    ({"row_weight": IDENTITY}, TypeError, "row_weight must be floating; got torch.int64"),
    ({"row_weight": X}, ValueError, r"row_weight must have shape \(4,\); got \(4, 3\)"),
    ({"row_weight": X[:, 0].to("meta")}, ValueError, "row_weight must be on the device"),
    ({"ignore": IDENTITY}, TypeError, "ignore must be bool; got torch.int64"),
    ({"ignore": IDENTITY[:2] > 0}, ValueError, r"ignore must have shape \(4,\)"),
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\); got 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number; got '0.1'"),
    ({"label_smoothing": True}, TypeError, "label_smoothing must be a number; got True"),
    ({"margin": torch.tensor(0.1)}, TypeError, "margin must be a number"),
    ({"margin": float("nan")}, ValueError, "margin must be a finite number; got nan"),
    ({"margin": -float("inf")}, ValueError, "margin must be a finite number; got -inf"),
    ({"hard_negative_beta": -1}, ValueError, "hard_negative_beta must be 0 or more; got -1"),
    ({"hard_negative_beta": None}, TypeError, "hard_negative_beta must be a number; got None"),
    ({"decoupled": 1}, TypeError, "decoupled must be a bool; got 1"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(loss, wrong, error, message):
    function, _ = functions(loss)
    given = {"logit_scale": 5.0} if loss == "clip_loss" else {}
    rows = [X] * (3 if loss == "unpaired" else 2)
    if loss == "unpaired" and "query_ids" in wrong:
        wrong = {**wrong, "key_ids": IDENTITY}
    with pytest.raises(error, match=message):
        function(*rows, **given, **wrong)


def test_ids_go_together():
    with pytest.raises(ValueError, match="query_ids must be given with key_ids"):
        ssl_fast.info_nce(X, X, key_ids=IDENTITY)
    with pytest.raises(ValueError, match="key_ids must be given with query_ids and negative_keys"):
        ssl_fast.info_nce(X, X, X, query_ids=IDENTITY)
    with pytest.raises(ValueError, match=r"key_ids must have shape \(3,\); got \(4,\)"):
        ssl_fast.info_nce(X, X, X[:3], query_ids=IDENTITY, key_ids=IDENTITY)
    with pytest.raises(ValueError, match="query_ids and key_ids must be None with negative_mode"):
        ssl_fast.info_nce(
            X, X, X[:, None], negative_mode="paired", query_ids=IDENTITY, key_ids=IDENTITY
        )

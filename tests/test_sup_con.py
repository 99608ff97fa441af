"""sup_con and SupConLoss: equal to the plain formula and to what other packages compute."""

from __future__ import annotations

import itertools
import pickle

import plain_losses as plainly
import pytest
import torch
from plain_losses import assert_equals_float64, value_and_gradients
from tolerances import assert_near

import ssl_fast

REDUCTIONS = ["mean", "sum", "none"]
SOME = torch.tensor([0, 1, 1, 2, 0, 0, 3, -4, 3, 2**62, -(2**62), 2**62, 9])
LABELS = {
    "some": SOME,
    "distinct": torch.arange(13),
    "equal": torch.full((13,), 7),
}
KEY_LABELS = torch.tensor([0, 1, 3, 9, 9, 2, -4])
IDS = torch.tensor([0, 0, 5, 0, 6, 6, 7, 5, 8, 9, 9, 5, 10])
GIVEN = [{}, {"label_smoothing": 0.1}, {"margin": 0.2, "hard_negative_beta": 0.5}]
KEY_IDS = torch.tensor([5, 6, 7, 8, 5, 0, 20])
IGNORE = torch.zeros(13, dtype=torch.bool).index_fill_(0, torch.tensor([2, 8]), True)


def arguments_for(features, references=False, dtype=torch.float32, n=13, d=31):
    """Embeddings, temperature, reference embeddings, weights: all but those of a scalar leaf."""
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    return [
        features(n, d, dtype=dtype, requires_grad=True),
        torch.tensor(0.2, dtype=kind, requires_grad=True),
        features(7, d, dtype=dtype, requires_grad=True) if references else None,
    ]


def both(labels, backend, **options):
    """Ours and the plain one as functions of embeddings, temperature, references and weights."""

    def ours(x, temperature, ref_emb=None, row_weight=None):
        keys = {} if ref_emb is None else {"ref_emb": ref_emb, "ref_labels": KEY_LABELS}
        return ssl_fast.sup_con(
            x, labels, temperature, **keys, row_weight=row_weight, **options, backend=backend
        )

    def plain(x, temperature, ref_emb=None, row_weight=None):
        keys = {} if ref_emb is None else {"ref_emb": ref_emb, "ref_labels": KEY_LABELS}
        return plainly.sup_con(x, labels, temperature, **keys, row_weight=row_weight, **options)

    return ours, plain


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_equals_the_plain_formula(backend, features, labels, references, reduction, dtype):
    normalize = reduction != "sum"
    assert_equals_float64(
        *both(labels, backend, reduction=reduction, normalize=normalize),
        arguments_for(features, references, dtype),
        dtype,
    )


@pytest.mark.parametrize("references", [False, True])
def test_options(backend, features, references):
    numbers = [{}, {"label_smoothing": 0.2}, {"decoupled": True}]
    numbers.append({"label_smoothing": 0.1, "decoupled": True})
    numbers += [{"margin": 0.3}, {"hard_negative_beta": 0.7}, {"query_ids": IDS}]
    numbers.append({"margin": 0.2, "hard_negative_beta": 0.5, "label_smoothing": 0.1})
    numbers.append({"decoupled": True, "hard_negative_beta": 1.5, "query_ids": IDS, "margin": 0.1})
    numbers.append({"query_ids": IDS, "label_smoothing": 0.3, "hard_negative_beta": 0.5})
    for labels, given, ignore, weighted in itertools.product(
        (SOME, LABELS["equal"]), numbers, (None, IGNORE), (False, True)
    ):
        inputs = arguments_for(features, references)
        inputs.append((torch.rand(13) + 0.1).requires_grad_() if weighted else None)
        reduction = "none" if given and not weighted else "mean"
        options = {"reduction": reduction, "ignore": ignore, **given}
        if references and "query_ids" in given:
            options["key_ids"] = KEY_IDS
        what = f"{labels.unique().numel()} classes, {options}, weighted {weighted}:"
        assert_equals_float64(*both(labels, backend, **options), inputs, torch.float32, what)


def test_options_in_half(backend, features, dtype):
    options = {"ignore": IGNORE, "label_smoothing": 0.2, "margin": 0.2, "hard_negative_beta": 0.4}
    for references in (False, True):
        inputs = [*arguments_for(features, references, dtype), torch.rand(13)]
        assert_equals_float64(*both(SOME, backend, **options), inputs, dtype)


@pytest.mark.parametrize("references", [False, True])
def test_gradients_in_float64(features, references):
    x, temperature, ref_emb = arguments_for(features, references, torch.float64, 5, 3)
    inputs = [x, temperature, *([ref_emb] if references else [])]
    for reduction, options in itertools.product(REDUCTIONS, GIVEN):
        ours, _ = both(SOME[:5], None, reduction=reduction, **options)
        assert torch.autograd.gradcheck(ours, inputs)
        assert torch.autograd.gradgradcheck(ours, inputs)


def test_equals_pytorch_metric_learning(backend, features):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    inputs = arguments_for(features, True)
    for keys in (None, inputs[2]):
        given = {} if keys is None else {"ref_emb": keys, "ref_labels": KEY_LABELS}
        leaves = [x for x in (inputs[0], keys) if x is not None]
        expected = losses.SupConLoss(0.2)(inputs[0], SOME, **given)
        found = ssl_fast.SupConLoss(0.2, backend=backend)(inputs[0], SOME, **given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves),
            torch.autograd.grad(expected, leaves),
            rtol=1e-4,
            atol=1e-6,
        )


def test_views(backend, features):
    x = features(6, 3, 5, requires_grad=True)
    labels, weight = torch.tensor([0, 1, 0, 2, 3, 1]), torch.rand(6)
    ignore = torch.tensor([False, True, False, False, True, False])
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "backend": backend}
        found = ssl_fast.sup_con(x, labels, row_weight=weight, ignore=ignore, **options)
        each = {"row_weight": weight.repeat_interleave(3), "ignore": ignore.repeat_interleave(3)}
        flat = ssl_fast.sup_con(x.flatten(0, 1), labels.repeat_interleave(3), **each, **options)
        assert found.shape == ((6, 3) if reduction == "none" else ())
        assert torch.equal(found.flatten(), flat.flatten())
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (found, flat)]
        assert torch.equal(*grads)
    # Views of images that all differ are SimCLR's pairs.
    pair = features(6, 2, 5)
    simclr = ssl_fast.nt_xent(pair[:, 0], pair[:, 1], 0.1, backend=backend)
    torch.testing.assert_close(ssl_fast.sup_con(pair, torch.arange(6), backend=backend), simclr)
    one = features(6, 1, 5)
    assert torch.equal(ssl_fast.sup_con(one, labels), ssl_fast.sup_con(one[:, 0], labels))
    rows = ssl_fast.sup_con(one, labels, reduction="none")
    assert torch.equal(rows, ssl_fast.sup_con(one[:, 0], labels, reduction="none")[:, None])


def test_ignored_rows_leak_nowhere(backend, features, dtype):
    x = arguments_for(features, dtype=dtype)[0]
    x.data[IGNORE] = torch.nan
    for reduction, decoupled in itertools.product(REDUCTIONS, [False, True]):
        options = {"reduction": reduction, "decoupled": decoupled, "backend": backend}
        loss, stats = ssl_fast.sup_con(x, SOME, ignore=IGNORE, return_stats=True, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        kept = x.detach()[~IGNORE].requires_grad_()
        expected, others = ssl_fast.sup_con(kept, SOME[~IGNORE], return_stats=True, **options)
        if reduction == "none":
            assert torch.all(loss[IGNORE] == 0.0)
            loss = loss[~IGNORE]
        assert_near(loss, expected, dtype)
        assert_near(grad[~IGNORE], torch.autograd.grad(expected.sum(), kept)[0], dtype)
        assert torch.all(grad[IGNORE] == 0.0)
        torch.testing.assert_close(stats.positive_similarity, others.positive_similarity)
        torch.testing.assert_close(stats.lse[~IGNORE], others.lse)


def test_no_anchor_has_a_positive(backend, features):
    everything = torch.ones(13, dtype=torch.bool)
    for labels, ignore in ((LABELS["distinct"], None), (SOME, everything)):
        for reduction, options in itertools.product(
            REDUCTIONS, [{}, {"decoupled": True}, {"label_smoothing": 0.1}]
        ):
            inputs = arguments_for(features)[:2]
            out = value_and_gradients(
                both(labels, backend, ignore=ignore, reduction=reduction, **options)[0], inputs
            )
            assert all(torch.all(x == 0.0) for x in out)
    # Weights that are all 0 are as good as no anchors.
    inputs = [*arguments_for(features), torch.zeros(13)]
    assert all(torch.all(x == 0.0) for x in value_and_gradients(both(SOME, backend)[0], inputs))


def test_stats(backend, features):
    x, temperature, ref_emb = arguments_for(features, True)
    unit = torch.nn.functional.normalize(x.detach())
    for keys in (None, ref_emb):
        given = {} if keys is None else {"ref_emb": keys, "ref_labels": KEY_LABELS}
        loss, stats = ssl_fast.sup_con(
            x, SOME, temperature, **given, return_stats=True, backend=backend
        )
        torch.testing.assert_close(
            loss, ssl_fast.sup_con(x, SOME, temperature, **given, backend=backend)
        )
        others = unit if keys is None else torch.nn.functional.normalize(keys.detach())
        same = SOME[:, None] == (SOME if keys is None else KEY_LABELS)
        similarity = unit @ others.T
        if keys is None:
            same.fill_diagonal_(False)
            similarity.fill_diagonal_(-torch.inf)
        torch.testing.assert_close(stats.lse, (similarity / 0.2).logsumexp(dim=1))
        has = same.any(dim=1)
        means = torch.where(same, similarity, 0.0).sum(dim=1)[has] / same.sum(dim=1)[has]
        torch.testing.assert_close(stats.positive_similarity, means.mean())
        assert not any(s.requires_grad for s in stats)


def test_gradients_reach_only_what_asks(backend, features):
    given = [x.detach() for x in arguments_for(features, True)]
    for asked in itertools.product([False, True], repeat=3):
        if not any(asked):
            continue
        inputs = [x.clone().requires_grad_(ask) for x, ask in zip(given, asked, strict=True)]
        assert_equals_float64(*both(SOME, backend), inputs, torch.float32)


def test_sharp_temperature(backend, features, dtype):
    """Similarities of 1 and -1 over a temperature of 0.01."""
    x, _, _ = arguments_for(features, dtype=dtype)
    x.data[4], x.data[5], x.data[8] = x.data[0], -x.data[0], -x.data[6]
    inputs = [x, torch.tensor(0.01, requires_grad=True)]
    assert_equals_float64(*both(SOME, backend), inputs, dtype)


def test_zero_rows(backend, features, dtype):
    for references in (False, True):
        inputs = arguments_for(features, references, dtype)
        for x in (inputs[0], inputs[2]):
            if x is not None:
                x.data[::3] = 0.0
        for reduction in REDUCTIONS:
            out = value_and_gradients(both(SOME, backend, reduction=reduction)[0], inputs)
            assert all(torch.isfinite(x).all() for x in out)
            assert torch.all(out[1][::3] == 0.0)


def test_sizes_at_the_edge(backend):
    none = torch.empty(0, dtype=torch.int64)
    for n, reduction in itertools.product((0, 1), REDUCTIONS):
        x = torch.randn(n, 5, requires_grad=True)
        labels = torch.zeros(n, dtype=torch.int64)
        for keys in ({}, {"ref_emb": torch.empty(0, 5), "ref_labels": none}):
            loss = ssl_fast.sup_con(x, labels, **keys, reduction=reduction, backend=backend)
            assert loss.shape == ((n,) if reduction == "none" else ())
            assert torch.all(loss == 0.0)
            assert torch.all(torch.autograd.grad(loss.sum(), x)[0] == 0.0)


def test_layouts(backend, features, dtype):
    big = features(26, 62, dtype=dtype)
    row = features(1, 31, dtype=dtype)
    for x in (big[::2, ::2], big[:13, :31].T.contiguous().T, row.expand(13, 31),
              big[:13, :1].expand(13, 31)):  # fmt: skip
        results = []
        for given in (x, x.clone()):
            leaf = given.detach().requires_grad_()
            loss = ssl_fast.sup_con(leaf, SOME.repeat(2)[::2].roll(3), backend=backend)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
        for a, b in zip(*results, strict=True):
            assert_near(a, b.double(), dtype)


@pytest.mark.parametrize("option", [{}, {"decoupled": True}, {"label_smoothing": 0.1}])
def test_memory_grows_with_the_batch_and_not_its_square(features, option):
    x = features(8192, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.sup_con(x, torch.arange(8192) % 100, **option).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 8192 * 8192 * 4 / 2


def test_module(features):
    x, _, ref_emb = arguments_for(features, True)
    options = {"reduction": "sum", "normalize": False, "label_smoothing": 0.1, "decoupled": True}
    module = ssl_fast.SupConLoss(0.3, **options, backend="reference")
    given = {"ref_emb": ref_emb, "ref_labels": KEY_LABELS, "row_weight": torch.rand(13)}
    expected = ssl_fast.sup_con(x, SOME, 0.3, **given, **options, backend="reference")
    assert torch.equal(module(x, SOME, **given), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, SOME, **given), expected)
    assert "decoupled=True" in repr(module)
    learned = ssl_fast.SupConLoss(torch.nn.Parameter(torch.tensor(0.3)))
    learned(x, SOME).backward()
    assert next(learned.parameters()).grad.abs() > 0.0


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
BAD = [
    ({"embeddings": [1.0]}, TypeError, r"embeddings must be a tensor \[N, D\]; got"),
    ({"embeddings": X.int()}, TypeError, "embeddings must be float32.*int32"),
    ({"embeddings": X[0]}, ValueError, r"embeddings must have shape \[N, D\]; got \(3,\)"),
    ({"embeddings": X[None, None]}, ValueError, r"embeddings must have shape \[N, D\]; got \(1, 1"),
    ({"embeddings": X.bool()[None]}, TypeError, "embeddings must be float32.*bool"),
    (
        {"embeddings": X[:, None][:, :0]},
        ValueError,
        r"embeddings must hold at least one view; got s",
    ),
    ({"labels": None}, TypeError, r"labels must be an int64 tensor \[N\]; got NoneType"),
    ({"labels": Y.int()}, TypeError, "labels must be int64; got torch.int32"),
    ({"labels": Y[:3]}, ValueError, r"labels must have shape \(4,\); got \(3,\)"),
    (
        {"labels": Y.to("meta")},
        ValueError,
        "labels must be on the device of the features, cpu; got",
    ),
    ({"ref_emb": X}, ValueError, "ref_labels must be given: ref_emb and ref_labels go together"),
    ({"ref_labels": Y}, ValueError, "ref_emb must be given: ref_emb and ref_labels go together"),
    ({"ref_emb": X[:, :2], "ref_labels": Y}, ValueError, "ref_emb must have as many components as"),
    (
        {"ref_emb": X.half(), "ref_labels": Y},
        TypeError,
        "ref_emb must have the dtype of embeddings",
    ),
    ({"ref_emb": X[:2], "ref_labels": Y}, ValueError, r"ref_labels must have shape \(2,\); got"),
    ({"row_weight": Y}, TypeError, "row_weight must be floating; got torch.int64"),
    ({"row_weight": X}, ValueError, r"row_weight must have shape \(4,\); got \(4, 3\)"),
    ({"ignore": Y}, TypeError, "ignore must be bool; got torch.int64"),
    ({"ignore": [True] * 4}, TypeError, r"ignore must be a bool tensor \[4\]; got list"),
    ({"temperature": 0}, ValueError, "temperature must be greater than 0; got 0"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\); got -0.1"),
    ({"decoupled": None}, TypeError, "decoupled must be a bool; got None"),
    ({"query_ids": Y[:3]}, ValueError, r"query_ids must have shape \(4,\); got \(3,\)"),
    ({"query_ids": Y.int()}, TypeError, "query_ids must be int64; got torch.int32"),
    ({"key_ids": Y, "query_ids": Y}, ValueError, "key_ids must be None without ref_emb"),
    (
        {"query_ids": Y, "ref_emb": X, "ref_labels": Y},
        ValueError,
        "key_ids must be given with query_ids and ref_emb; got None",
    ),
    ({"margin": float("inf")}, ValueError, "margin must be a finite number; got inf"),
    ({"hard_negative_beta": -1}, ValueError, "hard_negative_beta must be 0 or more; got -1"),
    ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
]


CHOSEN = (
    "temperature", "label_smoothing", "margin", "decoupled", "hard_negative_beta", "reduction",
    "backend",
)  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.sup_con(**{"embeddings": X, "labels": Y, **wrong})
    if next(iter(wrong)) in CHOSEN:
        with pytest.raises(error, match=message):
            ssl_fast.SupConLoss(**wrong)

"""The fused sums of Triton's pair_softmax, beside those by strips, in Triton's interpreter.

Run as interpreted_pair_softmax.py is.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from tolerances import assert_near
from triton_checks import IGNORED_ID, arguments, check_expectation, check_loss

from ssl_fast.backends.triton import launch
from ssl_fast.backends.triton import pair_softmax as triton_backend
from ssl_fast.backends.triton.pair_softmax_fused import fused_products
from ssl_fast.backends.triton.pair_softmax_strips import products_in_strips
from ssl_fast.backends.triton.pair_softmax_sweep import pairs_of
from ssl_fast.backends.triton.pair_softmax_weights import BOTH, MIRROR, ROWS, Weights
from ssl_fast.backends.triton.strips import as_gradient

# numpy warns where a GPU says nothing: log(0) and inf - inf are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 7, 3), (1, 1, 1), (33, 50, 17), (50, 20, 40), (3, 100, 128), (70, 2, 100)]
WANTED = ("want_query", "want_key", "row_moment", "column_moment")


def pairs_and_weights(given, sides, *, largest=1.0):
    """Any weights do, whether or not they are a gradient: of both signs, some rows without."""
    query, key = given[:2]
    generator = torch.Generator().manual_seed(1)
    logits = (query.double() * given[2][:, None]) @ (key.double() * given[3][:, None]).T
    lse = [logits.logsumexp(dim).float() for dim in (1, 0)]
    row, column = (largest * (torch.rand(x.shape, generator=generator) - 0.3) for x in lse)
    row[::5] = 0.0
    pairs = pairs_of(*given[:6], given[6])
    bound = torch.tensor(2.0 * largest)
    columns = () if sides == ROWS else (lse[1], column)
    return pairs, Weights(sides, lse[0], row, *columns, bound=bound)


def exact_products(pairs, weights, matching=False):
    """The sums by their definition in float64."""
    query, key = pairs.query.double(), pairs.key.double()
    query_scale, key_scale = pairs.query_scale.double(), pairs.key_scale.double()
    dots = query @ key.T
    logits = pairs.scale.double() * query_scale[:, None] * dots * key_scale
    kept = torch.ones_like(dots, dtype=torch.bool)
    distance = torch.arange(len(key)) - torch.arange(len(query))[:, None]
    for diagonal in pairs.diagonals:
        kept &= distance != diagonal
    if pairs.query_ids is not None:
        ids = pairs.query_ids[:, None], pairs.key_ids[None, :]
        kept &= (ids[0] == ids[1]) == matching
        kept &= (ids[0] != -(2**63)) & (ids[1] != -(2**63))
    rows = weights.row.double()[:, None] * (logits - weights.row_lse.double()[:, None]).exp()
    total = rows
    if weights.sides != ROWS:
        columns = (logits - weights.column_lse.double()).exp()
        total = rows + weights.column.double() * columns
    total = torch.where(kept, total, 0.0)
    by_row = torch.where(kept, rows, 0.0) if weights.sides == MIRROR else total
    return (
        query_scale[:, None] * (total @ (key_scale[:, None] * key)),
        key_scale[:, None] * (total.T @ (query_scale[:, None] * query)),
        (by_row * key_scale * dots).sum(1),
        (total * query_scale[:, None] * dots).sum(0),
    )


def found_by(products_of, pairs, weights, **wanted):
    """The queries' sums, the keys', and the moments, each None where it is not there."""
    products = products_of(pairs, weights, **wanted)
    sums = [
        None if x is None else as_gradient(x, restore, x)
        for x, restore in (
            (products.query, products.restore_query),
            (products.key, products.restore_key),
        )
    ]
    moments = [x[0] if len(x) else None for x in (products.row_sums, products.column_sums)]
    return (*sums, *moments)


@pytest.mark.parametrize("sides", [ROWS, BOTH], ids=["rows", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(features, shape, sides, dtype, poisoned_memory):
    given = arguments(features, shape, "both", dtype)
    pairs, weights = pairs_and_weights(given, sides)
    exact = exact_products(pairs, weights)
    found = found_by(fused_products, pairs, weights, **dict.fromkeys(WANTED, True))
    for what, x, e in zip(WANTED, found, exact, strict=True):
        assert x.dtype is torch.float32
        # nothing that 16 bits hold enters the moments
        assert_near(x, e, torch.float32 if "moment" in what else dtype, what=what)


@pytest.mark.parametrize("sides", [ROWS, BOTH], ids=["rows", "both"])
def test_each_alone(features, sides, dtype):
    """What isn't asked for isn't there, and changes nothing of the others."""
    pairs, weights = pairs_and_weights(arguments(features, (17, 20, 19), "both", dtype), sides)
    whole = found_by(fused_products, pairs, weights, **dict.fromkeys(WANTED, True))
    for asked in itertools.product([True, False], repeat=4):
        wanted = dict(zip(WANTED, asked, strict=True))
        found = found_by(fused_products, pairs, weights, **wanted)
        for what, x, e, want in zip(WANTED, found, whole, asked, strict=True):
            if not want:
                assert x is None
            elif "moment" in what and dtype is torch.float16:
                # without a product the features stay as they are
                torch.testing.assert_close(x, e, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(x, e)


@pytest.mark.parametrize("n", [1, 33])
def test_mirrored(features, n, dtype):
    """Weights of a symmetric S: the moment is the row term's alone."""
    given = arguments(features, (n, n, 19), "ids", dtype)
    given = [given[0], given[0], given[2], given[2], given[4], given[4], [0, 3, -3]]
    pairs, one_sided = pairs_and_weights(given, ROWS)
    row = one_sided.row.abs()
    weights = Weights(MIRROR, one_sided.row_lse, row, one_sided.row_lse, row, bound=one_sided.bound)
    exact = exact_products(pairs, weights)
    found = found_by(fused_products, pairs, weights, want_query=True, row_moment=True)
    assert_near(found[0], exact[0], dtype)
    assert_near(found[2], exact[2], torch.float32)


@pytest.mark.parametrize("sides", [ROWS, BOTH], ids=["rows", "both"])
def test_splits_and_their_order(features, sides, dtype, monkeypatch):
    """Four splits of six tiles, two for each and none for the last; the same bits each time."""
    pairs, weights = pairs_and_weights(arguments(features, (17, 90, 9), "both", dtype), sides)
    wanted = dict.fromkeys(WANTED, True)
    exact = exact_products(pairs, weights)
    monkeypatch.setattr(launch, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "processor_count", lambda _: 4)
    first, second = (found_by(fused_products, pairs, weights, **wanted) for _ in range(2))
    for what, x, again, e in zip(WANTED, first, second, exact, strict=True):
        assert torch.equal(x, again)
        assert_near(x, e, torch.float32 if "moment" in what else dtype, what=what)


@pytest.mark.parametrize("largest", [1e-7, 1.0, 1e6])
@pytest.mark.parametrize("sides", [ROWS, BOTH], ids=["rows", "both"])
def test_half_has_the_range_for_any_weight(features, sides, largest):
    """Weights and norms that fp16 alone could not hold: as near, in fp32, as ordinary ones."""
    query, key, *rest = arguments(features, (30, 40, 12), "none", torch.float16)
    key = (key.float() * torch.logspace(-3, 3, 40)[:, None]).half()
    key_scale = 1 / key.float().norm(dim=1)
    given = [query, key, rest[0], key_scale, *rest[2:]]
    pairs, weights = pairs_and_weights(given, sides, largest=largest)
    exact = exact_products(pairs, weights)
    found = found_by(fused_products, pairs, weights, **dict.fromkeys(WANTED, True))
    for what, x, e in zip(WANTED, found, exact, strict=True):
        error = (x.double() - e).norm() / e.norm()
        assert error < (1e-5 if "moment" in what else 1e-3), what


def test_small_rows_keep_their_sums_in_half(features):
    """A row's own weight is no part of what is rounded: 1e-9 of the largest is as exact."""
    given = arguments(features, (20, 30, 12), "none", torch.float16)
    given = [*given[:2], torch.ones(20), torch.ones(30), *given[4:]]
    pairs, weights = pairs_and_weights(given, ROWS)
    weights.row[3] = 1e-9
    exact = exact_products(pairs, weights)[0]
    found, *_ = found_by(fused_products, pairs, weights, want_query=True)
    assert ((found - exact).norm(dim=1) <= 1e-3 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3)], ids=str)
@pytest.mark.parametrize("products_of", [fused_products, products_in_strips])
def test_empty(features, shape, products_of, dtype):
    n, m, d = shape
    pairs, _ = pairs_and_weights(arguments(features, (3, 3, d), "none", dtype), ROWS)
    pairs = pairs_of(
        pairs.query[:n].new_zeros(n, d), pairs.key.new_zeros(m, d), torch.ones(n), torch.ones(m),
        None, None, [0],
    )  # fmt: skip
    weights = Weights(BOTH, torch.zeros(n), torch.ones(n), torch.zeros(m), torch.ones(m))
    found = found_by(products_of, pairs, weights, **dict.fromkeys(WANTED, True))
    for x, size in zip(found, [(n, d), (m, d), (n,), (m,)], strict=True):
        assert torch.equal(x, torch.zeros(size))


def test_expectation_in_splits(features, dtype, monkeypatch):
    """Of four splits the second keeps no pair, and the last has none; the same bits each time."""
    given = arguments(features, (17, 90, 9), "both", dtype)
    given[5][32:64] = IGNORED_ID
    monkeypatch.setattr(launch, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "processor_count", lambda _: 4)
    first, second = (check_expectation(given, dtype) for _ in range(2))
    for x, again in zip(first, second, strict=True):
        assert torch.equal(x, again)
    loss = [given[0], None, features(90, 9, dtype=dtype), torch.tensor(7.0)]
    check_loss([*loss, None, None, [0], True], dtype)


def test_expectation_where_the_maximum_grows(features, dtype):
    """Each tile's logits are far above those before: what was summed is scaled down to nothing."""
    query, key = features(1, 8, dtype=dtype), features(48, 8, dtype=dtype)
    query = query.expand(20, 8)
    key = key[(query[:1].float() @ key.float().T).argsort()[0]]
    given = (query, key, torch.ones(20), 100 * torch.ones(48), None, None, [])
    check_expectation(given, dtype)
    check_expectation((query, key.flip(0), *given[2:]), dtype)


def test_half_expects_keys_of_any_norm(features):
    query, key = features(30, 12, dtype=torch.float16), features(40, 12)
    key = (key * torch.logspace(-3, 3, 40)[:, None]).half()
    given = (query, key, torch.ones(30), 1 / key.float().norm(dim=1), None, None, [])
    *_, expected = triton_backend.pair_softmax_expectation(*given)
    unit = given[3].double()[:, None] * key.double()
    exact = (query.double() @ unit.T).softmax(1) @ unit
    assert (expected - exact).norm() < 1e-3 * exact.norm()


def test_deep_features_go_by_strips(features, monkeypatch):
    """Beyond what one chunk holds."""
    from ssl_fast.backends.triton import pair_softmax_losses, pair_softmax_products

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(pair_softmax_products, "fused_products", refuse)
    monkeypatch.setattr(pair_softmax_losses, "expectation", refuse)
    for depth, fused in ((128, True), (129, False)):
        given = [features(4, depth), None, features(4, depth), torch.tensor(2.0)]
        call = (*given, None, None, [0], True, True, False, True)
        if fused:
            with pytest.raises(NotImplementedError):
                triton_backend.pair_softmax_loss(*call)
        else:
            assert triton_backend.pair_softmax_loss(*call)[0].isfinite().all()

"""Greedy choices of k-means++: every backend against the definition, written out in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clusters import all_distances, strided_views
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.ops import plus_plus as op

# (B, N, T, D), candidates for each choice
SHAPES = [
    ((1, 1000, 24, 128), 3), ((2, 500, 8, 64), 4), ((3, 77, 6, 5), 2), ((1, 3000, 64, 200), 8),
    ((9, 130, 12, 60), 3), ((1, 1, 1, 1), 1), ((2, 2, 5, 3), 5), ((1, 65, 7, 1), 2),
    ((1, 1100, 300, 48), 3), ((0, 5, 3, 4), 2),
]  # fmt: skip


def module(name):
    return dispatch.load(name, "plus_plus")


def plus_plus_arguments(shape, dtype=torch.float32, cosine=False, weighted=False, ragged=False):
    """x, x_scale, weight, lengths, drawn, limits, wanted, closest; padding holds NaN."""
    batch, n, t, d = shape
    generator = torch.Generator().manual_seed(n + t)
    x = torch.randn(batch, n, d, generator=generator).to(dtype)
    weight = torch.rand(batch, n, generator=generator) if weighted else None
    lengths = None
    if ragged:
        lengths = torch.randint(1, n + 1, (batch,), generator=generator)
        padding = torch.arange(n) >= lengths[:, None]
        x[padding] = torch.nan
    x_scale = 1.0 / x.float().norm(dim=2) if cosine else None
    ends = n if lengths is None else lengths[:, None]
    drawn = (torch.rand(batch, t, generator=generator) * ends).long()
    distances = all_distances(x, x[:, :1], x_scale, None if x_scale is None else x_scale[:, :1])
    closest = distances[:, :, 0].float().clamp_max(1e30)
    if ragged:
        closest[padding] = 0.0
    coins = torch.rand(batch, t, generator=generator, dtype=torch.float64)
    limits = coins * closest.gather(1, drawn)
    wanted = torch.arange(batch) % 3 + max(1, t // 4)
    return [x, x_scale, weight, lengths, drawn, limits, wanted, closest]


def plain_choices(arguments, each):
    """The definition, one problem after the other: the rows chosen, and what closest becomes."""
    x, x_scale, weight, lengths, drawn, limits, wanted, closest = arguments
    batch, t = drawn.shape
    chosen = torch.full((batch, t // each), -1)
    closest = closest.double()
    for b in range(batch):
        length = x.shape[1] if lengths is None else int(lengths[b])
        u = x[b, :length].double()
        if x_scale is not None:
            u = u * x_scale[b, :length, None].double()
        mass = torch.ones(length).double() if weight is None else weight[b, :length].double()
        near, left = closest[b, :length], list(range(t))
        for made in range(min(t // each, int(wanted[b]))):
            tried = [j for j in left if limits[b, j] <= near[drawn[b, j]]][:each]
            if len(tried) < each:
                break
            left = [j for j in left if j not in tried]
            options = [torch.minimum(near, (u - u[drawn[b, j]]).square().sum(1)) for j in tried]
            potentials = torch.stack([(option * mass).sum() for option in options])
            best = int(potentials.argmin())
            chosen[b, made] = drawn[b, tried[best]]
            near.copy_(options[best])
    return chosen, closest


def assert_right(backend, arguments, each, room=op.ROOM):
    *given, closest = arguments
    exact, near = plain_choices(arguments, each)
    found = closest.clone()
    chosen = module(backend).plus_plus(*given, found, each, room)
    assert torch.equal(chosen, exact)
    assert_near(found, near, torch.float32, what="closest")


@pytest.mark.parametrize(
    "options", [{}, {"cosine": True}, {"weighted": True}, {"ragged": True, "weighted": True}],
    ids=["", "cosine", "weighted", "ragged"],
)  # fmt: skip
@pytest.mark.parametrize(("shape", "each"), SHAPES, ids=str)
def test_choices(backend, dtype, shape, each, options):
    assert_right(backend, plus_plus_arguments(shape, dtype, **options), each)


def test_far_from_the_origin(backend):
    arguments = plus_plus_arguments((2, 400, 24, 70))
    arguments[0] += 100.0
    assert_right(backend, arguments, 3)


def test_strides(backend):
    arguments = plus_plus_arguments((2, 130, 12, 52))
    for view in strided_views(arguments[0]):
        assert_right(backend, [view, *arguments[1:]], 3)
    closest = torch.full((2, 260), torch.nan)[:, ::2]
    closest.copy_(arguments[-1])
    exact, near = plain_choices(arguments, 3)
    chosen = module(backend).plus_plus(*arguments[:-1], closest, 3, op.ROOM)
    assert torch.equal(chosen, exact)
    assert_near(closest, near, torch.float32)


@pytest.mark.parametrize("room", [0, 1, 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_room_the_first_choice_is_made(backend, room, weighted):
    arguments = plus_plus_arguments((2, 900, 24, 65), weighted=weighted)
    if backend == "native":
        exact, _ = plain_choices([*arguments[:6], arguments[6].clamp_max(1), arguments[7]], 3)
        found = arguments[-1].clone()
        chosen = module(backend).plus_plus(*arguments[:-1], found, 3, room)
        assert torch.equal(chosen, exact)
        one = [*arguments[:6], torch.ones(2, dtype=torch.int64), arguments[7]]
        assert_right(backend, one, 3, room)
    else:
        assert_right(backend, arguments, 3, room)


def test_memory_for_the_candidates_at_hand_alone(monkeypatch):
    reference = module("reference")
    monkeypatch.setattr(reference, "_STORE_BYTES", 0)
    assert_right("reference", plus_plus_arguments((3, 77, 6, 5), ragged=True), 2)


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_read_before_it_is_written(backend):
    for shape, each in SHAPES:
        assert_right(backend, plus_plus_arguments(shape, weighted=True), each)


def test_equal_rows_and_no_mass(backend):
    """All distances are 0: choices go on, by the order of the draw."""
    x = torch.ones(1, 50, 60)
    drawn = torch.arange(12)[None] * 3
    closest = torch.zeros(1, 50)
    chosen = module(backend).plus_plus(
        x, None, None, None, drawn, torch.zeros(1, 12).double(), torch.tensor([9]), closest, 4, 99
    )
    assert chosen.tolist() == [[0, 12, 24]]
    assert torch.equal(closest, torch.zeros(1, 50))


def test_same_bits_for_any_number_of_threads(backend):
    for shape, each in [((1, 5000, 96, 64), 4), ((10, 400, 16, 20), 4)]:
        arguments = plus_plus_arguments(shape, weighted=True)
        results = []
        for threads in thread_counts(backend):
            torch.set_num_threads(threads)
            closest = arguments[-1].clone()
            chosen = module(backend).plus_plus(*arguments[:-1], closest, each, op.ROOM)
            results.append((chosen, closest))
        for chosen, closest in results[1:]:
            assert torch.equal(chosen, results[0][0])
            assert torch.equal(closest, results[0][1])


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    batch=st.integers(1, 3), n=st.integers(1, 300), d=st.integers(1, 140), t=st.integers(1, 70),
    each=st.integers(1, 9), weighted=st.booleans(), ragged=st.booleans(),
)  # fmt: skip
def test_any_sizes(backend, batch, n, d, t, each, weighted, ragged):
    each = min(each, t)
    arguments = plus_plus_arguments((batch, n, t, d), weighted=weighted, ragged=ragged)
    # rows drawn twice have equal potentials, of which either may win by rounding: the values agree
    found = arguments[-1].clone()
    chosen = module(backend).plus_plus(*arguments[:-1], found, each, op.ROOM)
    exact, near = plain_choices(arguments, each)
    if torch.equal(chosen, exact):
        assert_near(found, near, torch.float32, what="closest")
        return
    # and after them others may be left, and more or fewer of them
    same = (chosen == exact).cumprod(1).sum(1)
    for one, other, alike in zip(chosen, exact, same.tolist(), strict=True):
        assert alike == len(one) or min(one[alike], other[alike]) >= 0


def test_operator(backend):
    *given, closest = plus_plus_arguments((2, 40, 6, 8), weighted=True)
    arguments = (*given, closest, 2, op.ROOM)
    torch.library.opcheck(
        torch.ops.ssl_fast.plus_plus.default, arguments, {"backend": backend},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_bad_arguments():
    x, *_, drawn, limits, wanted, closest = plus_plus_arguments((2, 9, 4, 3))

    def call(x=x, drawn=drawn, limits=limits, closest=closest, each=2, wanted=wanted, **more):
        return op.plus_plus(x, drawn, limits, closest, each, wanted=wanted, **more)

    for bad in (
        {"x": x[0]}, {"drawn": drawn[0]}, {"each": 0}, {"each": 5}, {"room": -1},
        {"limits": limits.float()}, {"wanted": wanted[:1]}, {"closest": closest.double()},
        {"weight": torch.ones(3)}, {"lengths": torch.ones(2)}, {"x_scale": torch.ones(2, 8)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            call(**bad)
    for place in (-1, 9):
        with pytest.raises(ValueError, match="drawn must be places of rows"):
            call(drawn=torch.full_like(drawn, place), backend="native")
    with pytest.raises(ValueError, match="drawn must be places of rows"):
        call(drawn=torch.full_like(drawn, 5), lengths=torch.tensor([5, 9]), backend="native")

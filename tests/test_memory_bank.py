"""MemoryBank and NTXentLoss with one: a queue in place, safe to fill before the backward."""

from __future__ import annotations

import io
import pickle

import plain as plainly
import pytest
import torch

import ssl_fast


def test_starts_with_random_unit_rows():
    bank = ssl_fast.MemoryBank(64, 9)
    assert bank.keys.shape == (64, 9)
    torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(64))
    assert not torch.equal(bank.keys[0], bank.keys[1])
    assert bank.position.item() == 0
    assert not list(bank.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_enqueue_replaces_the_oldest(dtype):
    """Any batch size, against a list of all rows ever given."""
    bank = ssl_fast.MemoryBank(7, 3, dtype)
    given = [bank.keys.clone()]
    for count in (2, 0, 4, 3, 7, 1, 8, 20, 5):
        rows = torch.randn(count, 3)
        keys = bank.keys
        bank.enqueue(rows)
        assert bank.keys is keys
        given.append(rows.to(dtype))
        newest = torch.cat(given)[-7:]
        place = int(bank.position)
        assert torch.equal(bank.keys.roll(-place, 0), newest)
    assert bank.keys.dtype is dtype


def test_enqueue_takes_no_graph():
    bank = ssl_fast.MemoryBank(7, 3)
    rows = torch.randn(4, 3, requires_grad=True)
    bank.enqueue(rows * 2.0)
    assert not bank.keys.requires_grad
    assert bank.keys.grad_fn is None


def test_enqueue_does_not_wait_for_values():
    """A meta tensor has none: whatever asked for one would raise."""
    bank = ssl_fast.MemoryBank(7, 3).to("meta")
    bank.enqueue(torch.empty(9, 3, device="meta"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"margin": 0.1}, {"hard_negative_beta": 0.5}], ids=str)
def test_enqueue_before_backward(backend, features, reduction, options):
    """The gradient is that of the keys which the forward pass saw."""
    query, positive = (features(13, 9, requires_grad=True) for _ in range(2))
    bank = ssl_fast.MemoryBank(33, 9)
    options = {**options, "reduction": reduction, "backend": backend}
    loss = ssl_fast.info_nce(query, positive, bank.keys.clone(), **options)
    expected = torch.autograd.grad(loss.sum(), (query, positive))
    loss = ssl_fast.info_nce(query, positive, bank.keys, **options)
    bank.enqueue(positive)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), (query, positive)), expected)


def test_is_read_in_place(backend, features):
    """Neither cat nor clone: at most a kernel's packed panels are of the bank's size."""
    if backend == "reference":
        pytest.skip("the reference widens and divides the keys")
    query, positive = (features(8, 128, requires_grad=True) for _ in range(2))
    bank = ssl_fast.MemoryBank(16384, 128)
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.info_nce(query, positive, bank.keys, backend=backend).backward()
    made = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size >= bank.keys.nbytes for size in made) <= 1


def test_state_dict_and_pickle():
    bank = ssl_fast.MemoryBank(7, 3)
    bank.enqueue(torch.randn(5, 3))
    assert set(bank.state_dict()) == {"keys", "position"}
    other = ssl_fast.MemoryBank(7, 3)
    stream = io.BytesIO()
    torch.save(bank.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream))
    copy = pickle.loads(pickle.dumps(bank))
    rows = torch.randn(4, 3)
    for each in (bank, other, copy):
        each.enqueue(rows)
        assert torch.equal(each.keys, bank.keys)
        assert each.position.item() == 2
    assert "size=7, dim=3" in repr(bank)


def plain_with_bank(out0, out1, bank, temperature):
    """What lightly's NTXentLoss gives: out0 against out1, then against the bank."""
    return plainly.info_nce(out0, out1, bank, temperature)


@pytest.mark.parametrize("size", [24, (24, 9)])
def test_nt_xent_loss_with_a_bank(backend, features, size):
    module = ssl_fast.NTXentLoss(0.2, memory_bank_size=size, backend=backend)
    for step in range(4):
        out0, out1 = (features(10, 9, requires_grad=True) for _ in range(2))
        if step == 0:
            module(out0.detach(), out1)  # makes the bank, and gives it nothing
        before = module.memory_bank.keys.clone()
        found = module(out0, out1)
        expected = plain_with_bank(out0, out1, before, 0.2)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, (out0, out1)),
            torch.autograd.grad(expected, (out0, out1)),
            rtol=1e-4,
            atol=1e-6,
        )
        unit = torch.nn.functional.normalize(out1.detach())
        places = (torch.arange(10) + 10 * step) % 24
        torch.testing.assert_close(module.memory_bank.keys[places], unit)
    before = module.memory_bank.keys.clone()
    module(out0.detach(), out1.detach())
    assert torch.equal(module.memory_bank.keys, before)


def test_nt_xent_loss_saves_its_bank(features):
    module = ssl_fast.NTXentLoss(0.2, (24, 9))
    module(features(10, 9, requires_grad=True), features(10, 9))
    assert set(module.state_dict()) == {"memory_bank.keys", "memory_bank.position"}
    other = ssl_fast.NTXentLoss(0.2, (24, 9))
    other.load_state_dict(module.state_dict())
    out0, out1 = features(10, 9), features(10, 9)
    assert torch.equal(other(out0, out1), module(out0, out1))
    assert torch.equal(pickle.loads(pickle.dumps(module))(out0, out1), module(out0, out1))


BAD = [
    ({"size": 0}, ValueError, "size must be a whole number of at least 1; got 0"),
    ({"size": 2.0}, ValueError, "size must be a whole number"),
    ({"dim": -1}, ValueError, "dim must be a whole number of at least 1; got -1"),
    ({"dtype": torch.int64}, TypeError, "dtype must be float32, bfloat16, float16 or float64"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_sizes(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.MemoryBank(**{"size": 4, "dim": 3, **wrong})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[0.0] * 3], TypeError, r"rows must be a floating tensor \[B, 3\]; got list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "rows must be a floating tensor"),
        (torch.zeros(2, 4), ValueError, r"rows must have shape \[B, 3\]; got \(2, 4\)"),
        (torch.zeros(3), ValueError, r"rows must have shape \[B, 3\]; got \(3,\)"),
        (torch.zeros(2, 3, device="meta"), ValueError, "rows must be on the device of the bank"),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.MemoryBank(4, 3).enqueue(rows)

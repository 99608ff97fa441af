"""cached_step: the gradients of the whole batch, whatever the chunks."""

from __future__ import annotations

import copy

import processes
import pytest
import torch
from torch import nn

import ssl_fast.distributed
from ssl_fast.grad_cache import cached_step

SIZES = (1, 3, 4, 11, 64)  # chunks of a batch of 11


def encoder(dropout=0.0, norm=False):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(16))
    return nn.Sequential(*layers).double()


def views():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(11, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def chunked(module, value, size):
    return torch.cat([module(chunk) for chunk in value.split(size)])


def assert_same_gradients(module, other):
    for (name, x), y in zip(module.named_parameters(), other.parameters(), strict=True):
        assert (x.grad is None) is (y.grad is None), name
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_two_views_and_a_learned_temperature(size):
    module, plain = encoder(), encoder()
    loss_fn = ssl_fast.InfoNCE(nn.Parameter(torch.tensor(0.2, dtype=torch.float64)))
    plain_loss_fn = copy.deepcopy(loss_fn)
    loss = cached_step([module, module], views(), loss_fn, size)
    expected = plain_loss_fn(*(plain(x) for x in views()))
    expected.backward()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(module, plain)
    assert_same_gradients(loss_fn, plain_loss_fn)
    # As backward does, a second step adds to the gradient.
    cached_step([module, module], views(), loss_fn, size)
    plain_loss_fn(*(plain(x) for x in views())).backward()
    assert_same_gradients(module, plain)


@pytest.mark.parametrize("size", SIZES)
def test_dropout_draws_the_same_numbers_again(size):
    module, plain = encoder(dropout=0.5), encoder(dropout=0.5)
    torch.manual_seed(5)
    loss = cached_step([module, module], views(), ssl_fast.info_nce, size)
    drawn_next = torch.rand(3)
    torch.manual_seed(5)
    expected = ssl_fast.info_nce(*(chunked(plain, x, size) for x in views()))
    assert torch.equal(drawn_next, torch.rand(3))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(module, plain)


def test_buffers_are_updated_once():
    module, plain = encoder(norm=True), encoder(norm=True)
    nn.utils.parametrizations.spectral_norm(module[0])
    nn.utils.parametrizations.spectral_norm(plain[0])
    plain.load_state_dict(module.state_dict())
    cached_step([module, module], views(), ssl_fast.info_nce, 4)
    ssl_fast.info_nce(*(chunked(plain, x, 4) for x in views())).backward()
    assert_same_gradients(module, plain)
    for x, y in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(x, y)


def test_one_module_with_several_inputs_and_outputs():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = encoder(), encoder(norm=True).eval()

        def forward(self, image, text):
            return self.image(image), self.text(text)

    first, second = views()
    expected = Towers().eval()
    ssl_fast.info_nce(*expected(first, second)).backward()
    for inputs in ((first, second), [first, second], {"text": second, "image": first}):
        module = Towers().eval()
        cached_step(module, inputs, ssl_fast.info_nce, 4)
        assert_same_gradients(module, expected)


def test_a_frozen_encoder_runs_once_and_inputs_get_gradients():
    module, frozen = encoder(), encoder().requires_grad_(False)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    first, second = views()
    first.requires_grad_()
    cached_step([module, frozen], [first, second], ssl_fast.info_nce, 4)
    assert len(calls) == 3
    found, first.grad = first.grad, None
    plain = encoder()
    ssl_fast.info_nce(plain(first), encoder()(second).detach()).backward()
    torch.testing.assert_close(found, first.grad)
    assert_same_gradients(module, plain)


def test_a_loss_of_one_view_leaves_the_other_with_zeros():
    module, other = encoder(), encoder()
    loss = cached_step([module, other], views(), lambda x, _: x.square().mean(), 4)
    assert loss > 0
    assert all(torch.all(x.grad == 0.0) for x in other.parameters())
    assert any(torch.any(x.grad != 0.0) for x in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype):
    module, plain = encoder().float(), encoder().float()
    data = [x.float() for x in views()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype):
        cached_step([module, module], data, ssl_fast.info_nce, 4, scaler=scaler)
        expected = ssl_fast.info_nce(*(plain(x) for x in data))
    scaler.scale(expected).backward()
    for x, y in zip(module.parameters(), plain.parameters(), strict=True):
        assert x.grad is not None
        assert (x.grad - y.grad).norm() <= 0.02 * y.grad.norm()
        assert y.grad.norm() > 1  # which the scale has made it


def test_no_more_than_a_chunk_is_held_in_a_graph():
    alive, most = [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            if x.requires_grad:
                alive[0] += len(x)
            most[0] = max(most[0], alive[0])
            return x.clone()

        @staticmethod
        def backward(_, grad):
            alive[0] -= len(grad)
            return grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return Counted.apply(x @ self.weight)

    data = [x.float() for x in views()]
    net = Net()
    cached_step([net, net], data, ssl_fast.info_nce, 4)
    assert most[0] == 4
    assert alive[0] == 0


X = torch.zeros(4, 6, dtype=torch.float64)
BAD = [
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int; got 2.0"),
    ({"inputs": [X]}, ValueError, "inputs must be one per encoder, 2; got 1"),
    ({"inputs": X}, ValueError, "inputs must be one per encoder, 2; got Tensor"),
    ({"inputs": [X, "text"]}, TypeError, r"inputs\[1\] must be a tensor, or a tuple.*got str"),
    ({"inputs": [X, (X, 3)]}, TypeError, r"inputs\[1\] must hold tensors with a batch dim.*got 3"),
    ({"inputs": [{"a": X, "b": X[:3]}, X]}, ValueError, r"inputs\[0\] must hold .* one batch size"),
    ({"encoders": [3, 4]}, TypeError, "encoders must be modules; got int"),
    ({"encoders": [lambda x: x.sum()] * 2}, ValueError, r"encoders must give .* 4 rows.*got \(\)"),
    ({"loss_fn": lambda x, y: x + y}, ValueError, "loss_fn must give a scalar tensor; got"),
    ({"loss_fn": lambda *_: None}, ValueError, "loss_fn must give a scalar tensor; got NoneType"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    good = {
        "encoders": [encoder(), encoder()],
        "inputs": [X, X],
        "loss_fn": ssl_fast.info_nce,
        "chunk_size": 4,
    }
    with pytest.raises(error, match=message):
        cached_step(**{**good, **wrong})


def _distributed(rank, world_size):
    """DistributedDataParallel with uneven shares: the average is one process's gradient."""
    sizes = [7, 4]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    module = nn.parallel.DistributedDataParallel(encoder())
    reductions = []

    def hook(state, bucket):
        reductions.append(1)
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        return default_hooks.allreduce_hook(state, bucket)

    module.register_comm_hook(None, hook)

    def loss_fn(first, second):
        return ssl_fast.distributed.info_nce(first, second, sizes=sizes)

    share = [x[mine] for x in views()]
    loss = cached_step([module, module], share, loss_fn, 2)
    plain = encoder()
    expected = ssl_fast.info_nce(*(plain(x) for x in views()))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(module.module, plain)
    assert len(reductions) == 1


def test_distributed_data_parallel():
    processes.run(_distributed, 2)

"""The reconstruction losses in models over several processes: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ssl_fast

ROWS, SIZE, HIDDEN = 12, 24, 8


class Autoencoder(nn.Module):
    """A model whose forward pass is its loss, so that the wrappers see all of its parameters."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.encoder = nn.Linear(SIZE, 2 * HIDDEN)
        self.decoder = nn.Linear(2 * HIDDEN, SIZE)
        if name.startswith("linear"):
            self.decoder = ssl_fast.LinearReconstructionLoss(
                2 * HIDDEN, SIZE, kind="bce" if name == "linear bce" else "mse"
            )

    def forward(self, x):
        h = self.encoder(x)
        if self.name.startswith("linear"):
            return self.decoder(torch.tanh(h), x)
        if self.name == "vae":
            mu, logvar = h.chunk(2, dim=1)
            decoded = self.decoder(torch.cat([mu, mu + logvar.mul(0.5).exp()], 1))
            return ssl_fast.vae_loss(decoded, x, mu, logvar, beta=0.5).loss
        decoded = self.decoder(torch.tanh(h))
        if self.name == "mae":
            patches = decoded.view(len(x), 4, SIZE // 4)
            mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(len(x), 4)
            return ssl_fast.mae_loss(patches, x.view_as(patches), mask)
        return ssl_fast.reconstruction_loss(decoded, x, self.name)


MODELS = ("mse", "bce_with_logits", "linear mse", "linear bce", "vae", "mae")


def trained(model, batches, wrapper=lambda model: model):
    """The loss before each of three steps, and the parameters after the last."""
    wrapped = wrapper(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = wrapped(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters = [getattr(p, "full_tensor", p.detach)().clone() for p in wrapped.parameters()]
    return torch.stack(losses), parameters


def model_of(name):
    torch.manual_seed(3)
    return Autoencoder(name)


def _trains_as_one(rank, world_size, wrapper):
    batches = torch.rand(3, ROWS, SIZE, generator=torch.Generator().manual_seed(0))
    wrap = DistributedDataParallel
    if wrapper == "fully_shard":
        mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))

        def wrap(model):
            for part in (model.encoder, model.decoder, model):
                fully_shard(part, mesh=mesh)
            return model

    for name in MODELS:
        expected = trained(model_of(name), batches)
        shares = batches.chunk(world_size, dim=1)[rank]
        losses, parameters = trained(model_of(name), shares, wrap)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / world_size, expected[0], msg=f"{name}: loss")
        for found, exact in zip(parameters, expected[1], strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6, msg=f"{name}: parameter")


@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_equals_one_process(world_size, wrapper):
    processes.run(_trains_as_one, world_size, wrapper)


def _adds_l2_sp(rank, world_size):
    """l2_sp after backward, into gradients that DistributedDataParallel has averaged."""
    batches = torch.rand(2, ROWS, SIZE, generator=torch.Generator().manual_seed(0))
    grads = []
    for wrap, share in ((lambda m: m, batches[0]), (DistributedDataParallel, None)):
        model = wrap(model_of("mse"))
        anchors = [p.detach() + 0.1 for p in model.parameters()]
        model(batches[0].chunk(world_size)[rank] if share is None else share).backward()
        value = ssl_fast.l2_sp(model.parameters(), anchors, 0.25, accumulate=True)
        grads.append([value, *(p.grad for p in model.parameters())])
    for one, several in zip(*grads, strict=True):
        torch.testing.assert_close(several, one)


def test_l2_sp_into_averaged_gradients():
    processes.run(_adds_l2_sp, 2)

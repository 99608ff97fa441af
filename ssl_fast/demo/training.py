"""Contrastive pretraining: the loop in which only the loss function changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_fast.demo.data import random_view
from ssl_fast.demo.encoder import Encoder, new_encoder
from ssl_fast.demo.extras import require

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4

# (z0 [N, D], z1 [N, D]) -> scalar
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pretrained:
    """What one pretraining run leaves."""

    encoder: Encoder
    losses: list[float]  # mean loss of each epoch


def pretrain(
    loss: Loss, images: Tensor, *, epochs: int, batch_size: int, seed: int, label: str
) -> Pretrained:
    """Pretrain a fresh encoder on ``images`` [N, 1, 8, 8], showing a progress bar.

    Weights, batches and views depend on ``seed`` alone, so that two losses see the same data.
    """
    encoder = new_encoder(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, images.shape[0])
    steps = images.shape[0] // batch_size
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.1
    )
    encoder.train()
    losses = []
    with require("tqdm").tqdm(total=epochs, desc=label, unit="epoch") as progress:
        for _ in range(epochs):
            order = torch.randperm(images.shape[0], generator=generator)
            total = 0.0
            for batch in order[: steps * batch_size].view(steps, batch_size):
                first = random_view(images[batch], generator)
                second = random_view(images[batch], generator)
                # Both views pass as one batch: the batch norm then sees the same statistics.
                z0, z1 = encoder.project(torch.cat([first, second])).chunk(2)
                value = loss(z0, z1)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(value)
                optimizer.step()
                schedule.step()
                total += value.item()
            losses.append(total / steps)
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            progress.update()
    return Pretrained(encoder, losses)

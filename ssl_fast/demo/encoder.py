"""The small convolutional encoder that the demo pretrains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES = 128
EMBEDDING = 64


class Encoder(nn.Module):
    """Images [N, 1, 8, 8] to features [N, 128]; ``project`` gives what the loss sees, [N, 64].

    As in SimCLR, the loss is taken behind a projector and the probe before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(1, 32, stride=1),
            *_block(32, 64, stride=2),
            *_block(64, FEATURES, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, EMBEDDING)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features for the probe, [N, 128]."""
        features: Tensor = self.trunk(images)
        return features

    def project(self, images: Tensor) -> Tensor:
        """Embeddings for the loss, [N, 64]."""
        embeddings: Tensor = self.projector(self.trunk(images))
        return embeddings


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def new_encoder(seed: int) -> Encoder:
    """An untrained encoder whose weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder()


@torch.no_grad()
def features_of(encoder: Encoder, images: Tensor) -> Tensor:
    """Features [N, 128] with batch statistics frozen; the encoder's mode is left as it was."""
    return _frozen(encoder, encoder.forward, images)


@torch.no_grad()
def embeddings_of(encoder: Encoder, images: Tensor) -> Tensor:
    """Embeddings [N, 64], as ``features_of``."""
    return _frozen(encoder, encoder.project, images)


def _frozen(encoder: Encoder, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    training = encoder.training
    encoder.eval()
    found = call(images)
    encoder.train(training)
    return found

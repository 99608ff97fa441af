"""Two small autoencoders: of digits as vectors, and of images as patches, most of them hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_fast import LinearReconstructionLoss, mae_loss
from ssl_fast.demo.scaling import OURS

PIXELS, CODE = 64, 32
WIDTH, HEADS, DEPTH = 64, 4, 2


class Autoencoder(nn.Module):
    """Digits [N, 64] to codes [N, 32] and back; binary cross-entropy of the pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, CODE), nn.ReLU())
        self.decoder = LinearReconstructionLoss(CODE, PIXELS, kind="bce_with_logits")

    def forward(self, images: Tensor) -> Tensor:
        """Codes [N, 32] of images [N, 1, 8, 8]."""
        codes: Tensor = self.encoder(images.flatten(1))
        return codes

    def logits(self, codes: Tensor) -> Tensor:
        """The reconstruction before its sigmoid, [N, 64]."""
        return F.linear(codes, self.decoder.weight, self.decoder.bias)

    def loss(self, images: Tensor, side: str) -> Tensor:
        """ssl_fast's never stores the reconstruction, torch's does."""
        codes, target = self(images), images.flatten(1)
        if side == OURS:
            found: Tensor = self.decoder(codes, target)
            return found
        return F.binary_cross_entropy_with_logits(self.logits(codes), target)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images of the same shape, in (0, 1)."""
        return self.logits(self(images)).sigmoid().view_as(images)


class Grid(NamedTuple):
    """How images are cut into patches."""

    channels: int
    size: int  # of a side of an image, in pixels
    patch: int  # of a side of a patch

    @property
    def length(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2

    @property
    def elements(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch**2

    def patches(self, images: Tensor) -> Tensor:
        """[N, L, P], the elements of a patch in the order (row, column, channel)."""
        side = self.size // self.patch
        cut = images.view(-1, self.channels, side, self.patch, side, self.patch)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, self.length, self.elements)

    def images(self, patches: Tensor) -> Tensor:
        """What ``patches`` has cut, together again, [N, C, H, W]."""
        side = self.size // self.patch
        cut = patches.view(-1, side, side, self.patch, self.patch, self.channels)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, self.size, self.size)


def _blocks(depth: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


class MaskedAutoencoder(nn.Module):
    """He et al. (arXiv:2111.06377) at a small size: the encoder sees the patches that are left."""

    def __init__(self, grid: Grid, hidden: float, *, norm_pix_loss: bool) -> None:
        super().__init__()
        self.grid, self.norm_pix_loss = grid, norm_pix_loss
        self.kept = grid.length - round(hidden * grid.length)
        self.embed = nn.Linear(grid.elements, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(grid.length, WIDTH))
        self.encoder = _blocks(DEPTH)
        self.hidden = nn.Parameter(torch.zeros(WIDTH))
        self.decoder_places = nn.Parameter(0.02 * torch.randn(grid.length, WIDTH))
        self.decoder = _blocks(1)
        self.predict = nn.Linear(WIDTH, grid.elements)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What a classifier takes over."""
        return [*self.embed.parameters(), self.places, *self.encoder.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [N, L, 64] of the patches of whole images."""
        tokens = self.embed(self.grid.patches(images)) + self.places
        encoded: Tensor = self.encoder(tokens)
        return encoded

    def predictions(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches [N, L, P] from those that are left, and the mask [N, L], 1 for the hidden."""
        count, length = len(images), self.grid.length
        order = torch.rand(count, length, generator=generator).argsort(1)
        left = order[:, : self.kept].sort(1).values.unsqueeze(2)
        tokens = self.embed(self.grid.patches(images)) + self.places
        seen = self.encoder(tokens.gather(1, left.expand(-1, -1, WIDTH)))
        full = self.hidden.expand(count, length, WIDTH)
        full = full.scatter(1, left.expand(-1, -1, WIDTH), seen)
        predicted: Tensor = self.predict(self.decoder(full + self.decoder_places))
        mask = torch.ones(count, length).scatter_(1, left.squeeze(2), 0.0)
        return predicted, mask

    def loss(self, images: Tensor, side: str, generator: torch.Generator) -> Tensor:
        """ssl_fast's reads the images in place and the hidden patches alone."""
        predicted, mask = self.predictions(images, generator)
        if side == OURS:
            return mae_loss(
                predicted, images, mask,
                norm_pix_loss=self.norm_pix_loss, patch_size=self.grid.patch,
            )  # fmt: skip
        target = self.grid.patches(images)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return ((predicted - target).square().mean(2) * mask).sum() / mask.sum()

    def fill(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images with their hidden patches gray, and with these predicted."""
        predicted, mask = self.predictions(images, generator)
        patches, hidden = self.grid.patches(images), mask.unsqueeze(2) > 0
        if self.norm_pix_loss:
            # Patches are predicted without mean and deviation, which are lent to them.
            variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        shown = torch.where(hidden, 0.5, patches)
        filled = torch.where(hidden, predicted.clamp(0.0, 1.0), patches)
        return self.grid.images(shown), self.grid.images(filled)

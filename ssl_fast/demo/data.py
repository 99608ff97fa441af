"""scikit-learn's digits, and the random views that a contrastive loss compares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.demo.extras import require

CLASSES = 10

# How far one view may stray from the image. 8x8 digits survive one pixel and some twenty degrees;
# mirroring would turn one digit into another.
MAX_SHIFT_PIXELS = 1.0
MAX_ROTATION_DEGREES = 25.0
SCALE_RANGE = (0.8, 1.2)
NOISE = 0.15


@dataclass(frozen=True)
class Digits:
    """1797 images of handwritten digits, split once: the test images are never trained on."""

    train_images: Tensor  # [N, 1, 8, 8] in [0, 1]
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [T, 1, 8, 8]
    test_labels: Tensor  # [T] int64


def load_digits(test_fraction: float = 0.3) -> Digits:
    """Load the digits with a fixed, class-balanced split (independent of the training seed)."""
    bunch = require("sklearn.datasets").load_digits()
    split = require("sklearn.model_selection").train_test_split
    train_x, test_x, train_y, test_y = split(
        bunch.images, bunch.target, test_size=test_fraction, random_state=0, stratify=bunch.target
    )

    def images(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).unsqueeze(1) / 16.0

    return Digits(
        images(train_x),
        torch.as_tensor(train_y, dtype=torch.int64),
        images(test_x),
        torch.as_tensor(test_y, dtype=torch.int64),
    )


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A shifted, rotated, scaled and noisy copy of every image, each with its own draw.

    images: [N, 1, H, W]; the result has the same shape.
    """
    count, _, _, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle = uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES) * (math.pi / 180.0)
    zoom = 1.0 / uniform(*SCALE_RANGE)
    # affine_grid counts in half image widths.
    reach = 2.0 * MAX_SHIFT_PIXELS / width
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    rows = torch.stack(
        [cos, -sin, uniform(-reach, reach), sin, cos, uniform(-reach, reach)], dim=1
    )  # [N, 6]
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)

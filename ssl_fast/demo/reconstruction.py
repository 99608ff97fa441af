"""The demo's second step: autoencoders of digits and photographs, and what they are good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_fast import l2_sp
from ssl_fast.demo.autoencoders import WIDTH, Autoencoder, Grid, MaskedAutoencoder
from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.evaluation import few_labels, score_features
from ssl_fast.demo.extras import require
from ssl_fast.demo.scaling import OURS, PLAIN

if TYPE_CHECKING:
    from ssl_fast.demo.data import Digits
    from ssl_fast.demo.evaluation import Scores

DIGITS = Grid(channels=1, size=8, patch=2)
PHOTOGRAPHS = Grid(channels=3, size=32, patch=8)
HIDDEN_DIGITS, HIDDEN_PHOTOGRAPHS = 0.5, 0.75
BATCH = 128
CROPS = 512
SHOWN = 6
PER_CLASS = 10
PIXELS, AUTOENCODER, MASKED = "raw pixels", "autoencoder", "masked autoencoder"
CROPPED = "masked, photographs"
SCRATCH, TUNED, TUNED_SP = "from scratch", "pretrained", "pretrained + l2_sp"
# The best of 0.01, 0.03, 0.1, 0.3, 1 and 3 for other draws of labels, but by the same test images.
L2_SP = 0.1
# Epochs that plain torch trains too, to compare the losses.
COMPARED = 5
TUNING_STEPS, TUNING_RATE = 60, 1e-3

Loss = Callable[[Tensor, str, torch.Generator], Tensor]


@dataclass(frozen=True)
class Tuning:
    """Test accuracies of one start, one for each draw of labels, in [0, 1]."""

    start: str
    accuracies: list[float]


@dataclass(frozen=True)
class Reconstructions:
    """What the second step found. Losses by model and side, one for each epoch."""

    losses: dict[str, dict[str, list[float]]]
    scores: dict[str, Scores]  # keys: PIXELS, AUTOENCODER, MASKED
    tunings: list[Tuning]
    coded: tuple[Tensor, Tensor]  # digits, and what the codes make of them [SHOWN, 1, 8, 8]
    filled_digits: tuple[Tensor, Tensor, Tensor]  # whole, hidden, filled [SHOWN, 1, 8, 8]
    filled_photographs: tuple[Tensor, Tensor, Tensor]  # [SHOWN, 3, 32, 32]


def crops(count: int, seed: int) -> Tensor:
    """Random squares of scikit-learn's two photographs, [count, 3, 32, 32] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    photographs = [
        torch.tensor(pixels) for pixels in require("sklearn.datasets").load_sample_images().images
    ]
    size, found = PHOTOGRAPHS.size, []
    for number in range(count):
        pixels = photographs[number % len(photographs)]
        height, width = (int(n) - size + 1 for n in pixels.shape[:2])
        y = int(torch.randint(height, (), generator=generator))
        x = int(torch.randint(width, (), generator=generator))
        found.append(pixels[y : y + size, x : x + size])
    return torch.stack(found).permute(0, 3, 1, 2).float().div_(255.0).contiguous()


def train(
    model: nn.Module, loss: Loss, images: Tensor, *, side: str, epochs: int, seed: int, name: str
) -> list[float]:
    """The mean loss of each epoch; batches and masks depend on ``seed`` alone."""
    planned, epochs = epochs, min(epochs, COMPARED) if side == PLAIN else epochs
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=planned * steps, pct_start=0.1
    )
    losses = []
    with require("tqdm").tqdm(total=epochs, desc=f"{name}, {side}", unit="epoch") as progress:
        for _ in range(epochs):
            order, total = torch.randperm(len(images), generator=generator), 0.0
            for batch in order[: steps * BATCH].chunk(steps):
                value = loss(images[batch], side, generator)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(value)
                optimizer.step()
                schedule.step()
                total += value.item()
            losses.append(total / steps)
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            progress.update()
    return losses


def fine_tune(
    pretrained: MaskedAutoencoder | None, digits: Digits, labelled: Tensor, *, sp: float, seed: int
) -> float:
    """The test accuracy of a linear head on the mean token of an encoder, both trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _masked_digits()
        head = nn.Linear(WIDTH, CLASSES)
    if pretrained is not None:
        model.load_state_dict(pretrained.state_dict())
    taken = model.encoder_parameters()
    anchors = [parameter.detach().clone() for parameter in taken]
    optimizer = torch.optim.AdamW([*taken, *head.parameters()], lr=TUNING_RATE)
    images, labels = digits.train_images[labelled], digits.train_labels[labelled]
    for _ in range(TUNING_STEPS):
        optimizer.zero_grad(set_to_none=True)
        value = F.cross_entropy(head(model(images).mean(1)), labels)
        if sp:
            value = value + l2_sp(taken, anchors, sp)
        torch.autograd.backward(value)
        optimizer.step()
    with torch.no_grad():
        right = head(model(digits.test_images).mean(1)).argmax(1) == digits.test_labels
    return float(right.float().mean())


def _masked_digits() -> MaskedAutoencoder:
    # Patches of 2 x 2 pixels are often of one shade: their deviation is no scale.
    return MaskedAutoencoder(DIGITS, HIDDEN_DIGITS, norm_pix_loss=False)


def _masked_photographs() -> MaskedAutoencoder:
    return MaskedAutoencoder(PHOTOGRAPHS, HIDDEN_PHOTOGRAPHS, norm_pix_loss=True)


def _new(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def collect(digits: Digits, *, epochs: int, draws: int, seed: int) -> Reconstructions:
    """Train the autoencoders on both sides, score their features, and fine-tune from few labels."""
    images, photographs = digits.train_images, crops(CROPS, seed)
    losses: dict[str, dict[str, list[float]]] = {}
    trained: dict[str, Any] = {}
    kinds: dict[str, tuple[Callable[[], Any], Tensor, int]] = {
        AUTOENCODER: (Autoencoder, images, 2 * epochs),
        MASKED: (_masked_digits, images, epochs),
        CROPPED: (_masked_photographs, photographs, max(1, epochs // 2)),
    }
    for name, (make, data, rounds) in kinds.items():
        losses[name] = {}
        for side in (PLAIN, OURS):
            model = _new(make, seed)
            losses[name][side] = train(
                model, _loss_of(model), data, side=side, epochs=rounds, seed=seed, name=name
            )
            trained[name] = model
    print("scoring and fine-tuning ...", flush=True)
    labelled = few_labels(digits.train_labels, PER_CLASS, seed)
    with torch.no_grad():
        scores = {
            name: score_features(
                features(images[labelled]), digits.train_labels[labelled],
                features(digits.test_images), digits.test_labels,
            )
            for name, features in (
                (PIXELS, lambda x: x.flatten(1)),
                (AUTOENCODER, trained[AUTOENCODER]),
                (MASKED, lambda x: trained[MASKED](x).flatten(1)),
            )
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        shown, squares = digits.test_images[:SHOWN], crops(SHOWN, seed + 1)
        coded = (shown, trained[AUTOENCODER].reconstruct(shown))
        filled_digits = (shown, *trained[MASKED].fill(shown, generator))
        filled_photographs = (squares, *trained[CROPPED].fill(squares, generator))
    masked = trained[MASKED]
    starts = ((SCRATCH, None, 0.0), (TUNED, masked, 0.0), (TUNED_SP, masked, L2_SP))
    chosen = [few_labels(digits.train_labels, PER_CLASS, seed + draw) for draw in range(draws)]
    tunings = [
        Tuning(
            start,
            [
                fine_tune(model, digits, labels, sp=sp, seed=seed + draw)
                for draw, labels in enumerate(chosen)
            ],
        )
        for start, model, sp in starts
    ]
    return Reconstructions(losses, scores, tunings, coded, filled_digits, filled_photographs)


def _loss_of(model: Any) -> Loss:
    if isinstance(model, MaskedAutoencoder):
        return model.loss
    return lambda images, side, _: model.loss(images, side)

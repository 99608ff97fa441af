"""The demo's one command: pretrain twice, score, cluster, measure, reconstruct, print and draw."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ssl_fast.demo import (
    clustering,
    data,
    encoder,
    evaluation,
    extras,
    picture,
    reconstruction,
    reconstruction_picture,
    scaling,
    tables,
    training,
)
from ssl_fast.demo.clustering import EMBEDDINGS, PIXELS
from ssl_fast.demo.evaluation import Scores
from ssl_fast.demo.results import UNTRAINED, Results
from ssl_fast.demo.scaling import OURS, PLAIN

TEMPERATURE = 0.2
LABELS_PER_CLASS = 10
PROBE_DRAWS = 5
BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_BATCHES = (256, 512, 1024)
# Measuring time against batch size stops growing here, so that all ends within three minutes.
SCALING_SECONDS = 60.0
QUICK_SCALING_SECONDS = 15.0
QUICK_EPOCHS = 5
# Of the masked autoencoder of digits; half as many for photographs, twice as many for vectors.
RECONSTRUCTION_EPOCHS, QUICK_RECONSTRUCTION_EPOCHS = 40, 2
DRAWS, QUICK_DRAWS = 5, 1


@dataclass(frozen=True)
class Settings:
    """The command's arguments, checked."""

    epochs: int
    batch_size: int
    seed: int
    out: Path
    batches: tuple[int, ...] = BATCHES
    scaling_seconds: float = SCALING_SECONDS
    reconstruction_epochs: int = RECONSTRUCTION_EPOCHS
    draws: int = DRAWS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--epochs", type=_positive, default=80, help="pretraining epochs")
    parser.add_argument("--batch-size", type=_batch, default=256, help="images in a batch")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and views")
    parser.add_argument(
        "--out", type=Path, default=Path("ssl_fast_demo.png"), help="where the picture goes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs and small batches: seconds, not minutes"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo as parsed; the exit status."""
    try:
        extras.require_all()
    except extras.MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out: Path = options.out
    # Found now rather than after two minutes of work.
    if not out.parent.is_dir():
        print(f"error: --out: there is no folder {out.parent}", file=sys.stderr)
        return 2
    if out.suffix.lower() not in picture.SUFFIXES:
        expected = ", ".join(sorted(picture.SUFFIXES))
        print(f"error: --out: expected a file ending in {expected}, got {out}", file=sys.stderr)
        return 2
    settings = Settings(options.epochs, options.batch_size, options.seed, out)
    if options.quick:
        settings = Settings(
            min(options.epochs, QUICK_EPOCHS), options.batch_size, options.seed, out,
            QUICK_BATCHES, QUICK_SCALING_SECONDS, QUICK_RECONSTRUCTION_EPOCHS, QUICK_DRAWS,
        )  # fmt: skip
    start = time.perf_counter()
    digits = data.load_digits()
    results = collect(settings, digits)
    print(tables.render(results))
    picture.draw(results, out)
    print(f"\nsecond step: autoencoders of digits and of {reconstruction.CROPS} photograph squares")
    found = reconstruction.collect(
        digits, epochs=settings.reconstruction_epochs, draws=settings.draws, seed=settings.seed
    )
    print(tables.render_reconstructions(found))
    second = out.with_stem(f"{out.stem}_reconstruction")
    reconstruction_picture.draw(found, second)
    print(f"\npictures: {out}, {second}   ({time.perf_counter() - start:.0f} s in all)")
    return 0


def collect(settings: Settings, digits: data.Digits) -> Results:
    """Pretrain on both sides, score, cluster, and measure time and memory."""
    print(
        f"digits: {len(digits.train_images)} images to pretrain on without labels, "
        f"{len(digits.test_images)} to test; {torch.get_num_threads()} threads"
    )
    runs = {
        side: training.pretrain(
            partial(scaling.loss_of, side, temperature=TEMPERATURE),
            digits.train_images,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            label=f"pretraining, {side}",
        )
        for side in (PLAIN, OURS)
    }
    untrained = encoder.new_encoder(settings.seed)
    encoders = {UNTRAINED: untrained} | {side: runs[side].encoder for side in runs}
    print("scoring the features ...", flush=True)
    scores = {name: _mean_score(model, digits, settings.seed) for name, model in encoders.items()}
    before, after = (
        evaluation.map_to_plane(encoder.features_of(model, digits.test_images), settings.seed)
        for model in (untrained, runs[OURS].encoder)
    )
    print("clustering the train images ...", flush=True)
    spaces = {
        PIXELS: digits.train_images.flatten(1),
        EMBEDDINGS: encoder.embeddings_of(runs[OURS].encoder, digits.train_images),
    }
    clusterings = {
        space: clustering.compare(x, digits.train_labels, settings.seed)
        for space, x in spaces.items()
    }
    sizes = scaling.measure(settings.batches, seconds=settings.scaling_seconds)
    bar = extras.require("tqdm").tqdm(
        sizes, total=len(settings.batches), desc="time and memory by batch size", unit="size"
    )
    return Results(
        scores=scores,
        losses={side: run.losses for side, run in runs.items()},
        before=before,
        after=after,
        test_labels=digits.test_labels,
        clusterings=clusterings,
        portraits=clustering.portraits(
            digits.train_images, clusterings[EMBEDDINGS].labels, digits.train_labels
        ),
        points=list(bar),
        labels_per_class=LABELS_PER_CLASS,
        threads=torch.get_num_threads(),
    )


def _mean_score(model: encoder.Encoder, digits: data.Digits, seed: int) -> Scores:
    # A hundred labels are few: which ones were drawn would decide a percent.
    draws = [
        evaluation.score(
            model,
            digits,
            evaluation.few_labels(digits.train_labels, LABELS_PER_CLASS, seed + draw),
        )
        for draw in range(PROBE_DRAWS)
    ]
    return Scores(
        sum(draw.probe for draw in draws) / len(draws),
        sum(draw.neighbours for draw in draws) / len(draws),
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _batch(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(
            f"expected at least 2 (a contrastive loss needs negatives), got {value}"
        )
    return value

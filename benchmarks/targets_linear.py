"""What a decoder's last layer with its loss must reach: the FMA peak, and no output in memory."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

import ssl_fast
from benchmarks import memory, timing
from benchmarks.ceilings import fma_peak
from benchmarks.figures import PEAK_SECONDS, SECONDS_PER_GROUP, Figure, ratio
from benchmarks.targets_reconstruction import compiled
from ssl_fast.demo.memory import peak_extra_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

OURS, EAGER, COMPILED, PRODUCTS = "ssl_fast", "eager torch", "torch.compile", "three products"
PLAIN = {"mse": F.mse_loss, "bce_with_logits": F.binary_cross_entropy_with_logits}
# Of the loss and of the weight's gradient, relative.
SAME = {"float32": 2e-5, "bfloat16": 2e-2}


class Layer(NamedTuple):
    """A linear layer and its loss."""

    kind: str
    rows: int
    hidden: int
    outputs: int
    dtype: str
    share: float  # of the FMA peak, in %
    extra: float | None  # MiB beyond the gradients

    @property
    def label(self) -> str:
        return f"Linear({self.hidden}->{self.outputs}) {self.kind} {self.dtype}, batch {self.rows}"

    @property
    def flops(self) -> float:
        return 6.0 * self.rows * self.hidden * self.outputs

    def inputs(self) -> list[Tensor]:
        """Input, weight and bias, which learn, and the target."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        x = torch.randn(self.rows, self.hidden, generator=generator).to(dtype)
        w = torch.randn(self.outputs, self.hidden, generator=generator) / self.hidden**0.5
        w = w.to(dtype)
        b = torch.zeros(self.outputs, dtype=dtype)
        t = torch.rand(self.rows, self.outputs, generator=generator).to(dtype)
        return [*(v.requires_grad_() for v in (x, w, b)), t]


def ours(layer: Layer) -> Callable[..., Tensor]:
    """The loss from one sweep."""

    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return ssl_fast.linear_reconstruction_loss(x, w, t, linear_bias=b, kind=layer.kind)

    return loss


def plain(layer: Layer) -> Callable[..., Tensor]:
    """The loss by way of the output."""

    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        found: Tensor = PLAIN[layer.kind](F.linear(x, w, b), t)
        return found

    return loss


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], tuple[Any, ...]]:
    """Forward and backward."""

    def run() -> tuple[Any, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:3])

    return run


def three_products(inputs: list[Tensor]) -> Callable[[], object]:
    """What torch's library takes for the products alone."""
    x, w, _, t = (v.detach() for v in inputs)

    def run() -> object:
        return x @ w.T, t @ w, t.T @ x

    return run


def memory_job(layer: Layer) -> Callable[[], object]:
    """For a child process: our step, on inputs that are there already."""
    step(ours(layer), layer._replace(rows=64).inputs())()
    inputs = layer.inputs()
    gc.collect()
    memory.trim()
    return step(ours(layer), inputs)


def _wrong(found: tuple[Any, ...], expected: tuple[Any, ...], same: float) -> str | None:
    for name, a, b in zip(("loss", "input", "weight"), found, expected, strict=False):
        off = float((a.double() - b.double()).norm() / b.double().norm())
        if off > same:
            return f"{name} differs from ours by {off:.1e}"
    return None


def _memory(layer: Layer) -> Figure:
    extra = peak_extra_bytes(memory_job, layer)
    value = None
    if extra is not None:
        size = 4 if layer.dtype == "float32" else 2
        learned = (layer.rows + layer.outputs) * layer.hidden + layer.outputs
        value = max(0, extra - size * learned) / 2**20
    return Figure(
        layer.label, "extra memory", value, layer.extra, at_least=False, unit=" MiB",
        detail="above the inputs and their gradients",
    )  # fmt: skip


def measured(layer: Layer) -> Callable[[int], list[Figure]]:
    """All figures of one layer."""

    def measure(scale: int) -> list[Figure]:
        here = layer._replace(rows=max(1, layer.rows // scale))
        inputs = here.inputs()
        sides = {
            OURS: step(ours(here), inputs),
            EAGER: step(plain(here), inputs),
            COMPILED: step(compiled(plain(here)), inputs),
        }
        expected = sides[OURS]()
        wrong = {
            name: _wrong(side(), expected, SAME[here.dtype])
            for name, side in sides.items()
            if name != OURS
        }
        del expected
        peaks: list[float] = []

        def peak() -> None:
            found = fma_peak("bf16" if here.dtype == "bfloat16" else "fp32", PEAK_SECONDS)
            peaks.extend([] if found is None else [found])

        calls = {**sides, PRODUCTS: three_products(inputs), "FMA peak": peak}
        seconds = sum(timing.once(call) for call in calls.values())
        rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP, least=3, most=15)
        times = timing.alternate(calls, rounds)
        share, detail = None, "no peak of this dtype"
        if peaks:
            gflops = here.flops / times[OURS].median / 1e9
            share, detail = 100 * gflops / max(peaks), f"{gflops:.0f} of {max(peaks):.0f} GFLOP/s"
        return [
            ratio(here.label, f"against {PRODUCTS}", 1.0, times, None, OURS, PRODUCTS),
            ratio(here.label, f"against {EAGER}", None, times, wrong[EAGER], OURS, EAGER),
            ratio(here.label, f"against {COMPILED}", None, times, wrong[COMPILED], OURS, COMPILED),
            Figure(
                here.label, "of the FMA peak", share, here.share, at_least=True, unit="%",
                detail=detail,
            ),
            _memory(here),
        ]  # fmt: skip

    return measure


LAYERS = (
    Layer("bce_with_logits", 65536, 128, 784, "float32", 75.0, 16.0),
    Layer("bce_with_logits", 65536, 128, 784, "bfloat16", 60.0, None),
    Layer("mse", 2048, 512, 50176, "float32", 80.0, 32.0),
)
MEASURES = tuple(measured(layer) for layer in LAYERS)

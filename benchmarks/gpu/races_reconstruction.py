"""Reconstruction beside a copy of the memory it has to touch, and a layer beside its products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from benchmarks.gpu.races import (
    COMPILED,
    EAGER,
    OURS,
    Race,
    Side,
    Step,
    relative,
    share_of_copy,
    times_as_long,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.findings import Place

PLAIN = {"mse": F.mse_loss, "bce_with_logits": F.binary_cross_entropy_with_logits}
INPUT_BYTES = 2**30
PRODUCTS = "three products"
SAME = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Entry(NamedTuple):
    """The tensors that learn, the target, and the backend of ours."""

    learned: tuple[Tensor, ...]
    target: Tensor
    backend: str | None


def _step(entry: Entry, loss: Callable[..., Tensor]) -> Step:
    def step() -> Sequence[Tensor]:
        value = loss(*entry.learned, entry.target)
        return value.detach(), *torch.autograd.grad(value, entry.learned)

    return step


def _compiled(loss: Callable[..., Tensor]) -> Callable[[Entry], Step]:
    def build(entry: Entry) -> Step:
        torch.compiler.reset()
        return _step(entry, torch.compile(loss, dynamic=False))

    return build


def _elements(kind: str) -> Race:
    """Reads both tensors and writes the gradient: three passes over the input's memory."""

    def inputs(place: Place) -> Entry:
        count = INPUT_BYTES // 4 // place.scale**3
        made = torch.Generator(place.device).manual_seed(0)
        x = torch.randn(count, generator=made, device=place.device)
        t = torch.rand(count, generator=made, device=place.device)
        return Entry((x.requires_grad_(),), t, place.served)

    def ours(entry: Entry) -> Step:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return ssl_fast.reconstruction_loss(x, t, kind, backend=entry.backend)

        return _step(entry, loss)

    plain: Any = PLAIN[kind]
    return Race(
        f"{kind} fp32, 1 GiB forward+backward",
        inputs,
        (
            Side(OURS, ours),
            Side(EAGER, lambda entry: _step(entry, plain)),
            Side(COMPILED, _compiled(plain)),
        ),
        (share_of_copy(85.0),),
        relative,
        SAME[torch.float32],
        moved=lambda place: 3.0 * (INPUT_BYTES // place.scale**3),
        bytes=12 * 2**30,
    )


def _plain_layer(x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(F.linear(x, w, bias), t)


def _layer() -> Race:
    rows, hidden, out = 65536, 1024, 4096

    def inputs(place: Place) -> Entry:
        n, h, d = (max(16, size // place.scale) for size in (rows, hidden, out))
        made = torch.Generator(place.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, device=place.device, dtype=torch.bfloat16)

        learned = normal(n, h), normal(d, h) / h**0.5, normal(d)
        return Entry(tuple(x.requires_grad_() for x in learned), normal(n, d), place.served)

    def ours(entry: Entry) -> Step:
        def loss(x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Tensor:
            return ssl_fast.linear_reconstruction_loss(
                x, w, t, linear_bias=bias, backend=entry.backend
            )

        return _step(entry, loss)

    return Race(
        f"linear reconstruction bf16, {rows} x {hidden}->{out}",
        inputs,
        (
            Side(OURS, ours),
            Side(EAGER, lambda entry: _step(entry, _plain_layer)),
            Side(COMPILED, _compiled(_plain_layer)),
            Side(PRODUCTS, _products),
        ),
        (times_as_long(PRODUCTS, 1.15),),
        _layer_error,
        SAME[torch.bfloat16],
        flops=lambda place: 6.0 * rows * hidden * out / place.scale**3,
    )


def _products(entry: Entry) -> Step:
    """The library's time for the layer's products alone; they are no loss and nothing to check."""
    x, w, _ = (v.detach() for v in entry.learned)
    t = entry.target

    def step() -> Sequence[Tensor]:
        torch.mm(x, w.T)
        torch.mm(t, w)
        torch.mm(t.T, x)
        return ()

    return step


def _layer_error(ours: Sequence[Tensor], other: Sequence[Tensor], inputs: Entry) -> float:
    return relative(ours, other, inputs) if other else 0.0


RACES = (_elements("mse"), _elements("bce_with_logits"), _layer())

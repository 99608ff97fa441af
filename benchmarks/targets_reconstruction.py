"""What passes over memory must reach: beside torch, and above the floor of bare streams.

Each case is measured with fresh buffers (large ones come from the system for every call, and their
pages are cleared first) and with reused ones (malloc keeps what was freed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

import ssl_fast
from benchmarks import memory, timing
from benchmarks.figures import SECONDS_PER_GROUP, Figure, ratio, told
from benchmarks.machine import native_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    # One forward and backward pass: the loss and the gradient of the first input.
    Step = Callable[[], tuple[Tensor, Tensor]]

OURS, EAGER, COMPILED, FLOOR = "ssl_fast", "eager torch", "torch.compile", "streams"
# Of the results of two sides, relative. torch rounds bfloat16 losses to bfloat16.
SAME = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """What one loss is timed with, and what it must reach."""

    label: str
    steps: dict[str, Step]  # by side, ours among them
    goals: dict[str, float]  # how many times faster than a side, with fresh buffers
    moved: int = 0  # bytes that have to be read and written
    above_floor: float | None = None  # times the floor, with reused buffers
    same: float = SAME[torch.float32]


def learning(loss: Callable[..., Tensor], learned: Tensor, *fixed: Tensor) -> Step:
    """A step of one side."""
    leaf = learned.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(leaf, *fixed)
        (grad,) = torch.autograd.grad(value, leaf)
        return value.detach(), grad

    return step


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Forgotten between cases: the count of recompilations that a function may have is limited.
    torch.compiler.reset()
    found: Callable[..., Tensor] = torch.compile(loss, dynamic=False)
    return found


def floor_of(moved: int) -> Callable[[], object] | None:
    """Two arrays read and one written past the caches, ``moved`` bytes in all."""
    native = native_module()
    count = moved // 12 // 16 * 16
    if native is None or count == 0:
        return None
    a, b, to = (torch.ones(count + 16) for _ in range(3))
    start = to.data_ptr() + -to.data_ptr() % 64

    def stream() -> None:
        native.stream(a.data_ptr(), b.data_ptr(), start, count, torch.get_num_threads())

    def hold() -> tuple[Tensor, ...]:
        stream()
        return a, b, to

    return hold


def difference(found: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The larger of the relative differences of loss and gradient."""
    loss = abs(float(found[0]) - float(other[0])) / max(abs(float(other[0])), 1e-30)
    # In parts: a float64 copy of a gradient of 150 MB would be two of them.
    parts = zip(found[1].flatten().split(1 << 22), other[1].flatten().split(1 << 22), strict=True)
    off = size = 0.0
    for a, b in parts:
        off += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return max(loss, (off / max(size, 1e-300)) ** 0.5)


def figures_of(case: Case, *, most: int = 25) -> list[Figure]:
    """Ratios with fresh buffers, and the distance from the floor with reused ones."""
    expected = case.steps[OURS]()
    wrong = {
        name: f"{name} differs from ours by {off:.1e}"
        for name, step in case.steps.items()
        if name != OURS and (off := difference(step(), expected)) > case.same
    }
    del expected
    calls: dict[str, Callable[[], object]] = {
        name: step for name, step in case.steps.items() if name not in wrong
    }
    bare = floor_of(case.moved)
    if bare is not None:
        calls[FLOOR] = bare
    fresh = _timed(calls, most)
    figures = [
        ratio(case.label, f"against {name}", goal, fresh, wrong.get(name), OURS, name)
        for name, goal in case.goals.items()
    ]
    if bare is None:
        return figures
    figures.append(_above(case.label, "fresh buffers", None, fresh, case.moved))
    if case.above_floor is None:
        return figures
    with memory.kept_buffers() as kept:
        reused = _timed(calls, most) if kept else {}
    figures += [
        ratio(
            case.label, f"against {name}, reused buffers", None, reused, wrong.get(name), OURS, name
        )
        for name in case.goals
    ]
    figures.append(_above(case.label, "reused buffers", case.above_floor, reused, case.moved))
    return figures


def _timed(calls: dict[str, Callable[[], object]], most: int) -> dict[str, timing.Times]:
    seconds = sum(timing.once(call) for call in calls.values())
    rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP / 2, least=5, most=most)
    return timing.alternate(calls, rounds)


def _above(
    label: str, buffers: str, goal: float | None, times: dict[str, timing.Times], moved: int
) -> Figure:
    """How many times as long as the bare streams ours takes."""
    value = spread = None
    detail = memory.NOT_KEPT
    if times:
        ours, bare = times[OURS], times[FLOOR]
        value, spread = ours.median / bare.median, max(ours.spread, bare.spread)
        rate = moved / bare.median / 1e9
        detail = f"{told(ours)} above {told(bare)}, {rate:.0f} GB/s, {len(ours.rounds)} rounds"
    what = f"times the streaming floor, {buffers}"
    return Figure(label, what, value, goal, at_least=False, unit="x", detail=detail, spread=spread)


def _beside_torch(
    label: str,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    goals: tuple[float, float],
    moved: int,
    above_floor: float | None,
) -> Case:
    steps = {
        OURS: learning(ours, *inputs),
        EAGER: learning(plain, *inputs),
        COMPILED: learning(compiled(plain), *inputs),
    }
    by_side = dict(zip((EAGER, COMPILED), goals, strict=True))
    return Case(label, steps, by_side, moved, above_floor, SAME[inputs[0].dtype])


def images(
    kind: str, plain: Callable[..., Tensor], dtype: torch.dtype, goals: tuple[float, float],
    above_floor: float | None,
) -> Callable[[int], list[Figure]]:  # fmt: skip
    """256 images of 3 x 224 x 224."""

    def measure(scale: int) -> list[Figure]:
        shape = (max(1, 256 // scale), 150_528)
        x, t = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)

        def ours(x: Tensor, t: Tensor) -> Tensor:
            return ssl_fast.reconstruction_loss(x, t, kind)

        name = str(dtype).removeprefix("torch.")
        label = f"{kind} {name} {shape[0]}x{shape[1]}"
        return figures_of(
            _beside_torch(label, ours, plain, (x, t), goals, 3 * x.nbytes, above_floor)
        )

    return measure


def small(_: int) -> list[Figure]:
    """A call that is all overhead, many times."""
    x, t = torch.randn(16, 784), torch.rand(16, 784)

    def many(step: Step) -> Step:
        def repeated() -> tuple[Tensor, Tensor]:
            for _ in range(199):
                step()
            return step()

        return repeated

    steps = {
        OURS: many(learning(ssl_fast.reconstruction_loss, x, t)),
        EAGER: many(learning(F.mse_loss, x, t)),
    }
    return figures_of(Case("mse float32 16x784, 200 calls", steps, {EAGER: 1.0}), most=100)


def _plain_mae(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    loss = (pred - target).square().mean(-1)
    return (loss * mask).sum() / mask.sum()


def masked_patches(scale: int) -> list[Figure]:
    """MAE's decoder at 224 x 224 with patches of 16 x 16."""
    batch, length, size = max(1, 64 // scale), 196, 768
    pred, target = (torch.randn(batch, length, size) for _ in range(2))
    mask = torch.zeros(batch, length)
    removed = length * 3 // 4
    for row in mask:
        row[torch.randperm(length)[:removed]] = 1.0
    # Of the rows that are masked both are read; the gradient is written everywhere.
    moved = 4 * size * batch * (2 * removed + length)
    label = f"MAE float32 [{batch}, {length}, {size}], 75% masked"
    return figures_of(
        _beside_torch(
            label, ssl_fast.mae_loss, _plain_mae, (pred, target, mask), (8.0, 1.3), moved, 2.33
        )
    )


def resnet50_shapes(divisor: int = 1) -> list[tuple[int, ...]]:
    """Of its 161 parameters, 25.6 million numbers."""

    def normalized(out: int, into: int, size: int) -> list[tuple[int, ...]]:
        return [(out, into, size, size), (out,), (out,)]

    width, into = max(1, 64 // divisor), max(1, 64 // divisor)
    shapes = normalized(into, 3, 7)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = width << stage, 4 * width << stage
        for block in range(blocks):
            shapes += normalized(inner, into, 1) + normalized(inner, inner, 3)
            shapes += normalized(out, inner, 1)
            if block == 0:
                shapes += normalized(out, into, 1)
            into = out
    return [*shapes, (1000, into), (1000,)]


def weight_decay(scale: int) -> list[Figure]:
    """l2_sp over a ResNet-50 straight into .grad, beside a loop over its parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = resnet50_shapes(min(scale, 64))
    anchors = [torch.randn(shape, generator=generator) for shape in shapes]
    moves = [0.01 * torch.randn(shape, generator=generator) for shape in shapes]

    def side(add: Callable[[list[Any]], Tensor]) -> Step:
        parameters = [(a + m).requires_grad_() for a, m in zip(anchors, moves, strict=True)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

        def step() -> tuple[Tensor, Tensor]:
            value = add(parameters)
            return value.detach(), parameters[0].grad

        return step

    def ours(parameters: list[Any]) -> Tensor:
        return ssl_fast.l2_sp(parameters, anchors, 0.01, accumulate=True)

    def loop(parameters: list[Any]) -> Tensor:
        squares = [(p - a).square().sum() for p, a in zip(parameters, anchors, strict=True)]
        loss: Tensor = 0.005 * torch.stack(squares).sum()
        loss.backward()
        return loss

    count = sum(a.numel() for a in anchors)
    label = f"l2_sp float32 into .grad, {len(shapes)} tensors, {count / 1e6:.1f}M"
    moved = 4 * 4 * count  # parameters, anchors, gradients read and written
    return figures_of(Case(label, {OURS: side(ours), EAGER: side(loop)}, {EAGER: 4.5}, moved))


_logits = F.binary_cross_entropy_with_logits
MEASURES = (
    images("mse", F.mse_loss, torch.float32, (5.0, 2.5), 1.3),
    images("bce_with_logits", _logits, torch.float32, (8.0, 2.6), 2.0),
    images("bce_with_logits", _logits, torch.bfloat16, (6.0, 1.8), None),
    small,
    masked_patches,
    weight_decay,
)

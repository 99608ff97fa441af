"""Values and gradients beside the same formula in float64.

The rule is that of the tests: ``|out - exact| <= 2 |plain - exact| + relative |exact|`` in the
2-norm, with ``plain`` what plain torch makes at the same dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

# The tests' relative terms, but for fp32: three TF32 products keep 21 bits of each operand.
RELATIVE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}
# Of a result whose exact value is zero or next to it, per element, as a part of the relative term.
ABSOLUTE = 0.02


class Inputs(NamedTuple):
    """A call's tensors: those that get a gradient, and the others."""

    learned: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()


class Shape(NamedTuple):
    """Rows and columns of the features."""

    rows: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}"


@dataclass(frozen=True)
class Subject:
    """A public function with fixed options, and what it must equal."""

    name: str
    ours: Callable[..., Any]  # (backend, *learned, *fixed): a tensor or several
    # The same in plain torch; None: the reference backend, whose formula gradcheck has proven.
    plain: Callable[..., Any] | None
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    shapes: tuple[Shape, ...] = ()  # in place of those of all subjects
    # The upstream gradient of a scalar: with the number of rows, the gradients of a mean are of the
    # size of its terms, and fp16 holds them.
    lift: Callable[[Shape], float] = lambda shape: float(shape.rows)

    def expected(self, inputs: Inputs) -> Any:
        """The plain result, in the inputs' dtype."""
        given = (*inputs.learned, *inputs.fixed)
        return self.ours("reference", *given) if self.plain is None else self.plain(*given)


def generator(*seeds: int) -> torch.Generator:
    """The same numbers every time, from the shape: a failure can be looked at again."""
    return torch.Generator().manual_seed(sum(seed * 1009**i for i, seed in enumerate(seeds)))


def widened(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    return Inputs(
        *(tuple(x.double() if x.is_floating_point() else x for x in part) for part in inputs)
    )


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def values_and_gradients(
    call: Callable[[Inputs], Any], inputs: Inputs, lift: float
) -> list[Tensor]:
    """The outputs, then the gradients of the learned inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs.learned)
    outputs = outputs_of(call(Inputs(leaves, inputs.fixed)))
    graded = [x for x in outputs if x.requires_grad]
    if not graded:
        return list(outputs)
    upstream = [_upstream(x, lift) for x in graded]
    gradients = torch.autograd.grad(graded, leaves, upstream, allow_unused=True)
    filled = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
    ]
    return [x.detach() for x in (*outputs, *filled)]


def _upstream(output: Tensor, lift: float) -> Tensor:
    if output.dim() == 0:
        return torch.full_like(output, lift)
    return torch.randn(output.shape, generator=generator(*output.shape)).to(output)


def against_float64(
    subject: Subject, shape: Shape, dtype: torch.dtype, device: str, backend: str
) -> str:
    """The worst error as a part of what is allowed; AssertionError where it is over."""
    inputs = subject.inputs(shape, dtype, device)
    lift = subject.lift(shape)

    def ours(given: Inputs) -> Any:
        return subject.ours(backend, *given.learned, *given.fixed)

    found = values_and_gradients(ours, inputs, lift)
    exact = values_and_gradients(subject.expected, widened(inputs), lift)
    plain = values_and_gradients(subject.expected, inputs, lift)
    values = len(found) - len(inputs.learned)
    weight = sum(lift if x.dim() == 0 else x.numel() for x in found[:values])
    worst = 0.0
    for i, (x, e, p) in enumerate(zip(found, exact, plain, strict=True)):
        what = f"value {i}" if i < values else f"gradient {i - values}"
        floor = 0.0
        if i >= values and x.dim() == 0:
            # A sum over all rows, in which terms cancel: a rounded logit moves the loss as a scale
            # does that is off by as much.
            floor = weight / abs(float(inputs.learned[i - values]))
        worst = max(worst, part_of_allowed(x, e, dtype, plain=p, floor=floor, what=what))
    return f"{len(found)} results, {100 * worst:.0f}% of the error allowed"


def part_of_allowed(
    found: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    plain: Tensor | None = None,
    floor: float = 0.0,  # the least size that the relative term is taken of
    what: str,
) -> float:
    """The error over the error allowed; AssertionError where it is above 1 or NaN."""
    if found.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, not {tuple(exact.shape)}")
    out, exact = found.double(), exact.double()
    size = float(exact.norm())
    relative = RELATIVE[dtype]
    allowed = relative * (max(size, floor) + ABSOLUTE * max(1, exact.numel()) ** 0.5)
    if plain is not None:
        # A plain result that overflows allows nothing.
        allowed += 2 * float((plain.double() - exact).norm().nan_to_num(0.0, 0.0, 0.0))
    error = float((out - exact).norm())
    if not error <= allowed:
        raise AssertionError(f"{what}: error {error:.2e}, allowed {allowed:.2e} of {size:.2e}")
    return error / allowed

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of kl_divergence: a block of numbers a program."""

import triton
import triton.language as tl

# As in csrc/cpu/kl_divergence.cpp: the largest fp32 number whose exponential is finite, and the
# factor that keeps a sum of exponentials finite.
LARGEST_EXPONENT = tl.constexpr(88.72283)
SMALL = tl.constexpr(2.0**-20)


@triton.jit
def divergence_kernel(
    mu,  # [N]
    logvar,  # [N]
    sums,  # [programs] fp32: the terms times SMALL
    grad_logvar,  # [N] fp32, written with HAS_GRAD
    size,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1/2 sum(mu^2 + exp(logvar) - 1 - logvar) of a block, and 1/2 (exp(logvar) - 1)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    m = tl.load(mu + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(logvar + places, mask=inside, other=0.0).to(tl.float32)
    # exp stops growing there; NaN and +inf stay
    limited = tl.where(x > LARGEST_EXPONENT, LARGEST_EXPONENT, x)
    y = limited * 1.44269504
    # what the product's rounding lost, a relative error of 5e-6 at 88, is put back
    lost = tl.fma(limited, 1.44269504, -y) + limited * 1.92596303e-8
    power = tl.exp2(y)
    power = tl.where(limited < -104.0, 0.0, power + power * (lost * 0.69314718))
    power = tl.where(x > 3.4028235e38, x, power)
    # the series of (exp(x) - 1 - x) / x^2 near 0, where the subtraction would lose digits
    near = tl.where(tl.abs(x) <= 1.0, x, 0.0)
    series = near * 2.7557319e-7 + 2.7557319e-6
    series = series * near + 2.4801587e-5
    series = series * near + 1.9841270e-4
    series = series * near + 1.3888889e-3
    series = series * near + 8.3333333e-3
    series = series * near + 4.1666667e-2
    series = series * near + 1.6666667e-1
    series = series * near + 0.5
    squared = near * near * series
    # comparisons with NaN are false, and power is NaN then
    is_near = tl.abs(x) <= 1.0
    minus_one = tl.where(is_near, near + squared, power - 1.0)
    rest = tl.where(is_near, squared, power - 1.0 - x)
    term = (m * m * (0.5 * SMALL)) + rest * (0.5 * SMALL)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, term, 0.0), 0))
    if HAS_GRAD:
        tl.store(grad_logvar + places, 0.5 * minus_one, mask=inside)

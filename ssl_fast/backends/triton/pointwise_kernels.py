# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""Losses of an input and a target, element by element, as in csrc/cpu/pointwise.h."""

import triton
import triton.language as tl

from ssl_fast.backends.triton.tiles import LOG2_E

# The places in KINDS of backends/reference/pointwise.py.
MSE = tl.constexpr(0)
L1 = tl.constexpr(1)
SMOOTH_L1 = tl.constexpr(2)
HUBER = tl.constexpr(3)
BCE = tl.constexpr(4)


@triton.jit
def log1p(t):
    """log(1 + t) for t from 0 to 1, within 2e-7 of itself.

    t (1 + t Q(t)), Q fitted to relative error: tl.log(1 + t) would lose a small t altogether, and
    the interpreter has no libdevice, where a log1p is.
    """
    q = 0.00536482 * t - 0.03006576
    q = q * t + 0.07920449
    q = q * t - 0.13753799
    q = q * t + 0.19153653
    q = q * t - 0.24857163
    q = q * t + 0.33321323
    q = q * t - 0.49999648
    return t + t * (t * q)


@triton.jit
def _difference_terms(x, t, parameter, KIND: tl.constexpr):
    d = x - t
    size = tl.abs(d)
    if KIND == MSE:
        loss = d * d
        slope = d + d
    elif KIND == L1:
        loss = size
        # of NaN 0, as in torch
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    else:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        near = size < parameter
        if KIND == SMOOTH_L1:
            loss = tl.where(near, 0.5 * d * d / parameter, size - 0.5 * parameter)
            slope = tl.where(near, d / parameter, sign)
        else:
            loss = tl.where(near, 0.5 * d * d, parameter * (size - 0.5 * parameter))
            slope = tl.where(near, d, parameter * sign)
    return loss, slope


@triton.jit
def _probability_terms(x, t):
    """Logarithms end at -100, and the derivative's denominator at 1e-12, as in torch."""
    rest = 1.0 - x
    # what the subtraction lost of a small x
    lost = ((1.0 - rest) - x) / tl.maximum(rest, 1e-30)
    log_x = tl.log(x)
    log_rest = tl.log(rest) + lost
    log_x = tl.where(log_x < -100.0, -100.0, log_x)
    log_rest = tl.where(log_rest < -100.0, -100.0, log_rest)
    loss = (t - 1.0) * log_rest - t * log_x
    return loss, (x - t) / tl.maximum(rest * x, 1e-12)


@triton.jit
def _logit_terms(x, t, positive, POSITIVE: tl.constexpr):
    """The terms that cancel where the loss is near 0 are never made."""
    minus = -tl.abs(x)
    minus = tl.where(minus < -104.0, -104.0, minus)
    y = minus * LOG2_E
    # what the product's rounding lost, a relative error of 5e-6 at 88, is put back
    lost = tl.fma(minus, 1.44269504, -y) + minus * 1.92596303e-8
    power = tl.exp2(y)
    power += power * (lost * 0.69314718)
    share = 1.0 / (1.0 + power)
    small = power * share
    rest = 1.0 - t
    # x - x makes NaN of -inf, as torch does
    if POSITIVE:
        factor = 1.0 + (positive - 1.0) * t
        below = small - t * (1.0 + (positive - 1.0) * share)
        loss = tl.where(x > 0, rest * x, (x - x) - t * positive * x) + factor * log1p(power)
        slope = tl.where(x > 0, rest - factor * small, below)
    else:
        loss = tl.where(x > 0, rest * x, (x - x) - t * x) + log1p(power)
        slope = tl.where(x > 0, rest - small, small - t)
    return loss, slope


@triton.jit
def terms(x, t, positive, parameter, KIND: tl.constexpr, POSITIVE: tl.constexpr):
    """The loss and its derivative by x; positive, of logits alone, is read with POSITIVE."""
    if KIND < BCE:
        loss, slope = _difference_terms(x, t, parameter, KIND)
    elif KIND == BCE:
        loss, slope = _probability_terms(x, t)
    else:
        loss, slope = _logit_terms(x, t, positive, POSITIVE)
    return loss, slope

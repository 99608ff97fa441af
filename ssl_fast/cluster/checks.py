"""Checks of what the clustering functions are given: types, shapes, and on a CPU the values."""

from __future__ import annotations

import operator
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast.backends.dispatch import BACKENDS
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.cluster.rows import all_finite, flattened

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "accept_labels",
    "accept_lengths",
    "accept_rows",
    "accept_weight",
    "check_backend",
    "check_choice",
    "check_count",
    "check_finite",
    "check_like",
    "check_metric",
    "check_real",
    "describe",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """What a caller passed, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless value is one of choices."""
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {options}; got {value!r}")


def check_metric(metric: Any) -> None:
    """ValueError unless it is a metric."""
    check_choice("metric", metric, ("euclidean", "cosine"))


def check_backend(backend: Any) -> None:
    """ValueError unless it names a backend or leaves the choice open."""
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """An integer of at least ``minimum``; TypeError or ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {describe(value)}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {number}")
    return number


def check_real(name: str, value: Any) -> float:
    """A finite number of at least 0; TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {describe(value)}")
    number = float(value)
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
    return number


def accept_rows(name: str, value: Any, letter: str = "N") -> Tensor:
    """A dense floating tensor [..., N, D] with D of 1 at least, or TypeError, ValueError."""
    shape = f"[..., {letter}, D]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; got {describe(value)}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if value.dim() < 2 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have shape {shape}, D > 0; got {tuple(value.shape)}")
    return value


def check_like(name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """The device, the dtype, the leading dimensions and the last one of ``first``."""
    if value.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}; got {value.device}"
        )
    if value.dtype is not first.dtype:
        raise TypeError(
            f"{name} must have the dtype of {first_name}, {first.dtype}; got {value.dtype}"
        )
    if value.shape[-1] != first.shape[-1]:
        raise ValueError(
            f"{name} must have as many columns as {first_name}, {first.shape[-1]}; "
            f"got shape {tuple(value.shape)}"
        )
    if value.shape[:-2] != first.shape[:-2]:
        raise ValueError(
            f"{name} must have the leading dimensions of {first_name}, "
            f"{tuple(first.shape[:-2])}; got shape {tuple(value.shape)}"
        )


def check_finite(name: str, value: Tensor, lengths: Tensor | None = None) -> None:
    """ValueError where a CPU tensor [B, N, D] has NaN or infinity in a row that counts."""
    if value.device.type == "cpu" and not all_finite(value, lengths):
        raise ValueError(f"{name} must be finite; it contains NaN or infinity")


def accept_weight(
    name: str,
    weight: Any,
    x: Tensor,  # [..., N, D]
    lengths: Tensor | None = None,  # [B]
) -> Tensor | None:
    """Weights of the rows of x as a wide [B, N], 0 for padding, or TypeError, ValueError.

    The values of a CPU tensor are checked: none negative, NaN or infinite.
    """
    if weight is None:
        return None
    shape = x.shape[:-1]
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor {tuple(shape)}; got {describe(weight)}")
    if weight.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}; got {weight.device}")
    if weight.shape != shape:
        raise ValueError(
            f"{name} must have a number per row of x, shape {tuple(shape)}; "
            f"got shape {tuple(weight.shape)}"
        )
    wide = flattened(weight.detach().to(accumulation_dtype(x)), 1)
    if lengths is not None:
        places = torch.arange(wide.shape[1], device=x.device)
        wide = wide.masked_fill(places >= lengths[:, None], 0.0)
    if wide.device.type == "cpu" and wide.numel():
        lowest, highest = (float(value) for value in wide.aminmax())
        if not (lowest >= 0.0 and highest < float("inf")):
            bad = lowest if not lowest >= 0.0 else highest
            raise ValueError(f"{name} must be finite and not negative; got {bad}")
    return wide


def accept_labels(name: str, labels: Any, x: Tensor) -> Tensor:
    """Labels of the rows of x [..., N, D] as int64 [B, N], or TypeError, ValueError."""
    if not isinstance(labels, Tensor) or labels.dtype not in {torch.int64, torch.int32}:
        raise TypeError(f"{name} must be an int64 tensor; got {describe(labels)}")
    if labels.device != x.device or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} must have a number per row of x, shape {tuple(x.shape[:-1])} on {x.device}; "
            f"got {describe(labels)}"
        )
    return flattened(labels.to(torch.int64), 1)


def accept_lengths(lengths: Any, x: Tensor, n_clusters: int) -> Tensor | None:
    """How many rows of each problem count, [B]; n_clusters to N where the values can be read."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in {torch.int64, torch.int32}:
        raise TypeError(f"lengths must be an int64 tensor; got {describe(lengths)}")
    if lengths.device != x.device:
        raise ValueError(f"lengths must be on the device of x, {x.device}; got {lengths.device}")
    if lengths.shape != x.shape[:-2]:
        raise ValueError(
            f"lengths must have the leading dimensions of x, {tuple(x.shape[:-2])}; "
            f"got shape {tuple(lengths.shape)}"
        )
    flat = lengths.to(torch.int64).reshape(-1)
    if flat.device.type == "cpu" and flat.numel():
        lowest, highest = (int(value) for value in flat.aminmax())
        if lowest < n_clusters or highest > x.shape[-2]:
            bad = lowest if lowest < n_clusters else highest
            raise ValueError(
                f"lengths must be from n_clusters={n_clusters} to the rows of x, {x.shape[-2]}; "
                f"got {bad}"
            )
    return flat

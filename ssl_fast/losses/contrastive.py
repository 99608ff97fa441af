"""What the contrastive losses share: checks of arguments, the scale, by-products."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_fast.backends.dispatch import BACKENDS
from ssl_fast.losses.options import Options, check_numbers
from ssl_fast.ops.pair_softmax import accumulation_dtype
from ssl_fast.ops.registration import autocast_is_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ssl_fast.ops.pair_softmax_loss import ContrastiveLoss

__all__ = [
    "ContrastiveModule",
    "ContrastiveStats",
    "accept_features",
    "check_choice",
    "check_options",
    "check_same",
    "check_scalar",
    "scalar_from",
    "scale_from",
    "with_stats",
]

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ContrastiveStats(NamedTuple):
    """By-products of a contrastive loss, detached, on the features' device."""

    lse: Tensor  # [N]: log-sum-exp (nats) over all keys of a row, its positive among them
    top1: Tensor  # []: fraction of rows whose positive logit is at least that of every negative
    positive_similarity: Tensor  # []: mean similarity of a row and its positive


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


def accept_features(name: str, value: Any, shape: str) -> Tensor:
    """A dense floating tensor with the rank of ``shape`` ("[N, D]"), or TypeError, ValueError.

    It comes back in autocast's dtype where autocast is on; float64, as in a product, does not.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; got {describe(value)}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    if value.dtype is torch.float64 or not autocast_is_on(value.device.type):
        return value
    return value.to(torch.get_autocast_dtype(value.device.type))


def check_same(
    name: str, value: Tensor, first_name: str, first: Tensor, *, sizes: dict[int, str]
) -> None:
    """The device, the dtype and the ``sizes`` (dimension of value: what it counts) of ``first``.

    The last dimension is compared with the last of ``first``, dimension 0 with its first.
    """
    if value.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}; got {value.device}"
        )
    if value.dtype is not first.dtype:
        raise TypeError(
            f"{name} must have the dtype of {first_name}, {first.dtype}; got {value.dtype}"
        )
    for dimension, counted in sizes.items():
        if value.shape[dimension] != first.shape[dimension]:
            raise ValueError(
                f"{name} must have as many {counted} as {first_name}, {first.shape[dimension]}; "
                f"got shape {tuple(value.shape)}"
            )


def check_options(reduction: Any, backend: Any) -> None:
    """The options that all losses have."""
    check_choice("reduction", reduction, REDUCTIONS)
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def check_scalar(name: str, number: Any) -> float | None:
    """A number, or a tensor of one floating value. Its value, None where looking would wait."""
    if isinstance(number, Tensor):
        if not number.is_floating_point():
            raise TypeError(f"{name} must be floating; got {describe(number)}")
        if number.numel() != 1:
            raise ValueError(f"{name} must be one number; got {describe(number)}")
        # A value on a GPU would cost a synchronisation; a fake one doesn't exist.
        hidden = number.device.type != "cpu" or torch.compiler.is_compiling()
        if hidden or type(number) not in (Tensor, nn.Parameter):
            return None
        return float(number.item())
    if isinstance(number, bool) or not isinstance(number, (float, int, Real)):
        raise TypeError(f"{name} must be a number or a tensor; got {describe(number)}")
    return float(number)


def check_temperature(temperature: Any) -> None:
    """A positive number, or a tensor that holds one floating value; on a CPU it is looked at."""
    value = check_scalar("temperature", temperature)
    if value is not None and not value > 0:
        shown = temperature.item() if isinstance(temperature, Tensor) else temperature
        raise ValueError(f"temperature must be greater than 0; got {shown}")


def scalar_from(name: str, number: float | Tensor, features: Tensor) -> Tensor:
    """The number as a scalar on the features' device, which keeps a tensor's gradient."""
    dtype = accumulation_dtype(features)
    if not isinstance(number, Tensor):
        return torch.full((), number, dtype=dtype, device=features.device)
    if number.device != features.device and number.device.type != "cpu":
        raise ValueError(
            f"{name} must be a number or on the device of the features, {features.device}; "
            f"got {describe(number)}"
        )
    return number.to(features.device, dtype, non_blocking=True).reshape(())


def scale_from(temperature: float | Tensor, features: Tensor) -> Tensor:
    """1 / temperature on the features' device, a scalar that keeps the temperature's gradient."""
    check_temperature(temperature)
    if not isinstance(temperature, Tensor):
        return scalar_from("temperature", 1.0 / temperature, features)
    return scalar_from("temperature", temperature, features).reciprocal()


def with_stats(
    result: ContrastiveLoss, scale: Tensor, return_stats: bool, ignore: Tensor | None = None
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """The loss, with its by-products when they are asked for; ignored rows are no part of means."""
    if not return_stats:
        return result.loss
    logit = result.positive_logit.detach()
    first = (logit >= result.row_max).to(logit.dtype)
    if ignore is None:
        top1, mean = first.mean(), logit.mean()
    else:
        kept = (~ignore).to(logit.dtype)
        top1, mean = ((kept * x).sum() / kept.sum() for x in (first, logit))
    stats = ContrastiveStats(
        lse=torch.logaddexp(result.row_lse.detach(), logit),
        top1=top1,
        positive_similarity=mean / scale.detach(),
    )
    return result.loss, stats


class ContrastiveModule(nn.Module):
    """The options that every contrastive loss has, checked when the module is made.

    A temperature that is an ``nn.Parameter`` becomes one of the module's parameters.
    """

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        reduction: str,
        normalize: bool,
        return_stats: bool,
        backend: str | None,
        **numbers: Any,
    ) -> None:
        super().__init__()
        check_options(reduction, backend)
        check_numbers(Options(**numbers))
        self.numbers = numbers
        check_temperature(temperature)
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.return_stats = return_stats
        self.backend = backend

    def options(self) -> dict[str, Any]:
        """The keyword arguments that the loss function is called with."""
        return {
            "temperature": self.temperature,
            "reduction": self.reduction,
            "normalize": self.normalize,
            "return_stats": self.return_stats,
            "backend": self.backend,
            **self.numbers,
        }

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())

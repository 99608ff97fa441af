"""What the launches of every op need to know about the device they run on."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ssl_fast.backends.triton import tuning


@contextmanager
def launching_on(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device the current one, and keeps autocast out of the library products."""
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with guard, torch.autocast(tensor.device.type, enabled=False):
        yield


@cache
def _properties(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "interpreter", 2
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return tuning.architecture_of(capability), processors


def architecture_for(*features: Tensor) -> str:
    """The tables' name for the device of these features, "interpreter" where that is the CPU."""
    architecture, _ = _properties(features[0].device)
    # Rows that the compiler can't see to be aligned pass through registers, element by element, on
    # their way to shared memory: large tiles would spill.
    numbers = [n for x in features for n in (x.shape[1], x.stride(0), x.data_ptr())]
    if architecture != "interpreter" and any(number % 16 for number in numbers):
        return "generic"
    return architecture


def config_for(op: str, *features: Tensor, ids: bool = False) -> tuning.Config:
    """The tuning table's row for a product of these features on their device, with ids or not."""
    architecture = architecture_for(*features)
    if architecture == "interpreter":
        return tuning.INTERPRETER
    return tuning.lookup(op, features[0].dtype, features[0].shape[1], architecture, ids=ids)


def processor_count(device: torch.device) -> int:
    """How many blocks of threads run at a time, at one block per multiprocessor."""
    return _properties(device)[1]


def input_precision(features: Tensor) -> str:
    """How Triton multiplies fp32 tiles: as torch's own products do, TF32 only where allowed."""
    if not features.is_cuda:
        return "widened"
    if features.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    # three TF32 products carry what one rounds away, on tensor cores; "ieee" would leave them idle
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def written_dtype(features: Tensor) -> torch.dtype:
    """What a kernel stores of these features' dtype, before torch's own .to(): nothing to do there.

    Only the interpreter differs: it truncates where a GPU rounds, so it stores fp32 for torch to
    round.
    """
    return features.dtype if features.is_cuda else torch.float32


def accumulate_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Adds left @ right to an fp32 out, or sets it when it is the first term."""
    if left.dtype == torch.float32:
        if first:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(out, left, right, out=out)
    elif left.is_cuda and not torch.version.hip:
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        # no 16-bit product with an fp32 result there; widening is exact
        product = torch.mm(left.float(), right.float())
        if first:
            out.copy_(product)
        else:
            out.add_(product)

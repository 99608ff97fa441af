"""Gradient caching: a contrastive batch larger than the memory that its encoder's graph takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["cached_step"]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an encoder's input or output."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [x for x in values if isinstance(x, Tensor)]


def _rows(position: int, value: Any) -> int:
    """The batch size of one encoder's input, after a check of what it is."""
    name = f"inputs[{position}]"
    parts = list(value.values()) if isinstance(value, dict) else value
    parts = [parts] if isinstance(parts, Tensor) else parts
    if not isinstance(parts, (tuple, list)) or not parts:
        raise TypeError(
            f"{name} must be a tensor, or a tuple, list or dict of tensors; got "
            f"{type(value).__name__}"
        )
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() == 0:
            raise TypeError(f"{name} must hold tensors with a batch dimension; got {part!r}")
        if part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"{name} must hold tensors with one batch size; got "
                f"{[tuple(x.shape) for x in parts]}"
            )
    return int(parts[0].shape[0])


def _chunk(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, dict):
        return {name: x[start:stop] for name, x in value.items()}
    return tuple(x[start:stop] for x in value)


def _call(encoder: Callable[..., Any], chunk: Any) -> tuple[Tensor, ...]:
    """The encoder's outputs for one chunk."""
    if isinstance(chunk, dict):
        made = encoder(**chunk)
    else:
        made = encoder(chunk) if isinstance(chunk, Tensor) else encoder(*chunk)
    outputs = made if isinstance(made, (tuple, list)) else (made,)
    rows = _tensors(chunk)[0].shape[0]
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != rows:
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"encoders must give tensors with a row for each of the {rows} rows they get; "
                f"got {what}"
            )
    return tuple(outputs)


class _Random:
    """The state of the random number generators that an encoder may draw from."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = sorted({x.get_device() for x in tensors if x.device.type == "cuda"})
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    def restore(self) -> None:
        """Draw the same numbers again."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


class _Part(NamedTuple):
    """One encoder with its share of the work."""

    encoder: Any
    value: Any
    bounds: list[tuple[int, int]]  # of the chunks
    trains: bool


class _Run(NamedTuple):
    """What the first pass leaves for the second."""

    random: list[_Random]  # before each chunk
    buffers: list[tuple[Tensor, Tensor]]  # a buffer, and its value before the first chunk
    outputs: list[Tensor]  # leaves


def _parameters(encoder: Any) -> list[Tensor]:
    return list(encoder.parameters()) if isinstance(encoder, nn.Module) else []


def _without_graph(part: _Part) -> _Run:
    """All chunks of one encoder, keeping the outputs alone."""
    buffers = list(part.encoder.buffers()) if isinstance(part.encoder, nn.Module) else []
    before = [(x, x.detach().clone()) for x in buffers] if part.trains else []
    random, made = [], []
    devices = [*_tensors(part.value), *_parameters(part.encoder)]
    with torch.no_grad():
        for start, stop in part.bounds:
            random.append(_Random(devices))
            made.append(_call(part.encoder, _chunk(part.value, start, stop)))
        # Autocast keeps weights that it has cast, here without a graph.
        torch.clear_autocast_cache()
        outputs = [torch.cat(chunks).detach() for chunks in zip(*made, strict=True)]
    for output in outputs:
        output.requires_grad_(part.trains and output.is_floating_point())
    return _Run(random, before, outputs)


def _with_graph(part: _Part, run: _Run, synchronises: bool) -> None:
    """All chunks of one encoder again, each with its graph and the gradient of its outputs."""
    grads = [
        (torch.zeros_like(x) if x.grad is None else x.grad) if x.requires_grad else None
        for x in run.outputs
    ]
    for number, ((start, stop), random) in enumerate(zip(part.bounds, run.random, strict=True)):
        last = synchronises and number + 1 == len(part.bounds)
        alone = getattr(part.encoder, "no_sync", None)
        with nullcontext() if last or alone is None else alone():
            random.restore()
            outputs = _call(part.encoder, _chunk(part.value, start, stop))
            kept = [
                (output, grad[start:stop])
                for output, grad in zip(outputs, grads, strict=True)
                if grad is not None and output.requires_grad
            ]
            if kept:
                torch.autograd.backward([x for x, _ in kept], [grad for _, grad in kept])
        torch.clear_autocast_cache()


def _parts(encoders: Any, inputs: Any, chunk_size: int) -> Iterator[_Part]:
    for position, (encoder, value) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise TypeError(f"encoders must be modules; got {type(encoder).__name__}")
        rows = _rows(position, value)
        # An empty share is one empty chunk: DistributedDataParallel waits for every rank.
        bounds = [(i, min(i + chunk_size, rows)) for i in range(0, max(rows, 1), chunk_size)]
        trains = not isinstance(encoder, nn.Module) or any(
            x.requires_grad for x in [*_parameters(encoder), *_tensors(value)]
        )
        yield _Part(encoder, value, bounds, trains)


def cached_step(
    encoders: nn.Module | Sequence[nn.Module],
    inputs: Any,
    loss_fn: Callable[..., Tensor],
    chunk_size: int,
    *,
    scaler: Any = None,
) -> Tensor:
    """``loss = loss_fn(*(f(x) for f, x in zip(encoders, inputs))); loss.backward()``, in chunks.

    The gradients are those of the whole batch, in the memory of one chunk's graph: each encoder
    runs over its chunks without a graph, the loss gives the gradient of all representations, and
    each chunk runs again, with its graph, to carry its part of that gradient to the parameters. An
    encoder's forward pass is paid twice. The method of Gao et al., "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup" (arXiv:2101.06983).

    Args:
        encoders: one module or a sequence of them; a module may occur twice, for two views.
        inputs: one input per encoder (for a module alone: its input). A tensor is passed as
            ``f(x)``, a tuple or list as ``f(*x)``, a dict as ``f(**x)``; all tensors in it are cut
            along dimension 0.
        loss_fn: gets the representations of the whole batch, one argument per tensor that an
            encoder gives (one that gives a tuple makes several), and gives a scalar. Its own
            parameters, and a learned temperature it closes over, get their gradients too.
        chunk_size: rows per chunk.
        scaler: a ``torch.amp.GradScaler``; the loss is scaled before its backward, as in
            ``scaler.scale(loss).backward()``, and ``scaler.step`` stays with the caller.

    Dropout and the like draw the same numbers in both runs: the state of the generators is kept per
    chunk, CPU and CUDA, and afterwards is what the first run left. Buffers (running statistics)
    are set back in between, so each chunk updates them once; batch norm sees chunks, not the batch.
    Autocast is what is on around the call. A DistributedDataParallel encoder averages its gradients
    once, with the last chunk (``no_sync`` before), and takes shares of different sizes; with
    ``fully_shard`` every rank must have the same number of chunks. A loss over all ranks is one of
    ``ssl_fast.distributed`` in ``loss_fn``.

    Returns:
        The loss, detached and not scaled. Gradients are added to ``.grad``, as by ``backward``.

    Raises:
        TypeError: an encoder that can't be called, an input that holds no tensors.
        ValueError: a chunk size below 1, inputs that don't match the encoders or each other,
            an encoder whose output hasn't a row per input row, a loss that isn't a scalar.
    """
    if type(chunk_size) is not int:
        raise TypeError(f"chunk_size must be an int; got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    modules: Any = encoders
    if callable(modules):
        modules, inputs = [modules], [inputs]
    if not isinstance(inputs, (tuple, list)) or len(inputs) != len(modules):
        came = len(inputs) if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise ValueError(f"inputs must be one per encoder, {len(modules)}; got {came}")
    parts = list(_parts(modules, inputs, chunk_size))
    runs = [_without_graph(part) for part in parts]
    with torch.enable_grad():
        loss: Any = loss_fn(*(output for run in runs for output in run.outputs))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give a scalar tensor; got {what}")
        if loss.requires_grad:
            (loss if scaler is None else scaler.scale(loss)).backward()
        # The first run changed each module's buffers in turn; the second shall find them as it did.
        for run in reversed(runs):
            for buffer, before in run.buffers:
                buffer.detach().copy_(before)
        last_use = {id(part.encoder): number for number, part in enumerate(parts)}
        for number, (part, run) in enumerate(zip(parts, runs, strict=True)):
            if not part.trains:
                continue
            with torch.random.fork_rng(devices=run.random[0].devices):
                _with_graph(part, run, synchronises=last_use[id(part.encoder)] == number)
    return loss.detach()

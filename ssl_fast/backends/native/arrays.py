"""What every op needs before its kernel: checks, addresses, results and workspaces.

Everything that a kernel writes is allocated here: results, gradients, and a workspace that grows
with threads x block x keys, never with queries x keys.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast import _native

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "address",
    "batch_address",
    "batch_of",
    "check",
    "gradient",
    "hold",
    "hold_batch",
    "id_rule",
    "ids_of",
    "on_cpu",
    "rows_of",
    "run",
    "run_on_device",
    "threads_for",
    "vector",
]

# A smaller buffer spans no huge page.
_HUGE_PAGE = 2 << 20
# Up to this many bytes each thread keeps its workspace: a small loss then touches no fresh pages.
_KEPT = 2 << 20
_thread = threading.local()
_CPU = torch.device("cpu")


def check(
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> None:
    """What a kernel is about to read by its address is what it will take it for."""
    if value.device != device or value.dtype is not dtype or value.shape != shape:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {shape} on {device}; got a {value.dtype} "
            f"tensor of shape {tuple(value.shape)} on {value.device}"
        )


def rows_of(features: Tensor) -> Tensor:
    """The features with contiguous rows; any distance between them will do."""
    features = features.resolve_neg()
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


def address(rows: Tensor) -> tuple[int, int]:
    """Where rows begin, and the distance between them."""
    return rows.data_ptr(), rows.stride(0)


def ids_of(name: str, ids: Tensor | None, count: int) -> Tensor | None:
    """Ids [count], or [count, 2] where a row has two, as kernels read them: [ids a row, count].

    A copy must outlive the call: the caller keeps what this returns.
    """
    if ids is None:
        return None
    check(name, ids, (count, 2) if ids.dim() == 2 else (count,), torch.int64)
    return ids.reshape(count, ids.dim()).T.contiguous()


def id_rule(
    query_ids: Tensor | None, key_ids: Tensor | None, matching: bool
) -> tuple[int, int, int, bool]:
    """What ``ids_of`` gave for both sides, as a kernel takes it."""
    if query_ids is None or key_ids is None:
        return 0, 0, 0, False
    if len(query_ids) != len(key_ids):
        raise ValueError(
            f"query_ids and key_ids must give each row as many ids; got {len(query_ids)} and "
            f"{len(key_ids)}"
        )
    return query_ids.data_ptr(), key_ids.data_ptr(), len(query_ids), matching


def hold(arrays: Mapping[str, tuple[Tensor | None, int | None]]) -> dict[str, Tensor]:
    """The fp32 vectors that are there, contiguous; each beside its length, None a scalar's.

    A copy must outlive the call: the caller keeps what this returns.
    """
    return hold_batch(
        {
            name: (value, () if length is None else (length,), torch.float32)
            for name, (value, length) in arrays.items()
        }
    )


def batch_of(features: Tensor) -> Tensor:
    """The matrices with contiguous rows; any distance between rows, or matrices, will do."""
    features = features.resolve_neg()
    contiguous = features.stride(2) == 1 or features.shape[2] == 1
    return features if contiguous else features.contiguous()


def batch_address(features: Tensor) -> tuple[int, int, int]:
    """Where the first matrix begins, and the distances between matrices and between rows."""
    return features.data_ptr(), features.stride(0), features.stride(1)


def hold_batch(
    arrays: Mapping[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]],
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """The arrays that are there, contiguous; each beside its shape and dtype.

    A copy must outlive the call: the caller keeps what this returns.
    """
    held = {}
    for name, (value, shape, dtype) in arrays.items():
        if value is None:
            continue
        check(name, value, shape, dtype, device)
        held[name] = value.contiguous()
    return held


def vector(count: int) -> Tensor:
    """A number for each of ``count`` rows, not yet written."""
    return torch.empty(count, dtype=torch.float32)


def gradient(features: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a gradient of the features, [0] where it isn't needed."""
    shape = features.shape if needed else 0
    room = torch.empty(shape, dtype=dtype or features.dtype, device=features.device)
    if on_cpu(room) and room.nbytes >= _HUGE_PAGE:
        _native.advise_huge_pages(room.data_ptr(), room.nbytes)
    return room


def threads_for(elements: int) -> int:
    """Threads for a pass over so many elements: waking another one takes as long as 32768 do."""
    return 1 if elements < 1 << 15 else torch.get_num_threads()


def on_cpu(tensor: Tensor) -> bool:
    """Whether the C++ kernels of the CPU are meant, not the CUDA ones."""
    return tensor.device == _CPU


def run_on_device(prepared: Any, device: torch.device, stream: int) -> None:
    """Put a prepared call on a stream of the current device, and wait for nothing."""
    # The allocator gives this memory to later calls on the same stream alone.
    workspace = torch.empty(prepared.device_workspace_bytes(), dtype=torch.uint8, device=device)
    prepared.run_on_device(workspace.data_ptr(), stream)


def run(prepared: Any, device: torch.device = _CPU) -> None:
    """Run a prepared call in a workspace of the size that it asks for."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            run_on_device(prepared, device, torch.cuda.current_stream().cuda_stream)
        return
    size = prepared.workspace_bytes()
    if size > _KEPT:
        workspace = torch.empty(size, dtype=torch.uint8)
    else:
        kept: Tensor | None = getattr(_thread, "workspace", None)
        if kept is None:
            kept = _thread.workspace = torch.empty(_KEPT, dtype=torch.uint8)
        workspace = kept
    prepared.run(workspace.data_ptr())

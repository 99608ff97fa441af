"""A queue of keys from earlier batches: MoCo's, lightly's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_fast.losses.options import check_per_row

__all__ = ["MemoryBank"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MemoryBank(nn.Module):
    """``keys = torch.cat([keys, rows])[-size:]``, in place, as a ring.

    The queue of He et al., "Momentum Contrast for Unsupervised Visual Representation Learning"
    (arXiv:1911.05722). Pass ``bank.keys`` as ``negative_keys``: the loss reads it where it lies,
    and is done with it when it returns, so that ``enqueue`` may follow before ``backward``.

    Args:
        size: rows of the bank.
        dim: components of a row.
        dtype: of the rows; that of the features they are compared with.

    Attributes:
        keys: [size, dim], at first random rows of norm 1; saved in the state_dict.
        position: int64 [], the row that the next key goes to; saved in the state_dict.

    Raises:
        TypeError: a dtype that isn't floating; rows that aren't a floating tensor; ``ignore`` that
            isn't bool.
        ValueError: sizes below 1; rows of another width or on another device.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self,
        rows: Tensor,  # [B, dim]
        ignore: Tensor | None = None,  # [B]
    ) -> None:
        """Put rows in the place of the oldest; of more rows than the bank has, the last stay.

        Rows are taken as they are, without their graph. The key in the place of a row that
        ``ignore`` (bool [B]) marks stays for another round. Nothing waits for a GPU.
        """
        given: Any = rows
        if not isinstance(given, Tensor) or not given.is_floating_point():
            what = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"rows must be a floating tensor [B, {self.keys.shape[1]}]; got {what}")
        size, dim = self.keys.shape
        if rows.dim() != 2 or rows.shape[1] != dim:
            raise ValueError(f"rows must have shape [B, {dim}]; got {tuple(rows.shape)}")
        if rows.device != self.keys.device:
            raise ValueError(
                f"rows must be on the device of the bank, {self.keys.device}; got {rows.device}"
            )
        check_per_row("ignore", ignore, rows.shape[0], rows.device, torch.bool)
        count = rows.shape[0]
        skipped = max(0, count - size)
        places = torch.arange(skipped, count, device=rows.device)
        places = (self.position + places) % size
        rows = rows[skipped:].detach().to(self.keys.dtype)
        if ignore is not None:
            rows = torch.where(ignore[skipped:, None], self.keys[places], rows)
        self.keys.index_copy_(0, places, rows)
        self.position.copy_((self.position + count) % size)

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        size, dim = self.keys.shape
        return f"size={size}, dim={dim}, dtype={self.keys.dtype}"

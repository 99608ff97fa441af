"""The options of the softmax losses: vectors of a number per row around the same sweep.

None of them needs more than O((N + M) D) memory: pairs leave by id, and a mean over the keys that
stay is a product with the sum of those keys.
"""

from __future__ import annotations

import sys
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.ops.pair_softmax import IGNORED_ID, accumulation_dtype, row_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ssl_fast.losses.exchange import Local

__all__ = [
    "Options",
    "check_numbers",
    "check_per_row",
    "check_row_options",
    "kept_keys",
    "mean_logits",
    "options_of",
    "reduce_weighted",
    "row_losses",
    "without_ignored",
]


class Options(NamedTuple):
    """What a softmax loss is told beside its features."""

    query_ids: Tensor | None = None  # [N]
    key_ids: Tensor | None = None  # [M]
    row_weight: Tensor | None = None  # [N]
    ignore: Tensor | None = None  # [N]
    label_smoothing: float = 0.0
    margin: float = 0.0
    decoupled: bool = False
    hard_negative_beta: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether none is used, so that a fused loss serves."""
        tensors = self.query_ids, self.key_ids, self.row_weight, self.ignore
        return all(x is None for x in tensors) and not any(self[4:])


def _check_number(name: str, value: Any, low: float, high: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__})")
    if not low <= float(value) < high:
        raise ValueError(f"{name} must be {what}; got {value}")


def check_per_row(
    name: str, value: Any, rows: int, device: torch.device, dtype: torch.dtype | None
) -> None:
    """TypeError or ValueError unless value is None or [rows]; a dtype of None is any floating."""
    if value is None:
        return
    wanted = "floating" if dtype is None else str(dtype)[6:]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {wanted} tensor [{rows}]; got {type(value).__name__}")
    if value.dtype is not dtype and not (dtype is None and value.is_floating_point()):
        raise TypeError(f"{name} must be {wanted}; got {value.dtype}")
    if value.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},); got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of the features, {device}; got "
                         f"{value.device}")  # fmt: skip


def check_numbers(options: Options) -> None:
    """The options that are one number for all rows."""
    _check_number("label_smoothing", options.label_smoothing, 0.0, 1.0, "in [0, 1)")
    infinite = float("inf")
    _check_number("margin", options.margin, -sys.float_info.max, infinite, "a finite number")
    _check_number("hard_negative_beta", options.hard_negative_beta, 0.0, infinite, "0 or more")
    if not isinstance(options.decoupled, bool):
        raise TypeError(f"decoupled must be a bool; got {options.decoupled!r}")


def check_row_options(options: Options, features: Tensor) -> None:
    """The options that have a number for each row of ``features`` [N, D], and the numbers."""
    rows, device = features.shape[0], features.device
    check_per_row("row_weight", options.row_weight, rows, device, None)
    check_per_row("ignore", options.ignore, rows, device, torch.bool)
    check_per_row("query_ids", options.query_ids, rows, device, torch.int64)
    check_numbers(options)


def options_of(
    features: Tensor, key_rows: int, *, in_batch: bool, keys: str = "negative_keys", **given: Any
) -> Options:
    """The options after all checks; in a batch a key's id is its query's unless given.

    ``keys`` names the argument with the keys where they aren't the batch's.
    """
    options = Options(**given)
    check_row_options(options, features)
    check_per_row("key_ids", options.key_ids, key_rows, features.device, torch.int64)
    if options.key_ids is not None and options.query_ids is None:
        raise ValueError("query_ids must be given with key_ids; got None")
    if options.query_ids is not None and options.key_ids is None:
        if not in_batch:
            raise ValueError(f"key_ids must be given with query_ids and {keys}; got None")
        options = options._replace(key_ids=options.query_ids)
    return options


def without_ignored(
    options: Options, *features: Tensor, key_rows: int, in_batch: bool
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """Ids of queries [N] and keys [M] that keep ignored rows out, and features without them.

    An ignored row's features become 0, so that padding with NaN reaches neither a product nor a
    gradient. In a batch, a row's key goes with it.
    """
    query_ids, key_ids, ignore = options.query_ids, options.key_ids, options.ignore
    if ignore is None:
        return query_ids, key_ids, features
    if query_ids is None or key_ids is None:
        # No query's id is a key's.
        query_ids = torch.zeros(ignore.shape[0], dtype=torch.int64, device=ignore.device)
        key_ids = torch.ones(key_rows, dtype=torch.int64, device=ignore.device)
    query_ids = query_ids.masked_fill(ignore, IGNORED_ID)
    if in_batch:
        key_ids = key_ids.masked_fill(ignore, IGNORED_ID)
    return query_ids, key_ids, tuple(x.masked_fill(ignore[:, None], 0.0) for x in features)


def kept_keys(
    exchange: Local,
    keys: Tensor,  # [M, D], in the accumulation dtype; D may be 0
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    rows: int,
) -> tuple[Tensor, Tensor]:
    """The sum of the keys that stay in a row's softmax [N, D], and how many they are [N]."""
    sums, counts = exchange.class_sums(None, keys, key_ids)
    sums, counts = sums.expand(rows, keys.shape[1]), counts.expand(rows)
    if query_ids is not None and key_ids is not None:
        shared, number = exchange.class_sums(query_ids, keys, key_ids)
        sums, counts = sums - shared, counts - number
    row = torch.arange(rows, device=keys.device)
    for diagonal in diagonals:
        column = row + diagonal
        leaves = (column >= 0) & (column < keys.shape[0])
        if keys.shape[0] == 0:
            continue
        column = column.clamp(0, keys.shape[0] - 1)
        if query_ids is not None and key_ids is not None:
            # Those that their ids take out are counted already.
            leaves = leaves & (key_ids[column] != query_ids) & (key_ids[column] != IGNORED_ID)
        sums = sums - keys[column] * leaves[:, None]
        counts = counts - leaves.to(counts.dtype)
    if query_ids is not None:
        counts = counts * (query_ids != IGNORED_ID)
    return sums, counts


def row_losses(
    lse: Tensor,  # [N], over the negatives
    positive_logit: Tensor,  # [N]
    scale: Tensor,  # []
    options: Options,
    mean_logit: Tensor | None,  # [N], over the negatives and the positive without its margin
    counts: Tensor | None,  # [N], negatives
) -> Tensor:
    """The loss of each row; 0 where no negative is left."""
    logit = positive_logit
    if options.margin:
        logit = logit - scale * options.margin
    if options.decoupled:
        empty = lse == -torch.inf
        losses = torch.where(empty, 0.0, torch.where(empty, 0.0, lse) - logit)
    else:
        losses = row_loss(lse, logit)
    if mean_logit is not None and counts is not None:
        mean = mean_logit
        if options.margin:
            mean = mean - scale * options.margin / (counts + 1.0)
        smoothed = options.label_smoothing * (logit - mean)
        losses = losses + torch.where(counts > 0.0, smoothed, 0.0)
    return losses


def reduce_weighted(
    exchange: Local,
    losses: Tensor,  # [N]
    reduction: str,
    row_weight: Tensor | None,  # [N]
    ignore: Tensor | None,  # [N]
) -> Tensor:
    """Weighted losses, their sum over processes, or that over the sum of the weights.

    Where weights add up to 0 the mean is 0, with gradients 0; of an empty batch without weights it
    is NaN, as in torch.
    """
    if ignore is not None:
        losses = losses.masked_fill(ignore, 0.0)
        # An ignored row may hold anything, its weight too.
        row_weight = None if row_weight is None else row_weight.masked_fill(ignore, 0.0)
    if row_weight is not None:
        losses = losses * row_weight.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return exchange.total(losses.sum())
    if row_weight is None and ignore is None:
        if exchange.world_size == 1:
            return losses.mean()
        weight = losses.new_full((), losses.shape[0])
        total = exchange.total(torch.stack([losses.sum(), weight]))
        return total[0] / total[1]
    weights = losses.new_ones(losses.shape) if row_weight is None else row_weight.to(losses.dtype)
    if ignore is not None:
        weights = weights.masked_fill(ignore, 0.0)
    total = exchange.total(torch.stack([losses.sum(), weights.sum()]))
    nothing = total[1] == 0.0
    return torch.where(nothing, 0.0, total[0]) / torch.where(nothing, 1.0, total[1])


def mean_logits(
    query: Tensor,  # [N, D]
    query_scale: Tensor,  # [N]
    sums: Tensor,  # [N, D]
    counts: Tensor,  # [N]
    positive_logit: Tensor,  # [N]
) -> Tensor:
    """The mean over a row's negatives and its positive."""
    wide = accumulation_dtype(query)
    negatives = query_scale * (query.to(wide) * sums).sum(dim=1)
    return (negatives + positive_logit) / (counts + 1.0)

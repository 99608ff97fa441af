"""NT-Xent: two views of every image, each view against all others of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.losses.contrastive import (
    ContrastiveModule,
    ContrastiveStats,
    accept_features,
    check_options,
    check_same,
    scale_from,
    with_stats,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.info_nce import info_nce
from ssl_fast.losses.memory_bank import MemoryBank
from ssl_fast.losses.options import Options, options_of, reduce_weighted, without_ignored
from ssl_fast.losses.rows import Pairs, finish_rows, key_norms, row_dots
from ssl_fast.ops.pair_softmax import IGNORED_ID
from ssl_fast.ops.pair_softmax_loss import ContrastiveLoss, pair_softmax_symmetric_loss
from ssl_fast.ops.pair_softmax_symmetric import pair_softmax_symmetric

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NTXentLoss", "nt_xent"]


def nt_xent_over(
    exchange: Local,
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float | Tensor,
    reduction: str,
    *,
    normalize: bool,
    return_stats: bool,
    backend: str | None,
    **given: Any,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """``nt_xent`` where the other images may be those of many processes."""
    check_options(reduction, backend)
    z0, z1 = accept_features("z0", z0, "[N, D]"), accept_features("z1", z1, "[N, D]")
    check_same("z1", z1, "z0", z0, sizes={0: "rows", -1: "components"})
    scale = scale_from(temperature, z0)
    options = options_of(z0, z0.shape[0], in_batch=True, **given)
    if options.plain and reduction != "none" and exchange.world_size == 1:
        fused = pair_softmax_symmetric_loss(
            z0, z1, scale, normalize=normalize, mean=reduction == "mean", backend=backend
        )
        return with_stats(fused, scale, return_stats)
    # A loop, because dynamo can't read what a comprehension's walrus bound.
    both: dict[str, Any] = {}
    for name in ("query_ids", "row_weight", "ignore"):
        value = getattr(options, name)
        if value is not None:
            both[name] = torch.cat([value, value])
    options = options._replace(key_ids=both.get("query_ids"), **both)
    result = _view_rows(exchange, torch.cat([z0, z1]), scale, options, normalize, backend)
    loss = reduce_weighted(exchange, result.loss, reduction, options.row_weight, options.ignore)
    return with_stats(result._replace(loss=loss), scale, return_stats, options.ignore)


def _view_rows(
    exchange: Local,
    features: Tensor,  # [2N, D]
    scale: Tensor,  # []
    options: Options,
    normalize: bool,
    backend: str | None,
) -> ContrastiveLoss:
    """The loss of each view. In one process half of the tiles are enough."""
    rows, count = features.shape[0], features.shape[0] // 2
    query_ids, key_ids, (features,) = without_ignored(
        options, features, key_rows=rows, in_batch=True
    )
    norms = key_norms(features) if normalize else scale.new_ones(rows)
    diagonals = (0, count, -count)
    pairs = Pairs(features, features, norms, norms, query_ids, key_ids, diagonals)
    beta = options.hard_negative_beta
    ids = query_ids
    if options.ignore is not None and options.query_ids is None:
        # Here a query's id is a key's: each row has its own.
        own = torch.arange(rows, device=features.device)
        ids = own.masked_fill(options.ignore, IGNORED_ID)

    def sweep(factor: float) -> tuple[Tensor, Tensor]:
        scaled = scale if factor == 1.0 else scale * factor
        if exchange.world_size == 1:
            return pair_softmax_symmetric(
                features, scaled, norms, ids=ids, pairs=count, backend=backend
            )
        found = exchange.pair_softmax(
            features, features, scaled * norms, norms,
            query_ids=query_ids, key_ids=key_ids, diagonals=diagonals, backend=backend,
        )  # fmt: skip
        return found.row_lse, found.row_max

    lse, row_max = sweep(1.0 + beta)
    weights = sweep(beta)[0] if beta else None
    partner = features.roll(count, 0)
    positive_logit = scale * norms * norms.roll(count, 0) * row_dots(features, partner)
    losses, lse = finish_rows(exchange, pairs, scale, options, lse, weights, positive_logit)
    return ContrastiveLoss(losses, lse, positive_logit, row_max / (1.0 + beta))


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, ContrastiveStats]: ...


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """``F.cross_entropy((z @ z.T / temperature).fill_diagonal_(-inf), arange(2 * N).roll(N))``.

    Here z is ``F.normalize(torch.cat([z0, z1]))``. The loss of Chen et al., "A Simple Framework for
    Contrastive Learning of Visual Representations" (arXiv:2002.05709), computed on the symmetric
    half of the tiles of the product: memory grows with N.

    Args:
        z0: features of one view, [N, D].
        z1: features of the other view, [N, D]; row i shows the same image as row i of ``z0``.
        temperature: divides the similarities; a number, or a tensor of one element, which gets its
            gradient. A tensor's value is checked only on a CPU.
        reduction: "mean", "sum" or "none" (the loss of every row of z, [2N]).
        normalize: cosine similarities; False compares the features as they are. A zero row has
            similarity 0 to everything, and gradient 0.
        query_ids: int64 [N], an id for each image: views of images that share one are no negatives
            of each other.
        row_weight: [N], what the losses of an image's two views are multiplied by; a mean divides
            by the sum of weights.
        ignore: bool [N]; these images have no part in the loss: the result is that of the batch
            without them, whatever they hold.
        label_smoothing: as in ``F.cross_entropy``, in [0, 1).
        margin: subtracted from the positive's similarity.
        decoupled: the positive leaves the denominator, as in ``info_nce``.
        hard_negative_beta: how much harder negatives weigh more, as in ``info_nce``.
        return_stats: give ``(loss, stats)``, where stats is a NamedTuple, detached: ``lse`` [2N]
            over all keys of a row, ``top1``, the fraction of rows whose positive is no less similar
            than any negative, and ``positive_similarity``, its mean.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Features are float32, bfloat16, float16 or float64 (the reference's), both of one dtype and on
    one device; under autocast they are cast once. Products accumulate in fp32.

    Returns:
        The loss in nats, fp32 (float64 for float64 features). As in torch, the mean over an empty
        batch is NaN; one image alone has no negatives and loss 0.

    Raises:
        TypeError: a feature or temperature of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, an unknown option, a temperature
            that isn't above 0.
        RuntimeError: ``backend`` can't serve this call.
    """
    return nt_xent_over(
        Local(), z0, z1, temperature, reduction, normalize=normalize, query_ids=query_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


class NTXentLoss(ContrastiveModule):
    """``nt_xent`` as a module, the two views given to ``forward``; arguments as lightly's.

    With ``memory_bank_size`` (rows, or rows and their components) the negatives of ``out0`` are the
    rows of a memory bank, its positive is ``out1``, and the bank takes ``out1`` where ``out0`` asks
    for a gradient. With ``gather_distributed`` the negatives are those of all processes, and so are
    the loss and its gradient. A temperature that is an ``nn.Parameter`` is one of the module's
    parameters.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        decoupled: bool = False,
        hard_negative_beta: float = 0.0,
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
            label_smoothing=label_smoothing,
            margin=margin,
            decoupled=decoupled,
            hard_negative_beta=hard_negative_beta,
        )
        several = isinstance(memory_bank_size, (list, tuple))
        sizes: list[Any] = [*memory_bank_size] if several else [memory_bank_size]  # type: ignore[misc]
        if len(sizes) not in (1, 2) or not all(type(x) is int and x >= 0 for x in sizes):
            raise ValueError(
                "memory_bank_size must be a number of rows, 0 for none, or (rows, components); got "
                f"{memory_bank_size!r}"
            )
        if sizes[0] and gather_distributed:
            raise ValueError(
                "gather_distributed must be False with a memory bank, whose rows are the negatives;"
                f" got {gather_distributed!r}"
            )
        self.memory_bank_size = sizes[0]
        self.gather_distributed = gather_distributed
        self.memory_bank: MemoryBank | None = None
        if len(sizes) == 2 and sizes[0]:
            self.memory_bank = MemoryBank(sizes[0], sizes[1])

    def forward(self, out0: Tensor, out1: Tensor, **per_row: Any) -> Any:
        """The loss of two views, [N, D] each; ``(loss, stats)`` with ``return_stats``.

        ``per_row`` are ``row_weight``, ``ignore`` and, without a memory bank, whose rows have no
        ids, ``query_ids``.
        """
        if self.gather_distributed:
            from ssl_fast import distributed

            return distributed.nt_xent(out0, out1, **self.options(), **per_row)
        if not self.memory_bank_size:
            return nt_xent(out0, out1, **self.options(), **per_row)
        accept_features("out1", out1, "[N, D]")
        if self.memory_bank is None:
            # lightly's bank takes its width from the first batch.
            self.memory_bank = MemoryBank(self.memory_bank_size, out1.shape[1])
            self.memory_bank.to(out1.device)
        negatives = self.memory_bank.keys
        if negatives.dtype is not out1.dtype:
            negatives = negatives.to(out1.dtype)
        result = info_nce(out0, out1, negatives, **self.options(), **per_row)
        if out0.requires_grad:
            rows = out1.detach()
            rows = F.normalize(rows, dim=1) if self.normalize else rows
            self.memory_bank.enqueue(rows, per_row.get("ignore"))
        return result

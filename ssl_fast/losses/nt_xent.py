"""NT-Xent: two views of every image, each view against all others of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ssl_fast.losses.contrastive import (
    ContrastiveModule,
    ContrastiveStats,
    accept_features,
    check_options,
    check_same,
    contrastive_rows,
    scale_from,
    with_stats,
)
from ssl_fast.ops.pair_softmax_loss import pair_softmax_symmetric_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NTXentLoss", "nt_xent"]


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
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
    check_options(reduction, backend)
    z0, z1 = accept_features("z0", z0, "[N, D]"), accept_features("z1", z1, "[N, D]")
    check_same("z1", z1, "z0", z0, sizes={0: "rows", -1: "components"})
    scale = scale_from(temperature, z0)
    if reduction == "none":
        features, count = torch.cat([z0, z1]), z0.shape[0]
        result = contrastive_rows(
            features, features.roll(count, 0), features, scale,
            diagonals=(0, count, -count), normalize=normalize, backend=backend,
        )  # fmt: skip
    else:
        result = pair_softmax_symmetric_loss(
            z0, z1, scale, normalize=normalize, mean=reduction == "mean", backend=backend
        )
    return with_stats(result, scale, return_stats)


class NTXentLoss(ContrastiveModule):
    """``nt_xent`` as a module: the same options, the two views given to ``forward``.

    A temperature that is an ``nn.Parameter`` is one of the module's parameters.
    ``memory_bank_size`` and ``gather_distributed`` can only be off.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
        )
        if memory_bank_size != 0:
            raise ValueError(
                f"memory_bank_size must be 0, there is no memory bank yet; got {memory_bank_size!r}"
            )
        if gather_distributed:
            raise ValueError(
                f"gather_distributed must be False, nothing is gathered yet; got "
                f"{gather_distributed!r}"
            )

    def forward(self, out0: Tensor, out1: Tensor) -> Any:
        """The loss of two views, [N, D] each; ``(loss, stats)`` with ``return_stats``."""
        return nt_xent(out0, out1, **self.options())

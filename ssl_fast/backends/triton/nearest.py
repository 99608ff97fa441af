"""nearest on Triton: one sweep over the centroids, a float64 look at close calls, the distances.

16-bit products are exact in fp32 and their sum is not, so the sweep also keeps each row's second
best score. Rows whose two best are within the error of a score are listed on the device and scored
again from differences in float64 by as many programs as the card runs at a time: a few rows in a
thousand for ordinary features, all of them where every centroid has a copy, or where one is so
large that the others vanish beside it. No value is read on the host.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends import dispatch
from ssl_fast.backends.triton import centroid_update as triton_update
from ssl_fast.backends.triton import nearest_kernels as kernels
from ssl_fast.backends.triton.device import config_for, launching_on, processor_count
from ssl_fast.backends.triton.launch import tile_arguments

__all__ = ["Problems", "lloyd", "nearest", "problems_of", "squared_distances"]

ROW_BLOCK = 16
DEPTH_BLOCK = 128


@dataclass(frozen=True)
class Problems:
    """Two sets of rows for each problem, none of them empty, and what a score is made of."""

    x: Tensor  # [B, N, D], adjacent columns
    others: Tensor  # [B, M, D], adjacent columns
    scales: tuple[Tensor, Tensor] | None  # [B, N] and [B, M]
    center: Tensor | None  # [B, D], taken from both sides before they are multiplied
    half_norms: Tensor  # [B, M]

    def rows(self) -> dict[str, Any]:
        """The kernels' arguments for the two sets of rows."""
        return {
            "x": self.x,
            "others": self.others,
            "x_scale": self.x if self.scales is None else self.scales[0],
            "others_scale": self.x if self.scales is None else self.scales[1],
            "n_rows": self.x.shape[1],
            "n_others": self.others.shape[1],
            "depth": self.x.shape[2],
            "x_batch_stride": self.x.stride(0),
            "x_stride": self.x.stride(1),
            "others_batch_stride": self.others.stride(0),
            "others_stride": self.others.stride(1),
            "HAS_SCALE": self.scales is not None,
        }

    def tile(self, op: str) -> dict[str, Any]:
        """The kernels' arguments for a tile of scores."""
        # the table looks at the distance between rows; that between problems must be aligned too
        views = self.x[0], self.x[:, 0], self.others[0], self.others[:, 0]
        arguments = tile_arguments(config_for(op, *views), self.x[0])
        return {
            "half_norms": self.half_norms,
            "center": self.half_norms if self.center is None else self.center,
            "CENTERED": self.center is not None,
            "RESIDENT": self.x.shape[2] <= arguments["BLOCK_DEPTH"],
            **arguments,
        }

    def grid(self, block_rows: int) -> tuple[int]:
        """A program for each block of rows of each problem."""
        return (self.x.shape[0] * triton.cdiv(self.x.shape[1], block_rows),)


def _adjacent(rows: Tensor) -> Tensor:
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _center(others: Tensor, scale: Tensor | None) -> Tensor:
    """A point [B, D] near the rows' mean, 0 where that isn't finite.

    Without scales it lies on a grid of a power of two no wider than the rows' range, so that rows
    of small integers stay such and their ties ties.
    """
    count = others.shape[1]
    if scale is not None:
        mean = torch.bmm(scale.unsqueeze(1), others).squeeze(1) / count
    else:
        least, most = others.aminmax(dim=1)
        mean = others.mean(dim=1)
        step = torch.exp2(torch.log2(most - least).floor())
        mean = torch.where(step > 0.0, (mean / step).round() * step, mean)
    return torch.where(mean.isfinite(), mean, 0.0)


def problems_of(
    x: Tensor,  # [B, N, D]
    others: Tensor,  # [B, M, D]
    x_scale: Tensor | None,  # [B, N]
    others_scale: Tensor | None,  # [B, M]
) -> Problems:
    """The problems with their half norms, one small kernel; and for fp32 a center."""
    x, others = _adjacent(x), _adjacent(others)
    batch, count, depth = others.shape
    scales = None
    if x_scale is not None or others_scale is not None:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        scales = (
            (one.expand(x.shape[:2]) if x_scale is None else x_scale).contiguous(),
            (one.expand(batch, count) if others_scale is None else others_scale).contiguous(),
        )
    center = _center(others, others_scale) if x.dtype == torch.float32 else None
    half_norms = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    kernels.half_norms_kernel[(batch * triton.cdiv(count, ROW_BLOCK),)](
        others,
        half_norms if scales is None else scales[1],
        half_norms if center is None else center,
        half_norms,
        count,
        depth,
        others.stride(0),
        others.stride(1),
        HAS_SCALE=scales is not None,
        CENTERED=center is not None,
        BLOCK_ROWS=ROW_BLOCK,
        BLOCK_DEPTH=DEPTH_BLOCK,
    )
    return Problems(x, others, scales, center, half_norms)


def squared_distances(
    problems: Problems,
    indices: Tensor,  # [B, N] or [B, N, k], contiguous
) -> Tensor:
    """|u_i - v_j|^2 at the pairs that the indices name, 0 at negative ones."""
    squared = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
    per_problem = indices[0].numel()
    kernels.distances_kernel[(len(indices) * triton.cdiv(per_problem, ROW_BLOCK),)](
        indices=indices,
        squared=squared,
        pairs=per_problem,
        width=per_problem // indices.shape[1],
        BLOCK_ROWS=ROW_BLOCK,
        BLOCK_DEPTH=DEPTH_BLOCK,
        **problems.rows(),
    )
    return squared


def _score_error(problems: Problems, precision: str) -> float:
    """What a score may be off by, as a share of |u||v| + 1/2|v|^2.

    Each of D additions loses a bit or two of fp32's at most, as do the norms and the scales. TF32
    rounds both operands to 11 bits, and cards may cut instead.
    """
    rounded: float = 2.0**-9 if precision == "tf32" else 0.0
    return rounded + (problems.x.shape[2] + 16) * 2.0**-22


def nearest(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    lengths: Tensor | None,  # [B]
    distances: bool,
) -> tuple[Tensor, Tensor]:
    """Labels and, where asked for, squared distances."""
    batch, rows, _ = x.shape
    labels = torch.empty(batch, rows, dtype=torch.int64, device=x.device)
    if labels.numel() == 0:
        return labels, x.new_empty(batch, rows if distances else 0, dtype=torch.float32)
    with launching_on(x):
        problems = problems_of(x, centroids, x_scale, centroid_scale)
        tile = problems.tile("nearest")
        certify = x.dtype != torch.float32 or tile["PRECISION"] == "tf32"
        unsure = torch.empty_like(labels) if certify else labels
        unsure_count = torch.zeros(1, dtype=torch.int64, device=x.device)
        half_norms = problems.half_norms
        # a centroid of NaN is nobody's and decides nothing; one beyond fp32 puts all rows in doubt
        largest = half_norms.nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
        kernels.nearest_kernel[problems.grid(tile["BLOCK_ROWS"])](
            largest=largest,
            lengths=labels if lengths is None else lengths.contiguous(),
            labels=labels,
            unsure=unsure,
            unsure_count=unsure_count,
            error=_score_error(problems, tile["PRECISION"]),
            RAGGED=lengths is not None,
            CERTIFY=certify,
            **problems.rows(),
            **tile,
        )
        if certify:
            kernels.rescore_kernel[(4 * processor_count(x.device),)](
                unsure=unsure,
                unsure_count=unsure_count,
                labels=labels,
                BLOCK_COLUMNS=ROW_BLOCK,
                BLOCK_DEPTH=DEPTH_BLOCK,
                **problems.rows(),
            )
        if distances:
            return labels, squared_distances(problems, labels)
    return labels, half_norms.new_empty(batch, 0)


def lloyd(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    weight: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    distances: bool,
    *_hints: Tensor | int | None,  # previous [B, N] and columns, of no use here
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both steps one after the other: the second pass over x costs a small part of the sweep."""
    labels, squared = nearest(x, centroids, x_scale, centroid_scale, lengths, distances)
    count = centroids.shape[1]
    update = triton_update
    if x.is_cuda:
        shape = x.shape[1], count, x.shape[2]
        update = dispatch.select("centroid_update", "cuda", x.dtype, shape)
    sums, counts = update.centroid_update(x, labels, x_scale, weight, count)
    return labels, squared, sums, counts

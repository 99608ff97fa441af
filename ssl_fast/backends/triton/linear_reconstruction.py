"""linear_reconstruction on Triton: the losses alone in one product, or with the gradients in three.

The first product becomes the slopes a strip at a time, and those times the weight and times the
input are the library's. The losses and the bias's gradient are summed in the same pass, before the
slopes are rounded. Every result is reproducible, and no value is read on the host.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.reference.linear_reconstruction import check_probabilities
from ssl_fast.backends.reference.pointwise import KINDS
from ssl_fast.backends.triton import linear_reconstruction_kernels as kernels
from ssl_fast.backends.triton.device import config_for, launching_on
from ssl_fast.backends.triton.launch import Sides, rows_of, tile_arguments
from ssl_fast.backends.triton.strips import largest, strip_products

NOTHING, LOSSES, SLOPES = (x.value for x in (kernels.NOTHING, kernels.LOSSES, kernels.SLOPES))
# Of the sums that the tiles of one launch leave where no slopes are wanted.
PARTS_BYTES = 64 * 2**20


def linear_reconstruction(
    input: Tensor,  # [N, H]
    linear_weight: Tensor,  # [D, H]
    linear_bias: Tensor | None,  # [D]
    target: Tensor,  # [N, D]
    weight: Tensor | None,  # [N] or [N, D]
    mask: Tensor | None,  # [N] or [N, D], bool
    pos_weight: Tensor | None,  # [D]
    kind: str,
    parameter: float,
    target_scale: float,
    target_shift: float,
    elements: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum of the losses, or each of them, and the sum's gradients, all fp32."""
    if kind == "bce":
        check_probabilities(target, mask, target_scale, target_shift)
        kind = "bce_with_logits"
    with launching_on(input):
        if mask is not None:
            # A row that counts nowhere may hold NaN: 0 times it would be NaN.
            kept = mask if mask.dim() == 1 else mask.any(dim=1)
            input = torch.where(kept[:, None], input, 0.0)
        ones = torch.ones(max(input.shape[0], linear_weight.shape[0]), device=input.device)
        sides = Sides(
            rows_of(input), rows_of(linear_weight), ones[: len(input)], ones[: len(linear_weight)]
        )
        arguments = _arguments(
            linear_bias, target, weight, mask, pos_weight, ones,
            KINDS.index(kind), parameter, target_scale, target_shift,
        )  # fmt: skip
        empty = ones.new_empty(0)
        if not (need_input or need_weight or need_bias):
            return _losses(sides, arguments, elements), empty, empty, empty
        products = strip_products(
            kernels.losses_kernel,
            config_for("linear_reconstruction", sides.query, sides.key),
            sides,
            {**arguments, "LEAVES": SLOPES},
            bound=_bound(sides, linear_bias, target, weight, pos_weight, kind, arguments),
            want_query=need_input,
            want_key=need_weight,
            row_sums=1,
            column_sums=1,
        )
        losses = products.row_sums[0]
        return (
            losses.sum(dtype=torch.float64).float(),
            _restored(products.query, products.restore_query, empty),
            _restored(products.key, products.restore_key, empty),
            # results that share memory would share a version counter
            products.column_sums[0].clone() if need_bias else empty,
        )


def _restored(sums: Tensor | None, restore: Tensor | None, empty: Tensor) -> Tensor:
    if sums is None:
        return empty
    return sums if restore is None else sums * restore[:, None]


def _arguments(
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    some: Tensor,
    kind: int,
    parameter: float,
    target_scale: float,
    target_shift: float,
) -> dict[str, Any]:
    """The kernel's own arguments; ``some`` stands where there is no tensor."""
    target = rows_of(target)
    weights, kept = some, some.view(torch.int8)
    if weight is not None:
        weights = weight.contiguous() if weight.dim() == 1 else rows_of(weight)
    if mask is not None:
        kept = (mask.contiguous() if mask.dim() == 1 else rows_of(mask)).view(torch.int8)
    return {
        "bias": some if linear_bias is None else linear_bias.float().contiguous(),
        "target": target,
        "weight": weights,
        "mask": kept,
        "pos_weight": some if pos_weight is None else pos_weight.contiguous(),
        "target_stride": target.stride(0),
        "weight_stride": weights.stride(0),
        "mask_stride": kept.stride(0),
        "parameter": parameter,
        "target_scale": target_scale,
        "target_shift": target_shift,
        "KIND": kind,
        "POSITIVE": pos_weight is not None,
        "HAS_BIAS": linear_bias is not None,
        "WEIGHT": 0 if weight is None else weight.dim(),
        "MASK": 0 if mask is None else mask.dim(),
    }


def _bound(
    sides: Sides,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: str,
    arguments: dict[str, Any],
) -> Tensor:
    """What no slope exceeds: fp16 strips are scaled by it."""
    bound = sides.query_scale.new_ones(())
    if sides.query.dtype != torch.float16:
        return bound
    if kind == "huber":
        bound = bound * arguments["parameter"]
    elif kind == "mse":
        norms = (
            largest(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32))
            for x in (sides.query, sides.key)
        )
        size = next(norms) * next(norms)
        if linear_bias is not None:
            size = size + largest(linear_bias.float())
        goal = largest(target).float() * abs(arguments["target_scale"])
        bound = 2.0 * (size + goal + abs(arguments["target_shift"]))
    elif pos_weight is not None:
        bound = largest(pos_weight).clamp(min=1.0)
    return bound if weight is None else bound * largest(weight)


def _losses(sides: Sides, arguments: dict[str, Any], elements: bool) -> Tensor:
    """The sum of the losses, or each of them, a block of rows at a time."""
    n, d = len(sides.query), len(sides.key)
    losses = sides.query_scale.new_empty((n, d) if elements else (0,))
    sums = sides.query_scale.new_zeros(n)
    if n and d:
        config = config_for("linear_reconstruction", sides.query, sides.key)
        column_tiles = triton.cdiv(d, config.block_columns)
        tall = max(1, PARTS_BYTES // 4 // column_tiles // config.block_rows) * config.block_rows
        for top in range(0, n, tall):
            bottom = min(top + tall, n)
            row_tiles = triton.cdiv(bottom - top, config.block_rows)
            parts = sums.new_empty(column_tiles, row_tiles * config.block_rows)
            kernels.losses_kernel[(row_tiles * column_tiles,)](
                row_factor=sums,
                column_factor=sums,
                strip=losses if elements else sums,
                row_parts=parts,
                column_parts=sums,
                row_begin=top,
                row_end=bottom,
                column_begin=0,
                column_end=d,
                strip_width=d,
                HAS_FACTORS=False,
                LEAVES=LOSSES if elements else NOTHING,
                **sides.features(),
                **arguments,
                **tile_arguments(config, sides.query),
            )
            sums[top:bottom] = parts.sum(0)[: bottom - top]
    return losses if elements else sums.sum(dtype=torch.float64).float()

"""The sweep over all pairs that leaves, beside the rows' statistics, their expected keys."""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_flash_kernels as kernels
from ssl_fast.backends.triton.choice import is_fused
from ssl_fast.backends.triton.device import architecture_for, config_for
from ssl_fast.backends.triton.launch import key_splits, tile_arguments
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs
from ssl_fast.backends.triton.strips import operand


@dataclass(frozen=True)
class Expectation:
    """What a sweep leaves of each row's softmax: sum_j p_ij ks_j k_j = restore sums_i."""

    row_lse: Tensor  # [N]
    row_max: Tensor  # [N]
    sums: Tensor  # [N, D] fp32
    restore: Tensor | None  # []; None is 1


def flashes(pairs: Pairs) -> bool:
    """Whether `expectation` serves these pairs: where one side's sums are fused."""
    (n, depth), m = pairs.query.shape, len(pairs.key)
    architecture = architecture_for(pairs.query, pairs.key)
    return is_fused("one_side", pairs.query.dtype, (n, m, depth), architecture)


def expectation(pairs: Pairs) -> Expectation:
    """Log-sum-exp and maximum per row, -inf where nothing is kept, and the expected key, then 0.

    One sweep, whose splits of the keys are merged in a fixed order.
    """
    n, m, depth = len(pairs.query), len(pairs.key), pairs.query.shape[1]
    empty = pairs.query_scale.new_empty
    if n == 0 or m == 0:
        row = pairs.query_scale.new_full((n,), -torch.inf)
        return Expectation(row, row.clone(), pairs.query_scale.new_zeros(n, depth), None)
    restore = None
    if pairs.query.dtype == torch.float16:
        # as for any product with fp16 weights, the keys' powers of two go into a copy of them
        right = operand(pairs.key, pairs.key_scale, multiplied=True)
        if right.shift is not None:
            restore = 1.0 / right.shift
            scale = pairs.scale * restore
            pairs = replace(pairs, key=right.rows, key_scale=right.mantissa, scale=scale)
    config = config_for("flash", pairs.query, pairs.key, ids=pairs.ids > 0)
    config = replace(config, block_depth=max(16, triton.next_power_of_2(depth)))
    blocks = triton.cdiv(n, config.block_rows)
    splits = key_splits(blocks, m, config, pairs.query.device)
    parts = (splits,) if splits > 1 else ()
    row_lse, row_max, sums = empty(*parts, n), empty(*parts, n), empty(*parts, n, depth)
    kernels.expectation_kernel[(blocks, splits)](
        query_scale=pairs.query_scale,
        key_scale=pairs.key_scale,
        scale=pairs.scale,
        lse_parts=row_lse,
        max_parts=row_max,
        sum_parts=sums,
        n_queries=n,
        n_keys=m,
        **pairs.features(),
        **pairs.rules(),
        **tile_arguments(config, pairs.query),
    )
    if splits > 1:
        lse_parts, row_lse = row_lse, torch.logsumexp(row_lse, 0)
        row_max = row_max.amax(0)
        # of no keys, exp(-inf + inf) would be NaN
        shift = row_lse.masked_fill(row_lse == -torch.inf, 0.0)
        sums = (sums * torch.exp(lse_parts - shift)[:, :, None]).sum(0)
    return Expectation(row_lse, row_max, sums, restore)

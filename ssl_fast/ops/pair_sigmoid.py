"""pair_sigmoid: sum of softplus of scaled products of all pairs of rows, never storing a pair.

s_ij = query_scale_i key_scale_j <q_i, k_j> + bias. A row's loss is the sum over keys of
softplus(s_ij), and of softplus(-s_ij) for its positive. Nothing has to be normalised, so one pass
of three products gives loss and gradient. Gradients of gradients are those of the reference
formula, which stores the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.autograd import Function

from ssl_fast.backends.reference import pair_sigmoid as reference
from ssl_fast.ops.gradients import (
    apart,
    differentiated_again,
    open_signature,
    vector_jacobian,
    wants,
)
from ssl_fast.ops.made_gradient import reduced_loss
from ssl_fast.ops.registration import empty_like, empty_rows, implementation, register

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["pair_sigmoid"]


def _fake(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> Any:
    need_query, need_key = rest[-2:]
    count = None if need_query or need_key else 0
    return (
        empty_rows(query),
        empty_like(query, need_query, query),
        empty_like(key, need_key, key),
        empty_rows(query, count),
        empty_rows(key, count),
        empty_rows(query, count),
    )


_pair_sigmoid = register(
    "pair_sigmoid(Tensor query, Tensor key, Tensor query_scale, Tensor key_scale, Tensor bias, "
    "Tensor? row_weight, SymInt? positive_diagonal, bool need_query, bool need_key, *, "
    'str backend="") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    implementation("pair_sigmoid", 1, "pair_sigmoid"),
    _fake,
)


class _Plan(NamedTuple):
    """Inputs: query, key, query_scale, key_scale, bias."""

    positive_diagonal: int | None
    needs: tuple[bool, bool]  # query, key
    backend: str
    mean: bool = False
    rows: int = 1
    inputs: int = 5

    def operator(self, *tensors: Any) -> Any:
        rules = (None, self.positive_diagonal, *self.needs)
        return _pair_sigmoid(*tensors, *rules, backend=self.backend)

    def formula(self, *tensors: Any) -> Any:
        rules: Any = (None, self.positive_diagonal, *self.needs)
        return reference.pair_sigmoid(*tensors, *rules)

    def per_input(self, made: Sequence[Tensor]) -> Sequence[Tensor]:
        return made


class _Rows(Function):
    """The loss of each row; the gradient is made in the backward, for the weights it comes with."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _pair_sigmoid(*arguments[:5], None, arguments[5], False, False, backend=backend)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        *tensors, ctx.positive_diagonal, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[:5]
        # The scales' and the bias's gradients come with a feature's.
        needs = needed[0] or not needed[1], needed[1]
        arguments = (*ctx.saved_tensors, grads[0].contiguous(), ctx.positive_diagonal, *needs)
        if differentiated_again():
            made: Any = _RowsGradient.apply(*arguments, ctx.backend)  # type: ignore[no-untyped-call]
        else:
            made = _pair_sigmoid(*arguments, backend=ctx.backend)[1:]
        *found, grad_bias = made
        found.append(grad_bias.sum())
        return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None


class _RowsGradient(Function):
    """The gradients of pair_sigmoid; their own gradient is the reference formula's."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, backend = inputs
        return _pair_sigmoid(*arguments, backend=backend)[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules = inputs[6:9]
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def formula(*values: Any) -> Any:
            gradients: Any = reference.pair_sigmoid
            return gradients(*values, *ctx.rules)[1:]

        found = vector_jacobian(formula, ctx.saved_tensors, ctx.needs_input_grad[:6], grads)
        return *found, None, None, None, None


def pair_sigmoid(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    bias: Tensor,  # []
    *,
    positive_diagonal: int | None = None,
    reduce: bool,
    backend: str | None = None,
) -> Tensor:
    """``F.softplus(sign * s).sum(dim=1)``, sign -1 for the pair j = i + positive_diagonal.

    ``reduce`` gives the sum over rows, whose gradient is made in the forward pass; without it the
    loss of each row [N], whose gradient takes the three products again. Differentiable in all
    tensors, to any order. Scales and bias are fp32 (float64 beside float64 features).
    """
    key = apart(key, query)
    tensors = (query, key, query_scale.contiguous(), key_scale.contiguous(), bias)
    if not reduce:
        rows: Tensor = _Rows.apply(*tensors, positive_diagonal, backend or "")  # type: ignore[no-untyped-call]
        return rows
    needs = wants(query), wants(key)
    if not any(needs) and any(wants(x) for x in tensors[2:]):
        needs = (True, False)
    return reduced_loss(_Plan(positive_diagonal, needs, backend or ""), *tensors)[0]

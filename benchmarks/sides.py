"""Who is measured: ssl_fast's backends and its peers, each as a function of a case's inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import TWO_VIEWS, Case, inputs
from benchmarks.workloads import WORKLOADS, Loss
from ssl_fast.backends import dispatch


class Outcome(NamedTuple):
    """What one pass gives: the scalar loss and, if asked for, that of each learned input."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


Step = Callable[[], Outcome]

# Losses whose gradient the forward pass makes, so that the backward pass is a scaling.
MADE_IN_FORWARD = ("info_nce", "nt_xent", "siglip", "info_nce_queue")


@dataclass(frozen=True)
class Side:
    """One row of a group."""

    name: str
    build: Callable[[Case], Loss]
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    devices: tuple[str, ...] = ("cpu", "cuda")
    backend: str | None = None  # of ssl_fast; None is a peer
    package: str | None = None  # that has to be installed
    # Dense matrices alive at the peak, to foretell memory without running into the wall.
    matrices: float = 0.0
    cubic: bool = False
    # What the loss is multiplied by before its backward: a saved gradient is then scaled for real.
    grad_output: float = 1.0
    compiled: bool = False

    def bytes_needed(self, case: Case) -> float:
        """Memory foretold beyond the inputs."""
        per_row = case.rows if self.cubic else 1
        return self.matrices * case.matrix_bytes * per_row

    def refuses(self, case: Case) -> str | None:
        """Why this side can't run the case, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.backend is not None:
            try:
                shape = (case.rows, case.columns, case.dim)
                dispatch.resolve(case.op, case.device, case.torch_dtype, shape, self.backend)
            except RuntimeError as error:
                return str(error).partition(": ")[2]
        return None

    def step(self, case: Case) -> Step:
        """A call that runs one pass on inputs made beforehand."""
        loss = self.build(case)
        learned, fixed = inputs(case)
        for tensor in learned:
            tensor.requires_grad_(case.gradient)
        synchronize = torch.cuda.synchronize if case.device == "cuda" else _nothing

        def forward() -> Outcome:
            with torch.no_grad():
                value = loss(*learned, *fixed)
            synchronize()
            return Outcome(value, ())

        def both() -> Outcome:
            value = loss(*learned, *fixed)
            scaled = value if self.grad_output == 1.0 else value * self.grad_output
            gradients = torch.autograd.grad(scaled, learned)
            synchronize()
            return Outcome(value, gradients)

        return both if case.gradient else forward


def _nothing() -> None:
    """In place of a device's synchronisation on a CPU."""


def _ours(backend: str) -> Callable[[Case], Loss]:
    return lambda case: WORKLOADS[case.workload].ours(case, backend)


def _eager(case: Case) -> Loss:
    return WORKLOADS[case.workload].eager(case)


def _compiled(case: Case) -> Loss:
    # Forgotten between cases: the count of recompilations that a function may have is limited.
    torch.compiler.reset()
    return torch.compile(_eager(case), dynamic=False)


def _info_nce_pytorch(case: Case) -> Loss:
    from info_nce import InfoNCE

    return InfoNCE(temperature=case.temperature)


def _metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=case.temperature))


def _metric_learning_sup_con(case: Case) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=case.temperature)


class _OneSided(torch.autograd.Function):
    """NT-Xent through the one-sided sweep with its three products, as if it weren't symmetric."""

    @staticmethod
    def forward(ctx, z: Tensor, temperature: float, backend: str) -> Tensor:
        half = z.shape[0] // 2
        sweep = dispatch.load(backend, "pair_softmax").pair_softmax_loss
        asked = ctx.needs_input_grad[0]
        scale = torch.tensor(1.0 / temperature, device=z.device)
        result = sweep(
            z, z.roll(half, 0), z, scale, None, None, [0, half, -half], True, asked, asked, asked
        )
        if asked:
            of_query, of_positive, of_key = result[4:7]
            ctx.save_for_backward(of_query + of_positive.roll(half, 0) + of_key)
        return result[0].mean()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = grad_output.float() / gradient.shape[0]
        return (gradient.float() * factor).to(gradient.dtype), None, None


def _one_sided(case: Case) -> Loss:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        return _OneSided.apply(torch.cat([first, second]), case.temperature, "native")

    return loss


NATIVE = Side("ssl_fast native", _ours("native"), devices=("cpu",), backend="native")
NATIVE_SCALED = replace(NATIVE, name="ssl_fast native, grad_output 0.5", grad_output=0.5)
TRITON = Side("ssl_fast triton", _ours("triton"), devices=("cuda",), backend="triton")
# The reference works in chunks of at most 256 MB.
REFERENCE = Side("ssl_fast reference", _ours("reference"), backend="reference")
ONE_SIDED = Side(
    "ssl_fast one-sided sweep", _one_sided, ("nt_xent",), devices=("cpu",), backend="native"
)
EAGER = Side("eager torch", _eager, ("info_nce", "nt_xent", "info_nce_queue"), matrices=3.0)
EAGER_SUP_CON = Side("eager torch (SupCon formula)", _eager, ("sup_con",), matrices=4.0)
OPEN_CLIP = Side("eager torch (open_clip formula)", _eager, ("clip", "siglip"), matrices=5.0)
BASELINES = (EAGER, EAGER_SUP_CON, OPEN_CLIP)
COMPILED = Side("torch.compile", _compiled, matrices=2.0, compiled=True)
INFO_NCE_PYTORCH = Side(
    "info-nce-pytorch", _info_nce_pytorch, ("info_nce",), package="info_nce", matrices=3.0
)
# It lists every pair of a positive and a negative: rows^3 entries, in six tensors.
METRIC_LEARNING = Side(
    "pytorch-metric-learning",
    _metric_learning,
    ("nt_xent",),
    package="pytorch_metric_learning",
    matrices=6.0,
    cubic=True,
)
METRIC_LEARNING_SUP_CON = Side(
    "pytorch-metric-learning SupCon",
    _metric_learning_sup_con,
    ("sup_con",),
    package="pytorch_metric_learning",
    matrices=12.0,
)

SIDES = (
    NATIVE,
    NATIVE_SCALED,
    TRITON,
    REFERENCE,
    ONE_SIDED,
    *BASELINES,
    COMPILED,
    INFO_NCE_PYTORCH,
    METRIC_LEARNING,
    METRIC_LEARNING_SUP_CON,
)
BY_NAME = {side.name: side for side in SIDES}


def sides_of(case: Case, *, full: bool) -> list[Side]:
    """The rows of a group. The default run leaves out what says little or takes long."""
    chosen = [
        side for side in SIDES if case.workload in side.workloads and case.device in side.devices
    ]
    return chosen if full else [side for side in chosen if _by_default(side, case)]


def baseline_of(case: Case) -> Side:
    """The side that every ratio of the case's group is taken against."""
    return next(side for side in BASELINES if case.workload in side.workloads)


def _by_default(side: Side, case: Case) -> bool:
    telling = case.telling and case.dtype == "fp32"
    if side is ONE_SIDED:
        return telling
    if side is NATIVE_SCALED:
        return telling and case.workload in MADE_IN_FORWARD
    if side is REFERENCE:
        return case.rows < 512
    if side is COMPILED:
        # A compilation takes 20 s, whatever the size.
        return telling or (case.telling and case.workload in TWO_VIEWS)
    return True

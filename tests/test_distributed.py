"""ssl_fast.distributed: equal to one process on the global batch, or an error that says why not."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

import ssl_fast.distributed

README = Path(__file__).parents[1] / "README.md"
MODES = ("ring", "all_gather")
ROWS = 12  # of the global batch
# The shares of two and of three ranks; None: equal ones, which needn't be told.
SHARES = {2: (None, (7, 5)), 3: ((5, 0, 7),)}
IGNORED = torch.arange(ROWS) % 5 == 1
IDS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 2, 8, 9, 9, 11])
WEIGHTS = torch.rand(ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OPTIONS = (
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"query_ids": IDS},
    {"ignore": IGNORED},
    {"row_weight": WEIGHTS},
    {"label_smoothing": 0.2},
    {"margin": 0.1},
    {"decoupled": True},
    {"hard_negative_beta": 0.5},
    {"query_ids": IDS, "ignore": IGNORED, "row_weight": WEIGHTS, "label_smoothing": 0.1,
     "margin": 0.1, "reduction": "sum"},
    {"query_ids": IDS, "ignore": IGNORED, "decoupled": True, "hard_negative_beta": 1.0},
    {"query_ids": IDS, "ignore": IGNORED, "row_weight": WEIGHTS, "reduction": "none"},
)  # fmt: skip
LABELS = torch.tensor([0, 1, 2, 1, 0, 5, 2, 2, 7, 0, 1, 3])


def cases():
    """The function, its features (per row of the batch), its learned scalars, its options."""
    two = {"query": (9,), "positive_key": (9,)}
    for options in OPTIONS:
        yield "info_nce", two, {"temperature": 0.2}, options
        yield "nt_xent", {"z0": (9,), "z1": (9,)}, {"temperature": 0.3}, options
        clip = {"image_features": (9,), "text_features": (9,)}
        learned = {"logit_scale": 5.0, "logit_bias": -1.0}
        yield "clip_loss", clip, learned, {"normalize": True, **options}
    texts = {"query_ids": IDS, "key_ids": IDS.roll(3)}
    yield "info_nce", two, {"temperature": 0.2}, texts
    yield "clip_loss", clip, {"logit_scale": 5.0}, {"normalize": True, **texts}
    for reduction in ("mean", "sum", "none"):
        negatives = {**two, "negative_keys": (9,)}
        yield "info_nce", negatives, {"temperature": 0.2}, {"reduction": reduction}
        yield "info_nce", negatives, {}, {"reduction": reduction, "label_smoothing": 0.1}
        paired = {**two, "negative_keys": (4, 9)}
        options = {"reduction": reduction, "negative_mode": "paired"}
        yield "info_nce", paired, {"temperature": 0.2}, options
        yield "siglip_loss", clip, learned, {"normalize": True, "reduction": reduction}
        labels = {"labels": LABELS, "reduction": reduction}
        one, views = {"embeddings": (9,)}, {"embeddings": (2, 9)}
        yield "sup_con", one, {"temperature": 0.3}, labels
        yield "sup_con", views, {"temperature": 0.3}, labels
        reference = {**one, "ref_emb": (9,)}
        classes = {**labels, "ref_labels": LABELS.roll(2)}
        yield "sup_con", reference, {}, classes
        yield "sup_con", reference, {}, {**classes, "margin": 0.1, "hard_negative_beta": 0.5}
    for options in (
        {"ignore": IGNORED},
        {"row_weight": WEIGHTS},
        {"label_smoothing": 0.2},
        {"decoupled": True},
        {"query_ids": IDS, "label_smoothing": 0.1},
        {"margin": 0.1, "hard_negative_beta": 0.5},
        {"query_ids": IDS, "ignore": IGNORED, "decoupled": True, "hard_negative_beta": 1.0},
    ):
        yield "sup_con", one, {"temperature": 0.3}, {"labels": LABELS, **options}
    yield "info_nce", two, {"temperature": 0.01}, {"normalize": True}  # scale 100
    yield "clip_loss", clip, {"logit_scale": 100.0}, {"normalize": True}


def rows_of(function, share, total):
    """Where a share's losses stand among the rows of the global batch."""
    rows = torch.arange(total)[share]
    return torch.cat([rows, rows + total]) if function == "nt_xent" else rows


def compare(case, mode, sizes, dtype, world_size, rank, group=None):
    """Value, features' and scalars' gradients against one process on the global batch."""
    name, shapes, learned, options = case
    starts = [0, *itertools.accumulate(sizes or (ROWS // world_size,) * world_size)]
    share = slice(starts[rank], starts[rank + 1])
    # Every rank has some of the keys that aren't part of the batch, and not as many.
    counts = [x - (x > 1) * sizes.count(0) + (x == 0) * (world_size - 1) for x in sizes or ()]
    key_starts = [0, *itertools.accumulate(counts)] if sizes else starts
    key_share = slice(key_starts[rank], key_starts[rank + 1])
    shares = {
        key: key_share if key in ("negative_keys", "ref_emb", "ref_labels") else share
        for key in (*shapes, *options)
    }
    if options.get("negative_mode") == "paired":
        shares["negative_keys"] = share
    generator = torch.Generator().manual_seed(7)
    whole = {
        key: torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for key, shape in shapes.items()
    }
    mine = {key: x.detach()[shares[key]].clone().requires_grad_() for key, x in whole.items()}
    results = []
    for features in (whole, mine):
        scalars = {
            key: torch.tensor(x, dtype=dtype, requires_grad=True) for key, x in learned.items()
        }
        arguments = {
            key: (x if features is whole else x[shares[key]]).to(
                dtype if x.is_floating_point() else x.dtype
            )
            if isinstance(x, torch.Tensor)
            else x
            for key, x in options.items()
        }
        if features is whole:
            loss = getattr(ssl_fast, name)(**features, **scalars, **arguments)
        else:
            loss = getattr(ssl_fast.distributed, name)(
                **features, **scalars, **arguments, mode=mode, group=group,
                sizes=sizes and list(sizes),
            )  # fmt: skip
        results.append((loss, scalars))
    (expected, expected_scalars), (loss, scalars) = results
    factor = world_size
    if options.get("reduction") == "none":
        at = rows_of(name, share, ROWS)
        weight = torch.linspace(0.5, 2, expected.numel(), dtype=dtype).view_as(expected)
        weight_here, expected_here = weight[at], expected[at]
        # Rows are each rank's own to weigh; a sum over ranks stands for DDP's average.
        factor = 1
        (expected * weight).sum().backward()
        (loss * weight_here).sum().backward()
        expected = expected_here
    else:
        (expected * 1.5).backward()
        (loss * 1.5).backward()
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    )

    def same(found, right, what):
        torch.testing.assert_close(
            found, right, **tolerance, msg=lambda m: f"{what} of {case} {mode} {sizes}: {m}"
        )

    same(loss.detach(), expected.detach(), "value")
    for key, x in mine.items():
        grad = whole[key].grad[shares[key]] * factor
        assert x.grad is not None, f"{key} of {case} {mode} {sizes}"
        same(x.grad, grad, key)
    for key, x in scalars.items():
        averaged = x.grad.clone()
        dist.all_reduce(averaged, group=group)
        same(averaged / factor, expected_scalars[key].grad, key)


def _equal_one_process(rank, world_size):
    *_, last = SHARES[world_size]
    for number, (mode, case) in enumerate(itertools.product(MODES, cases())):
        for sizes in SHARES[world_size]:
            compare(case, mode, sizes, torch.float64, world_size, rank)
        if number % 3 == 0:
            compare(case, mode, last, torch.float32, world_size, rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_to_one_process_on_the_global_batch(world_size):
    processes.run(_equal_one_process, world_size)


def _groups(rank, mode):

    # Rank 1 is in both at once; in the second, ranks of the group aren't ranks of the world.
    first, second = dist.new_group([0, 1]), dist.new_group([1, 2])
    for case in list(cases())[:6]:
        for group, ranks in ((first, (0, 1)), (second, (1, 2))):
            if rank in ranks:
                compare(case, mode, (7, 5), torch.float64, 2, dist.get_rank(group), group)
    features = {
        group: [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
        for group, ranks in ((first, (0, 1)), (second, (1, 2)))
        if rank in ranks
    }
    # Two losses under way at once, one backward for both.
    losses = [ssl_fast.distributed.info_nce(*x, group=g, mode=mode) for g, x in features.items()]
    sum(losses).backward()
    grads = [x.grad.clone() for pair in features.values() for x in pair]
    for group, pair in features.items():
        for x in pair:
            x.grad = None
        ssl_fast.distributed.info_nce(*pair, group=group, mode=mode).backward()
    again = [x.grad for pair in features.values() for x in pair]
    torch.testing.assert_close(grads, again)


def _all_groups(rank, world_size):
    for mode in MODES:
        _groups(rank, mode)


def test_process_groups():
    processes.run(_all_groups, 3)


def _details(rank, world_size):

    over, one = ssl_fast.distributed, ssl_fast
    torch.manual_seed(11)
    whole = [torch.randn(ROWS, 7) for _ in range(2)]
    first, second = (x[rank::world_size].contiguous() for x in whole)
    for mode in MODES:
        # Half precision: as near as one process comes to the same in fp32.
        for dtype in (torch.bfloat16, torch.float16):
            for name, more in (
                ("info_nce", ()),
                ("clip_loss", (3.0,)),
                ("siglip_loss", (3.0, -1.0)),
            ):
                loss = getattr(over, name)(first.to(dtype), second.to(dtype), *more, mode=mode)
                exact = getattr(one, name)(*whole, *more)
                assert loss.dtype is torch.float32
                torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
        # Every rank has the loss, and statistics of its own rows over all keys.
        loss, stats = over.info_nce(first, second, mode=mode, return_stats=True)
        expected, whole_stats = one.info_nce(*whole, return_stats=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats.lse, whole_stats.lse[rank::world_size])
        # A frozen tower gets no gradient, the other the right one; retained graphs repeat it.
        query = first.clone().requires_grad_()
        over.clip_loss(query, second, 5.0, normalize=True, mode=mode).backward()
        exact_query = whole[0].clone().requires_grad_()
        one.clip_loss(exact_query, whole[1], 5.0, normalize=True).backward()
        expected = exact_query.grad[rank::world_size] * world_size
        torch.testing.assert_close(query.grad, expected, rtol=1e-4, atol=1e-6)
        key = second.clone().requires_grad_()
        loss = over.info_nce(first, key, mode=mode)
        loss.backward(retain_graph=True)
        before = key.grad.clone()
        loss.backward()
        torch.testing.assert_close(key.grad, 2 * before)
        with torch.no_grad():
            assert not over.siglip_loss(query, second, 5.0, -1.0, mode=mode).requires_grad
        # Padding of an ignored row may hold anything.
        padded = [x.clone() for x in (first, second)]
        for x in padded:
            x[0] = torch.nan
        ignore = torch.arange(len(first)) == 0
        for name, more in (("info_nce", ()), ("nt_xent", ()), ("clip_loss", (5.0,))):
            assert getattr(over, name)(*padded, *more, ignore=ignore, mode=mode).isfinite()
        # All rows ignored: nothing to learn from, and no NaN.
        query = first.clone().requires_grad_()
        nothing = torch.ones(len(first), dtype=torch.bool)
        loss = over.info_nce(query, second, ignore=nothing, mode=mode)
        loss.backward()
        assert loss == 0
        assert torch.all(query.grad == 0)
    query = first.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        over.info_nce(query, second).backward()
    assert query.grad.isfinite().all()


def test_details():
    processes.run(_details, 2)


def _modules(rank, world_size):
    torch.manual_seed(12)
    whole = [torch.nn.functional.normalize(torch.randn(ROWS, 7), dim=1) for _ in range(2)]
    first, second = (x[rank * 6 : rank * 6 + 6].clone().requires_grad_() for x in whole)
    exact = [x.requires_grad_() for x in whole]

    def check(loss, expected):
        torch.testing.assert_close(loss.detach(), expected.detach())
        expected.backward()
        loss.backward()
        for x, e in zip((first, second), exact, strict=True):
            right = e.grad[rank * 6 : rank * 6 + 6] * world_size
            torch.testing.assert_close(x.grad, right, rtol=1e-4, atol=1e-6)
            x.grad = e.grad = None

    # open_clip's flags: half of the gradient, or a wrong direction, is what they give there.
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        module = ssl_fast.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
        check(module(first, second, 10.0), ssl_fast.clip_loss(*exact, 10.0))
    for dist_impl in (None, "gather", "bidir"):
        module = ssl_fast.SigLipLoss(rank=rank, world_size=world_size, dist_impl=dist_impl)
        check(module(first, second, 10.0, -10.0), ssl_fast.siglip_loss(*exact, 10.0, -10.0))
    module = ssl_fast.NTXentLoss(gather_distributed=True)
    check(module(first, second), ssl_fast.nt_xent(*exact))


def test_modules_of_other_packages_shapes():
    processes.run(_modules, 2)


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that any operation has made."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return made


def _memory(rank, world_size):
    over = ssl_fast.distributed
    rows, width = 512, 4
    limits = {"ring": 4 * rows * width * 4 + 4096, "all_gather": 4 * world_size * rows * width * 4}
    for mode, (name, more) in itertools.product(
        MODES, (("info_nce", ()), ("clip_loss", (2.0,)), ("siglip_loss", (2.0, 0.0)))
    ):
        inputs = [torch.randn(rows, width, requires_grad=True) for _ in range(2)]
        with _LargestTensor() as seen:
            getattr(over, name)(*inputs, *more, mode=mode, backend="native").backward()
        assert 0 < seen.largest <= limits[mode] < rows * rows * 4, (name, mode, seen.largest)


def test_memory_is_linear_in_the_share():
    processes.run(_memory, 2)


def _readme(nproc, tmp_path):
    text = README.read_text()
    section = text[text.index("## Training across machines") :]
    script = tmp_path / "train.py"
    script.write_text(section.split("```python\n", 1)[1].split("```", 1)[0])
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}",
        "--master-addr=127.0.0.1", f"--master-port={processes.free_port()}", str(script),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return sorted(run.stdout.split("\n"))[-2:]


def test_the_example_of_the_readme(tmp_path):
    # Rank 0 prints a line for DDP and one for FSDP2: the loss after training on the same batches.
    expected = [re.split(" +", line) for line in _readme(1, tmp_path)]
    assert [line[0] for line in expected] == ["DistributedDataParallel", "fully_shard"]
    for nproc in (2, 3):
        for line, right in zip(_readme(nproc, tmp_path), expected, strict=True):
            name, loss = re.split(" +", line)
            assert name == right[0]
            assert float(loss) == pytest.approx(float(right[1]), rel=1e-4)

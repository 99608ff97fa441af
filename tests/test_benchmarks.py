"""The benchmarks' own check: they compare with the right answer, and they run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
# Behind everything else: the checkout's ssl_fast must not shadow the installed one.
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    agreement,
    figures,
    memory,
    report,
    ring,
    sides,
    targets,
    targets_clustering,
    targets_contrastive,
    targets_linear,
    targets_pair_softmax,
    targets_reconstruction,
    timing,
)
from benchmarks.cases import Case, default_cases, full_cases, inputs  # noqa: E402
from benchmarks.sides import Outcome  # noqa: E402
from benchmarks.workloads import OPS, WORKLOADS  # noqa: E402

INFO_NCE = Case("info_nce", 48, 12)
NT_XENT = Case("nt_xent", 48, 12)
CASES = [
    INFO_NCE,
    NT_XENT,
    Case("clip", 48, 12),
    Case("siglip", 48, 12),
    Case("sup_con", 48, 12),
    Case("info_nce_queue", 24, 12, queue=70),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.workload)


def reference(case):
    """ssl_fast's reference backend in float64."""
    learned, fixed = (
        [x.double() if x.is_floating_point() else x for x in tensors] for tensors in inputs(case)
    )
    for tensor in learned:
        tensor.requires_grad_()
    loss = WORKLOADS[case.workload].ours(case, "reference")(*learned, *fixed)
    return Outcome(loss, torch.autograd.grad(loss, learned))


def test_every_workload_has_a_case_here():
    assert {case.workload for case in CASES} == set(WORKLOADS) == set(agreement.EXPECTED)


@pytest.mark.parametrize(
    "case", [*CASES, replace(INFO_NCE, normalize=False)], ids=lambda case: case.label
)
def test_expected_is_the_reference(case):
    errors = agreement.compare(case, reference(case))
    assert errors.loss < 1e-12
    assert errors.gradient < 1e-12


@every_case
def test_chunks_and_samples_do_not_change_what_is_expected(monkeypatch, case):
    whole = agreement.expected(case)
    agreement._expected.cache_clear()
    monkeypatch.setattr(agreement, "CHUNK_ELEMENTS", 8 * 7 * case.columns)
    monkeypatch.setattr(agreement, "SAMPLE", 9)
    parts = agreement.expected(case)
    agreement._expected.cache_clear()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-13)
    for part, full in zip(parts.gradients, whole.gradients, strict=True):
        if parts.sample is None:
            torch.testing.assert_close(part, full)
        else:
            assert part.shape == (9, 12)
            # The smaller sample begins like the larger one, which holds all rows.
            torch.testing.assert_close(part, full[:9])


@every_case
def test_wrong_results_are_seen(case):
    wanted = agreement.expected(case)
    # The rows of a sample, put back where they came from.
    gradients = tuple(
        x if wanted.sample is None else torch.zeros_like(x).index_copy(0, wanted.sample, x)
        for x in wanted.gradients
    )
    right = Outcome(torch.tensor(wanted.loss), gradients)
    assert agreement.complaint(case, agreement.compare(case, right)) is None
    wrong = [
        right._replace(loss=right.loss * 1.001),
        right._replace(loss=right.loss * float("nan")),
    ]
    for index, gradient in enumerate(gradients):
        for spoiled in (gradient * 1.01, torch.full_like(gradient, float("nan"))):
            others = [*gradients[:index], spoiled, *gradients[index + 1 :]]
            wrong.append(right._replace(gradients=tuple(others)))
    if len(gradients) > 1:
        wrong.append(right._replace(gradients=(gradients[1], gradients[0], *gradients[2:])))
    for outcome in wrong:
        assert agreement.complaint(case, agreement.compare(case, outcome)) is not None
    halved = right._replace(gradients=tuple(x / 2 for x in gradients))
    assert agreement.complaint(case, agreement.compare(case, halved)) is not None
    assert agreement.complaint(case, agreement.compare(case, halved, grad_output=0.5)) is None


@pytest.mark.parametrize(
    ("case", "side"),
    [
        pytest.param(case, side, id=f"{case.workload} {side.name}")
        for case in CASES
        for side in sides.sides_of(case, full=True)
        if not side.compiled
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_side_agrees(case, side, dtype):
    case = replace(case, dtype=dtype)
    if reason := side.refuses(case):
        pytest.skip(reason)
    errors = agreement.compare(case, side.step(case)(), side.grad_output)
    assert agreement.complaint(case, errors) is None
    forward = replace(case, gradient=False)
    outcome = side.step(forward)()
    assert outcome.gradients == ()
    assert agreement.complaint(forward, agreement.compare(forward, outcome)) is None


@every_case
def test_a_small_case_is_one_of_the_same_kind(case):
    small = replace(case, rows=1000, queue=3000 if case.queue else 0).small()
    learned, fixed = inputs(small)
    assert (small.workload, small.rows, small.queue) == (case.workload, 64, 64 * bool(case.queue))
    assert all(x.shape[0] <= 64 for x in (*learned, *fixed) if x.dim())


def test_work_is_counted_in_products():
    assert Case("info_nce", 100, 8).flops == 3 * 2 * 100 * 100 * 8
    assert Case("info_nce", 100, 8, gradient=False).flops == 2 * 100 * 100 * 8
    assert Case("nt_xent", 100, 8).flops == 2 * 2 * 100 * 100 * 8
    assert Case("info_nce", 100, 8, "bf16").gradient_bytes == 2 * 100 * 8 * 2
    assert Case("nt_xent", 100, 8).gradient_bytes == 100 * 8 * 4
    assert Case("clip", 100, 8).flops == 4 * 2 * 100 * 100 * 8
    assert Case("clip", 100, 8).gradient_bytes == 2 * 100 * 8 * 4
    assert Case("siglip", 100, 8).flops == 3 * 2 * 100 * 100 * 8
    assert Case("sup_con", 100, 8).flops == 2 * 2 * 100 * 100 * 8
    assert Case("sup_con", 100, 8).gradient_bytes == 100 * 8 * 4
    queue = Case("info_nce_queue", 10, 8, queue=100)
    assert queue.flops == 2 * 2 * 10 * 100 * 8
    assert queue.matrix_bytes == 10 * 100 * 4
    assert queue.gradient_bytes == 10 * 8 * 4
    assert queue.label == "info_nce_queue 10x100x8 fp32 forward+backward"


def test_grids_hold_what_they_promise():
    default, full = default_cases("cpu"), full_cases("cpu")
    assert len(set(full)) == len(full)
    assert set(default) <= set(full)
    assert {case.dim for case in full if not case.queue} == {64, 128, 512, 768}
    assert {case.rows for case in full} >= {256, 65536}
    for grid in (default, full):
        assert {case.workload for case in grid} == set(WORKLOADS)
        assert {case.workload for case in grid if case.telling} == set(WORKLOADS)
        assert {case.op for case in grid} == set(OPS)
        assert {case.dtype for case in grid} == {"fp32", "bf16"}
        assert {case.gradient for case in grid} == {True, False}
    for case, peers in {
        Case("nt_xent", 8192, 128): {"eager torch", "pytorch-metric-learning"},
        Case("clip", 8192, 512): {"eager torch (open_clip formula)"},
        Case("siglip", 8192, 512): {"eager torch (open_clip formula)"},
        Case("sup_con", 8192, 128): {
            "eager torch (SupCon formula)",
            "pytorch-metric-learning SupCon",
        },
        Case("info_nce_queue", 256, 128, queue=65536): {"eager torch"},
    }.items():
        assert case in default
        names = {side.name for side in sides.sides_of(case, full=False)}
        assert {"ssl_fast native", "torch.compile"} | peers <= names
        assert sides.baseline_of(case).name in peers
    assert len(sides.BY_NAME) == len(sides.SIDES)


def test_a_side_that_needs_too_much_memory_is_skipped(monkeypatch):
    case = Case("info_nce", 65536, 128)
    monkeypatch.setattr(memory, "device_bytes", lambda _: 32 * 2**30)
    assert "would need 48 GiB" in memory.too_large(case, sides.EAGER)
    assert memory.too_large(case, sides.NATIVE) is None
    assert memory.too_large(replace(case, rows=8192), sides.EAGER) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark here")
def test_memory_of_eager_torch_is_what_was_foretold():
    case = Case("info_nce", 2048, 16)
    extra = memory.peak_extra_bytes(case, sides.EAGER)
    assert 2 * case.matrix_bytes < extra < 6 * case.matrix_bytes


def test_calls_take_turns():
    seen = []
    times = timing.alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert "".join(seen) == "ab" + "abbaab"
    assert len(times["a"].rounds) == 3
    assert timing.Times((1.0, 3.0, 2.0)).median == 2.0
    assert [timing.rounds_for(s, budget=1.5) for s in (1e-4, 0.1, 1.0, 2.0, 20.0)] == [
        200,
        15,
        3,
        2,
        1,
    ]


def test_a_figure_is_held_against_its_goal():
    figure = figures.Figure("case", "against eager", 3.2, 3.0, at_least=True, unit="x", detail="")
    assert figure.met
    assert figure.line().startswith("met")
    assert not replace(figure, value=2.99).met
    assert not replace(figure, value=None).met
    assert replace(figure, value=100.0, goal=128.0, at_least=False).met
    assert replace(figure, value=2.0).line().startswith("MISSED")
    assert replace(figure, goal=None).line().startswith("told")
    error = replace(figure, value=2e-6, goal=1e-5, at_least=False, unit="")
    assert error.met
    assert "2.0e-06    <= 1e-05" in error.line()


def test_small_targets_run_where_kernels_are():
    (figure,) = targets_pair_softmax._small(4)
    if sides.NATIVE.refuses(INFO_NCE):
        assert figure.value is None
        assert sides.NATIVE.name in figure.detail
    else:
        assert figure.value > 0.05
    faster, than_one_sided = targets_pair_softmax._nt_xent(64)
    assert (faster.goal, than_one_sided.goal) == (5.0, 1.25)
    assert (faster.value is None) == (figure.value is None)


def test_contrastive_targets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "PEAK_SECONDS", 1e-3)
    monkeypatch.setattr(figures, "SECONDS_PER_GROUP", 0.01)
    monkeypatch.setattr(targets_contrastive, "SECONDS_PER_GROUP", 0.01)
    targets.main(tmp_path, "contrastive", scale=128)
    assert [path.name for path in tmp_path.iterdir()] == ["targets_contrastive.json"]
    told = json.loads((tmp_path / "targets_contrastive.json").read_text())["figures"]
    goals = [(f["case"].split()[0], f["goal"]) for f in told if f["goal"] is not None]
    assert goals == [
        ("clip", 2.2), ("clip", 20.0), ("sup_con", 18.0), ("sup_con", 50.0), ("siglip", 2.1),
        ("siglip", 20.0), ("info_nce_queue", 3.5), ("info_nce_queue", 0.125), ("clip", 80.0),
        ("clip", 1e-5), ("info_nce", 1e-5),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert all(figure["what"] in shown for figure in told)
    for figure in told:
        # Memory has no figure where the system shows no mark.
        if sides.NATIVE.refuses(INFO_NCE) is None and "memory" not in figure["what"]:
            assert figure["value"] is not None, figure


def test_reconstruction_targets_run(tmp_path, monkeypatch, capsys):
    for module in (targets_reconstruction, targets_linear):
        monkeypatch.setattr(module, "SECONDS_PER_GROUP", 0.01)
    monkeypatch.setattr(targets_linear, "PEAK_SECONDS", 1e-3)
    targets.main(tmp_path, "reconstruction", scale=256)
    told = json.loads((tmp_path / "targets_reconstruction.json").read_text())["figures"]
    assert len({figure["case"] for figure in told}) == 9
    for figure in told:
        assert "differs" not in figure["detail"], figure
        if figure["what"].startswith("against"):
            assert figure["value"] > 0.0, figure
    assert "times the streaming floor" in capsys.readouterr().out


def test_clustering_targets_run(tmp_path, monkeypatch, capsys):
    for module in (figures, targets_clustering):
        monkeypatch.setattr(module, "SECONDS_PER_GROUP", 0.01)
    monkeypatch.setattr(targets_clustering, "PEAK_SECONDS", 1e-3)
    targets.main(tmp_path, "clustering", scale=64)
    told = json.loads((tmp_path / "targets_clustering.json").read_text())["figures"]
    goals = {f["goal"] for f in told if f["goal"] is not None}
    assert goals == {1.0, 1.3, 1.5, 1.6, 1.8, 2.2, 2.5, 16.0}
    shown = capsys.readouterr().out
    for figure in told:
        assert figure["what"] in shown
        if "memory" not in figure["what"] and sides.NATIVE.refuses(INFO_NCE) is None:
            assert figure["value"] is not None, figure


def test_a_clustering_that_errs_is_not_timed():
    calls = {"ssl_fast": lambda: 1.0, "other": lambda: 1.1}
    times, wrong = targets_clustering.measured(calls, "ssl_fast")
    assert times == {}
    assert wrong == "other found 1.1, ssl_fast 1"


@pytest.mark.parametrize("workload", ["clip", "info_nce"])
def test_a_ring_gives_what_one_process_gives(monkeypatch, workload):
    monkeypatch.setattr(targets_contrastive, "SECONDS_PER_GROUP", 0.01)
    threads = torch.get_num_threads()
    efficiency, difference = targets_contrastive.ring_figures(
        Case(workload, 38, 12), sides.REFERENCE
    )
    assert torch.get_num_threads() == threads
    assert efficiency.value > 0, efficiency.detail
    assert difference.value < 2e-6, difference.detail


def test_a_ring_that_fails_says_why():
    with pytest.raises(ring.RingError, match=r"process 0: .*nonsense"):
        ring.Ring(Case("clip", 6, 4), "nonsense", 2, 1).__enter__()


def test_a_difference_is_the_worst():
    one = Outcome(torch.tensor(1.0), (torch.ones(3), torch.tensor(2.0)))
    other = Outcome(torch.tensor(1.0), (torch.ones(3), torch.tensor(2.5)))
    assert ring.difference(one, one) == 0
    assert ring.difference(one, other) == pytest.approx(0.25)


def test_the_command_runs_and_writes(tmp_path):
    # `make test` keeps the current folder off the path; the benchmarks see to that themselves.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke", "--out", str(tmp_path), "--only",
         "not compile"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "pair_softmax.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["ceilings"]["copy_gb_s"] > 0
    measured = {row["side"]: row for row in document["rows"] if row["status"] == "ok"}
    assert {"ssl_fast reference", "eager torch"} <= set(measured)
    row = measured["eager torch"]
    queue = row["columns"] if row["workload"] == "info_nce_queue" else 0
    case = Case(row["workload"], row["rows"], row["dim"], row["dtype"], queue=queue)
    assert row["gflops"] == pytest.approx(case.flops / row["seconds"] / 1e9, rel=1e-2)
    assert all(row["status"] in ("ok", "skipped") for row in document["rows"])
    assert all(row["reason"] for row in document["rows"] if row["status"] == "skipped")
    of_sigmoid = json.loads((tmp_path / "pair_sigmoid.json").read_text())
    groups = [{row["workload"] for row in part["rows"]} for part in (document, of_sigmoid)]
    assert groups == [set(WORKLOADS) - {"siglip"}, {"siglip"}]
    table = (tmp_path / "pair_softmax.md").read_text()
    assert "### nt_xent 64x16 fp32 forward+backward" in table
    assert "### info_nce_queue 24x80x16 fp32 forward+backward" in table
    assert "1.00x" in table
    for part, name in ((document, "pair_softmax"), (of_sigmoid, "pair_sigmoid")):
        assert report.render(part) in done.stdout
        if "no plot" not in done.stdout:
            assert (tmp_path / f"{name}.png").stat().st_size > 20_000

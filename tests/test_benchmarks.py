"""The benchmarks' own check: they compare with the right answer, and they run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ssl_fast

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
# Behind everything else: the checkout's ssl_fast must not shadow the installed one.
sys.path.append(str(ROOT))

from benchmarks import agreement, memory, report, sides, targets, timing  # noqa: E402
from benchmarks.cases import Case, default_cases, features, full_cases  # noqa: E402
from benchmarks.sides import Outcome  # noqa: E402

INFO_NCE = Case("info_nce", 48, 12)
NT_XENT = Case("nt_xent", 48, 12)


def reference(case):
    """ssl_fast's reference backend in float64."""
    first, second = (view.double().requires_grad_() for view in features(case))
    function = ssl_fast.info_nce if case.workload == "info_nce" else ssl_fast.nt_xent
    loss = function(
        first, second, temperature=case.temperature, normalize=case.normalize, backend="reference"
    )
    return Outcome(loss, torch.autograd.grad(loss, (first, second)))


@pytest.mark.parametrize("case", [INFO_NCE, replace(INFO_NCE, normalize=False), NT_XENT])
def test_expected_is_the_reference(case):
    errors = agreement.compare(case, reference(case))
    assert errors.loss < 1e-12
    assert errors.gradient < 1e-12


def test_chunks_and_samples_do_not_change_what_is_expected(monkeypatch):
    case = Case("nt_xent", 50, 12)
    outcome = reference(case)
    monkeypatch.setattr(agreement, "CHUNK_ELEMENTS", 50 * 7)
    monkeypatch.setattr(agreement, "SAMPLE", 9)
    assert agreement.compare(case, outcome).gradient < 1e-12
    assert agreement.expected(case).gradients[0].shape == (9, 12)


@pytest.mark.parametrize("case", [INFO_NCE, NT_XENT])
def test_wrong_results_are_seen(case):
    right = reference(case)
    assert agreement.complaint(case, agreement.compare(case, right)) is None
    first, second = right.gradients
    wrong = [
        right._replace(loss=right.loss * 1.001),
        right._replace(loss=right.loss * float("nan")),
        right._replace(gradients=(first, second * 1.01)),
        right._replace(gradients=(second, first)),
        right._replace(gradients=(first, torch.full_like(second, float("nan")))),
    ]
    for outcome in wrong:
        assert agreement.complaint(case, agreement.compare(case, outcome)) is not None
    halved = right._replace(gradients=(first / 2, second / 2))
    assert agreement.complaint(case, agreement.compare(case, halved)) is not None
    assert agreement.complaint(case, agreement.compare(case, halved, grad_output=0.5)) is None


@pytest.mark.parametrize("side", [s for s in sides.SIDES if not s.compiled], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", ["info_nce", "nt_xent"])
def test_every_side_agrees(side, dtype, workload):
    case = Case(workload, 64, 16, dtype)
    if side not in sides.sides_of(case, full=True):
        pytest.skip("not a row of this group")
    if reason := side.refuses(case):
        pytest.skip(reason)
    errors = agreement.compare(case, side.step(case)(), side.grad_output)
    assert agreement.complaint(case, errors) is None
    forward = replace(case, gradient=False)
    outcome = side.step(forward)()
    assert outcome.gradients == ()
    assert agreement.complaint(forward, agreement.compare(forward, outcome)) is None


def test_work_is_counted_in_products():
    assert Case("info_nce", 100, 8).flops == 3 * 2 * 100 * 100 * 8
    assert Case("info_nce", 100, 8, gradient=False).flops == 2 * 100 * 100 * 8
    assert Case("nt_xent", 100, 8).flops == 2 * 2 * 100 * 100 * 8
    assert Case("info_nce", 100, 8, "bf16").gradient_bytes == 2 * 100 * 8 * 2
    assert Case("nt_xent", 100, 8).gradient_bytes == 100 * 8 * 4


def test_grids_hold_what_they_promise():
    default, full = default_cases("cpu"), full_cases("cpu")
    assert len(set(full)) == len(full)
    assert set(default) <= set(full)
    assert {case.dim for case in full} == {64, 128, 512, 768}
    assert {case.rows for case in full} >= {256, 65536}
    for grid in (default, full):
        assert {case.dtype for case in grid} == {"fp32", "bf16"}
        assert {case.gradient for case in grid} == {True, False}
    names = {side.name for side in sides.sides_of(Case("nt_xent", 8192, 128), full=False)}
    assert {"ssl_fast native", "eager torch", "torch.compile", "pytorch-metric-learning"} <= names


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
    figure = targets.Figure("case", "against eager", 3.2, 3.0, at_least=True, unit="x", detail="")
    assert figure.met
    assert figure.line().startswith("met")
    assert not replace(figure, value=2.99).met
    assert not replace(figure, value=None).met
    assert replace(figure, value=100.0, goal=128.0, at_least=False).met
    assert replace(figure, value=2.0).line().startswith("MISSED")


def test_small_targets_run_where_kernels_are():
    (figure,) = targets._small(4)
    if sides.NATIVE.refuses(INFO_NCE):
        assert figure.value is None
        assert sides.NATIVE.name in figure.detail
    else:
        assert figure.value > 0.05
    faster, than_one_sided = targets._nt_xent(64)
    assert (faster.goal, than_one_sided.goal) == (5.0, 1.25)
    assert (faster.value is None) == (figure.value is None)


def test_the_command_runs_and_writes(tmp_path):
    # `make test` keeps the current folder off the path; the benchmarks see to that themselves.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke", "--out", str(tmp_path), "--only",
         "not compile"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "pair_softmax.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["ceilings"]["copy_gb_s"] > 0
    measured = {row["side"]: row for row in document["rows"] if row["status"] == "ok"}
    assert {"ssl_fast reference", "eager torch"} <= set(measured)
    row = measured["eager torch"]
    assert row["gflops"] == pytest.approx(
        Case(row["workload"], row["rows"], row["dim"], row["dtype"]).flops / row["seconds"] / 1e9,
        rel=1e-2,
    )
    assert all(row["status"] in ("ok", "skipped") for row in document["rows"])
    assert all(row["reason"] for row in document["rows"] if row["status"] == "skipped")
    table = (tmp_path / "pair_softmax.md").read_text()
    assert "### nt_xent 64x16 fp32 forward+backward" in table
    assert "1.00x" in table
    assert report.render(document) in done.stdout
    if "no plot" not in done.stdout:
        assert (tmp_path / "pair_softmax.png").stat().st_size > 20_000

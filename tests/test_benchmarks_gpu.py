"""The run for a card, without one: its checks find what is wrong, and its sides agree."""

import json
import sys
import time
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

from benchmarks.gpu import (  # noqa: E402
    __main__,
    card,
    checks,
    checks_clusters,
    checks_large,
    compare,
    plan,
    plot,
    properties,
    report,
    workers,
)
from benchmarks.gpu.findings import Finding, Place, Task, perform  # noqa: E402
from ssl_fast.backends import dispatch  # noqa: E402

NATIVE = dispatch.package("native").refuses("pair_softmax", "cpu", torch.float32, (8, 8, 8)) is None
BACKENDS = ("native", "reference") if NATIVE else ("reference",)
PLACE = Place("cpu", BACKENDS[0], scale=64)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def found_in(tasks, place=PLACE):
    return [finding for task in tasks for finding in perform(task, place)]


def bad(findings):
    return [finding.line() for finding in findings if finding.status == "failed"]


@every_backend
def test_every_check_passes_at_tiny_sizes(backend):
    tasks = checks.tasks()
    findings = found_in(tasks, replace(PLACE, backend=backend))
    assert bad(findings) == []
    assert len(findings) == len(tasks) * len(checks.TINY)
    for finding in findings:
        if "options" in finding.name or "hard" in finding.name:
            assert not finding.detail.startswith("4 results, 0%"), "no pair was left to look at"


def test_every_public_loss_and_dtype_is_checked():
    names = {task.name for task in checks.tasks()}
    functions = [
        "info_nce", "nt_xent", "sup_con", "clip_loss", "siglip_loss", "mae_loss", "vae_loss",
        "l2_sp", "kmeans_assign", "kmeans_update", "batched_kmeans", "knn",
    ]  # fmt: skip
    functions += [
        f"{loss} {kind}"
        for loss in ("reconstruction_loss", "linear_reconstruction_loss")
        for kind in ("mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits")
    ]
    assert {f"{name} {dtype}" for name in functions for dtype in checks.DTYPES} <= names
    public = {x for x in ssl_fast.__all__ if x.endswith("_loss") or x.startswith("kmeans")}
    assert public <= {name.split()[0] for name in names}
    assert len({task.key for task in plan.tasks()}) == len(plan.tasks())
    on_a_card = checks.shapes_for(None, "bf16", Place())
    assert {shape.dim for shape in on_a_card} >= {3, 19, 64, 128, 256, 768}


@every_backend
def test_what_is_large_on_a_card_is_checked_small_here(backend):
    findings = found_in(checks_large.tasks(), replace(PLACE, backend=backend))
    assert bad(findings) == []
    assert len(findings) == 14


def test_the_native_backend_is_checked_beside_the_other():
    tasks = [x for x in plan.tasks() if x.name.endswith(" native")]
    assert {task.name.replace(",", " ").split()[0] for task in tasks} == set(plan.NATIVE)
    some = [x for x in tasks if x.group != "compile"]
    findings = found_in(some, replace(PLACE, backend="reference"))
    assert bad(findings) == []
    assert all(finding.name.endswith(" native") for finding in findings)
    wanted = "ok" if "native" in BACKENDS else "skipped"
    assert {x.status for x in findings if x.group == "correctness"} == {wanted}


def spoiled(monkeypatch, name, spoil):
    """The public function with something done to its result."""
    right = getattr(ssl_fast, name)
    monkeypatch.setattr(ssl_fast, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))


def run_some(monkeypatch, tmp_path, tasks):
    monkeypatch.setattr(plan, "tasks", lambda: tasks)
    return __main__.run(PLACE, tmp_path, 600.0, processes=0)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("info_nce", lambda loss: loss * 1.05),
        ("siglip_loss", lambda loss: loss.detach() * 0.9 + 0.1 * loss),
        ("mae_loss", lambda loss: loss * float("nan")),
        ("kmeans_assign", lambda found: (found[0].roll(1, -1), found[1])),
        ("kmeans_update", lambda found: (found[0] * 1.1, found[1])),
        ("knn", lambda found: (found[0], found[1].flip(1))),
    ],
)
def test_a_wrong_result_is_named_and_ends_in_1(monkeypatch, tmp_path, capsys, name, spoil):
    tasks = [task for task in checks.tasks() if task.name.startswith((name, "nt_xent"))]
    assert run_some(monkeypatch, tmp_path, tasks) == 0
    capsys.readouterr()
    spoiled(monkeypatch, name, spoil)
    assert run_some(monkeypatch, tmp_path, tasks) == 1
    shown = capsys.readouterr().out
    assert f"FAILED  correctness {name}" in shown
    document = json.loads((tmp_path / "gpu.json").read_text())
    failed = [x["name"] for x in document["findings"] if x["status"] == "failed"]
    assert failed
    assert all(entry.startswith(name) for entry in failed)
    # the other checks still ran
    assert any(x["name"].startswith("nt_xent") for x in document["findings"])
    assert f"correctness: {failed[0]}" in (tmp_path / "gpu.md").read_text()


def test_what_raises_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel\nmore")

    tasks = [task for task in checks.tasks() if task.name in {"info_nce bf16", "nt_xent bf16"}]
    monkeypatch.setattr(ssl_fast, "info_nce", broken)
    assert run_some(monkeypatch, tmp_path, tasks) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: no such kernel (test_benchmarks_gpu.py:" in shown
    assert shown.count("ok      correctness nt_xent bf16") == 2


def test_after_a_lost_context_the_other_shapes_are_named(monkeypatch):
    (task,) = (x for x in checks.tasks() if x.name == "info_nce bf16")
    spoiled(monkeypatch, "info_nce", lambda loss: 2 * loss)
    monkeypatch.setattr(checks, "healthy", lambda _: False)
    assert [x.status for x in perform(task, PLACE)] == ["failed", "skipped"]


def test_a_result_that_changes_is_named(monkeypatch):
    (task,) = (x for x in properties.tasks() if x.key == "determinism: info_nce")
    assert bad(perform(task, PLACE)) == []
    spoiled(monkeypatch, "info_nce", lambda loss: loss + torch.rand(()))
    assert "result 0 differs" in perform(task, PLACE)[0].detail


def test_every_loss_repeats_and_compiles_whole():
    tasks = properties.tasks()
    findings = found_in([task for task in tasks if task.group != "compile"])
    assert bad(findings) == []
    assert {x.status for x in findings if x.group == "determinism"} == {"ok"}
    assert {x.group for x in findings if x.status == "skipped"} == {"graph", "memory"}
    some = [x for x in tasks if x.key in {"compile: info_nce", "compile: mae_loss"}]
    assert [x.status for x in found_in(some)] == ["ok", "ok"]


def test_a_graph_break_is_named(monkeypatch):
    (task,) = (x for x in properties.tasks() if x.key == "compile: info_nce")

    def broken(loss):
        torch._dynamo.graph_break()
        return loss

    spoiled(monkeypatch, "info_nce", broken)
    assert perform(task, PLACE)[0].status == "failed"


def test_without_a_card_the_command_ends_in_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def made_up(**changes):
    seconds = {"ssl_fast": 1e-3, "eager torch": 3e-3, "torch.compile": 2e-3, "liger-kernel": 4e-3}
    findings = [
        Finding("correctness", "info_nce bf16 9x5", "ok", "4 results"),
        Finding("speed", "info_nce 32768x512 bf16 forward", "told", "", {"seconds": seconds}),
        Finding("speed", "info_nce, against | torch.compile", "missed", "2x >= 3x", {"value": 2.0}),
        Finding("speed", "late", "skipped", workers.SPENT),
    ]
    return {
        "machine": card.describe("cpu") | {"card": "Card X", "driver": "1.2", "cuda": "13.0"},
        "date": "2026-11-26",
        "seconds": 12.3,
        "findings": [x.as_json() for x in findings],
    } | changes


def test_results_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    document = made_up()
    wrote = report.write(document, tmp_path / "new")
    assert [path.name for path in wrote] == ["gpu.json", "gpu.md", "gpu.png"]
    assert json.loads(wrote[0].read_text()) == document
    page = wrote[1].read_text()
    assert f"Card X; driver 1.2; CUDA 13.0; torch {torch.__version__}" in page
    assert "Missed: speed: info_nce, against | torch.compile." in page
    assert "Skipped: speed: late." in page
    assert r"| info_nce, against \| torch.compile | **missed** | 2x >= 3x |" in page
    assert "info_nce bf16 9x5" not in page
    assert wrote[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_or_races_there_is_no_picture(tmp_path, monkeypatch, capsys):
    assert not plot.draw(made_up(findings=[]), tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(report.write(made_up(), tmp_path)) == 2
    assert "matplotlib is missing" in capsys.readouterr().out


def test_exit_codes():
    statuses = [{"status": status} for status in ("ok", "met", "told", "skipped")]
    assert report.exit_code({"findings": statuses}) == 0
    for status in ("failed", "missed"):
        assert report.exit_code({"findings": [*statuses, {"status": status}]}) == 1


def test_time_that_is_spent_names_what_is_left():
    tasks = checks.tasks()[:2]
    for run in (workers.in_this_process, workers.in_processes):
        findings = []
        run(tasks, PLACE, time.monotonic() - 1.0, findings.extend)
        assert [x.status for x in findings] == ["skipped", "skipped"]
        assert {x.detail for x in findings} == {workers.SPENT}


def test_a_task_for_a_larger_card_is_skipped(monkeypatch):
    monkeypatch.setattr(Place, "free_bytes", lambda _: 2.0**30)
    task = Task("large", "much", lambda _: [], bytes=2**33)
    assert perform(task, PLACE)[0].detail == "needs 8 GiB of the card's memory"


def test_tasks_run_in_a_process_and_one_that_dies_is_named(monkeypatch):
    tasks = [task for task in checks.tasks() if task.name in {"info_nce bf16", "knn fp32"}]
    unknown = Task("correctness", "nobody knows this key", lambda _: [])
    findings = []
    deadline = time.monotonic() + 300.0
    workers.in_processes([tasks[0], unknown, tasks[1]], PLACE, deadline, findings.extend)
    assert [x.status for x in findings] == ["ok", "ok", "failed", "ok", "ok"]
    assert "its process ended with 1" in findings[2].detail
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    worker = workers._Worker(PLACE)
    late, lives = worker.perform(tasks[0], time.monotonic())
    assert not lives
    assert (late[0].status, late[0].detail) == ("skipped", workers.SPENT)
    hung, lives = worker.perform(replace(tasks[0], seconds=0.0), deadline)
    worker.end()
    assert not lives
    assert "no answer within 0 s" in hung[0].detail


def test_distances_come_from_differences():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    found = checks_clusters.distances(x, y)
    torch.testing.assert_close(found, torch.cdist(x.double(), y.double()).square())


def test_an_error_over_what_is_allowed_raises():
    exact = torch.randn(10, dtype=torch.float64)
    part = compare.part_of_allowed(exact.float(), exact, torch.float32, what="x")
    assert 0 < part < 1
    with pytest.raises(AssertionError, match="x: error"):
        compare.part_of_allowed(exact.float() * 1.001, exact, torch.float32, what="x")
    with pytest.raises(AssertionError, match="x: error nan"):
        compare.part_of_allowed(exact * float("nan"), exact, torch.float32, what="x")
    with pytest.raises(AssertionError, match="shape"):
        compare.part_of_allowed(exact[:3], exact, torch.float32, what="x")

"""The races of the run for a card: their sides agree, and their goals are judged."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_fast.backends import dispatch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
# Behind everything else: the checkout's ssl_fast must not shadow the installed one.
sys.path.append(str(ROOT))

from benchmarks.gpu import peers, plan, races, races_clusters, races_contrastive  # noqa: E402
from benchmarks.gpu.findings import Place, perform  # noqa: E402

NATIVE = dispatch.package("native").refuses("pair_softmax", "cpu", torch.float32, (8, 8, 8)) is None
PLACE = Place("cpu", "native" if NATIVE else "reference", scale=64)


def bad(findings):
    return [finding.line() for finding in findings if finding.status == "failed"]


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile that gives its function back: what it makes of it is torch's own affair."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(races, "SECONDS", 0.0)


@pytest.mark.parametrize("race", plan.RACES, ids=lambda race: race.name)
def test_the_sides_of_a_race_agree(uncompiled, race):
    findings = races.run(race, PLACE)
    assert bad(findings) == []
    assert not any("raised" in finding.detail for finding in findings)
    told = next(x for x in findings if x.name == race.name)
    ours_and_torch = {side.name for side in race.sides if not side.peer}
    assert set(told.values["seconds"]) >= ours_and_torch
    # memory is counted on a card alone, and a peer may be absent
    for finding in findings:
        if finding.status == "skipped":
            assert "memory" in finding.name or finding.name.endswith(tuple(peers.MODULES))


def test_goals_are_those_of_the_release():
    goals = {
        f"{race.name}, {goal.what}": (goal.bound, goal.at_least)
        for race in plan.RACES
        for goal in race.goals
    }
    assert goals == {
        "info_nce 32768x512 bf16 forward, of the matrix peak": (65.0, True),
        "info_nce 32768x512 bf16 forward+backward, of the matrix peak": (50.0, True),
        "info_nce 32768x512 bf16 forward+backward, against torch.compile": (1.5, True),
        "info_nce 32768x512 bf16 forward+backward, extra memory, of eager torch's": (0.05, False),
        "clip 65536x768 bf16 forward+backward, extra memory": (2.0, False),
        "clip 65536x768 bf16 forward+backward, against cut-cross-entropy": (1.5, True),
        "nt_xent 32768x256 bf16 forward+backward, against torch.compile": (2.0, True),
        **{
            f"{loss} 256x128 {dtype} forward+backward, against eager torch": (1.0, True)
            for loss, dtype in (
                ("info_nce", "fp32"), ("info_nce", "bf16"), ("nt_xent", "fp32"), ("clip", "fp32"),
                ("siglip", "fp32"),
            )
        },
        "k-means assign, 32 problems of 131072x128, K=1000, fp16, against flash-kmeans": (1, True),
        "one Lloyd iteration, 4194304x128, K=1024, fp16, against flash-kmeans": (1.0, True),
        "one Lloyd iteration, 4194304x128, K=1024, fp16, against fastkmeans": (1.0, True),
        "mse fp32, 1 GiB forward+backward, of the copy bandwidth": (85.0, True),
        "bce_with_logits fp32, 1 GiB forward+backward, of the copy bandwidth": (85.0, True),
        "linear reconstruction bf16, 65536 x 1024->4096, times as long as three products":
            (1.15, False),
    }  # fmt: skip


@pytest.mark.parametrize("workload", ["info_nce", "clip"])
def test_the_formulas_around_a_fused_classification_agree(workload):
    case = races_contrastive.Case(workload, 24, 8)
    entry = races_contrastive.race(case, (), ()).inputs(replace(PLACE, scale=1))
    ours = races_contrastive.SIDES[races.OURS].build(entry)()
    loss = races_contrastive.by_classes(case, peers.plain_class_loss)
    assert races.relative(ours, races_contrastive.step_of(entry, loss)(), None) < 1e-5


def test_centroids_that_are_no_means_are_seen():
    problem = races_clusters._problem(PLACE, 1, 2**20, 2**14, 128)
    labels, means = races_clusters._iteration(problem)()
    assert races_clusters.means_of_labels((), (labels, means), problem) < 1e-3
    assert races_clusters.means_of_labels((), (labels.roll(1, 1), means), problem) > 0.1
    assert races_clusters.as_near((labels,), (labels.roll(1, 1),), problem) > 0.1


def race_of(*sides, goals=(), same=1e-3):
    return races.Race(
        "race", lambda _: torch.ones(4), sides, goals, races.relative, same,
        flops=lambda _: 1e6, moved=lambda _: 1e6,
    )  # fmt: skip


def side(name, factor, peer=False):
    def build(x):
        def step():
            time.sleep(1e-4)
            return (factor * x,)

        return step

    return races.Side(name, build, peer)


def test_a_side_that_differs_fails_and_is_not_timed(monkeypatch):
    monkeypatch.setattr(races, "SECONDS", 0.0)
    other = side(races.EAGER, 1.1)
    findings = races.run(
        race_of(side(races.OURS, 1.0), other, goals=(races.faster_than(races.EAGER, 1.0),)), PLACE
    )
    assert [x.status for x in findings] == ["failed", "told", "skipped"]
    assert "differs from ours by 1.0e-01" in findings[0].detail
    nan = races.run(race_of(side(races.OURS, 1.0), side(races.EAGER, float("nan"))), PLACE)
    assert nan[0].status == "failed"


def test_ours_that_raises_fails_and_a_peer_that_raises_is_told(monkeypatch):
    monkeypatch.setattr(races, "SECONDS", 0.0)

    def raises(_):
        raise TypeError("not this way")

    peer = races.Side(peers.CCE, raises, peer=True)
    monkeypatch.setattr(peers, "installed", lambda _: True)
    findings = races.run(race_of(side(races.OURS, 1.0), peer), PLACE)
    assert [x.status for x in findings] == ["told", "told"]
    assert "raised TypeError: not this way" in findings[0].detail
    ours = races.task(race_of(races.Side(races.OURS, raises)))
    assert perform(ours, PLACE)[0].status == "failed"
    monkeypatch.setattr(peers, "installed", lambda _: False)
    assert races.run(race_of(side(races.OURS, 1.0), peer), PLACE)[0].detail == "not installed"


def test_goals_are_judged():
    times = {name: races.timing.Times((s,)) for name, s in (("ssl_fast", 2.0), ("eager torch", 3))}
    found = races.Measured(
        times, {"ssl_fast": 2**30, "eager torch": 2**32}, 1e12, 6e9,
        {races.MATRIX_PEAK: 1e12, races.COPY: 4e9},
    )  # fmt: skip
    goals = (
        races.faster_than("eager torch", 1.5),
        races.faster_than("eager torch", 1.6),
        races.faster_than("torch.compile", 1.0),
        races.share_of_peak(50.0),
        races.share_of_copy(80.0),
        races.times_as_long("eager torch", 0.7),
        races.extra_gib(0.5),
        races.part_of_memory("eager torch", 0.25),
    )
    race = race_of(goals=goals)
    statuses = [x.status for x in races.judged(race, found)[1:]]
    assert statuses == ["met", "missed", "skipped", "met", "missed", "met", "missed", "met"]

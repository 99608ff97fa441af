"""The tuning of Triton's rows, without a card: the search, the checks, the file."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssl_fast.backends.triton import choice, measured, tuning
from ssl_fast.backends.triton.tuning import Config

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
# Behind everything else: the checkout's ssl_fast must not shadow the installed one.
sys.path.append(str(ROOT))

from benchmarks.tune import __main__, calls, choices, rows  # noqa: E402
from benchmarks.tune.search import (  # noqa: E402
    COLUMNS,
    DEPTHS,
    ROWS,
    STAGES,
    WARPS,
    Outcome,
    PresentRowError,
    neighbours,
    search,
    shared_bytes,
    tile,
)

START = Config(64, 64, 64, 8, 3)
KEY = ("sweep", "bfloat16", 128, "sm_90")
CHOICE = ("both_sides", "bfloat16", 128, "sm_90")


def near(config):
    return neighbours(config, resident=False)


def distance(config, goal=(256, 128, 32, 4, 2)):
    """Seconds that grow with every step from a best configuration."""
    steps = zip(tile(config), goal, (ROWS, COLUMNS, DEPTHS, WARPS, STAGES), strict=True)
    return 1.0 + sum(abs(values.index(a) - values.index(b)) for a, b, values in steps)


def test_the_search_walks_to_the_fastest():
    outcome = search(START, distance, near)
    assert tile(outcome.best) == (256, 128, 32, 4, 2)
    assert (outcome.before, outcome.seconds) == (distance(START), 1.0)
    assert len(outcome.tried) < 60


def test_the_search_leaves_out_what_is_refused():
    def measure(config):
        return "spills" if config.warps == 4 else distance(config)

    outcome = search(START, measure, near)
    assert tile(outcome.best) == (256, 128, 32, 8, 2)
    assert outcome.refused
    assert set(outcome.refused.values()) == {"spills"}
    assert all(found[3] == 4 for found in outcome.refused)


def test_noise_moves_no_row():
    outcome = search(START, lambda config: 1.0 if config is START else 0.995, near)
    assert outcome.best is START


def test_a_present_row_that_does_not_run_is_an_error():
    with pytest.raises(PresentRowError, match="no such kernel"):
        search(START, lambda _: "no such kernel", near)


def test_neighbours_are_one_step_away():
    found = near(START)
    assert len({tile(config) for config in found}) == len(found) == 9
    for config in found:
        assert sum(a != b for a, b in zip(tile(config), tile(START), strict=True)) == 1
    assert all(x.block_depth == 64 for x in neighbours(START, resident=True))
    turned = replace(START, block_columns=256)
    assert (256, 64, 64, 8, 3) in {tile(config) for config in near(turned)}


def test_operands_on_chip_are_counted():
    assert shared_bytes(Config(128, 64, 32, 8, 3), 2, resident=True) == 2 * 32 * (2 * 64 + 128)
    assert shared_bytes(Config(128, 64, 32, 8, 3), 2, resident=False) == 2 * 2 * 32 * (64 + 128)


class FakeKernels:
    """A call that looks its row up, and results and spills as the row decides."""

    def __init__(self, monkeypatch, spoil=lambda _: 0.0, spills=lambda _: 0):
        self.config, self.spoil = START, spoil
        monkeypatch.setattr(rows, "launched", self.launched)
        self.spills = spills

    def __call__(self):
        self.config = tuning.lookup("sweep", torch.bfloat16, 128, "sm_90")
        if self.config.stages == 5:
            raise RuntimeError("out of resource: shared memory")
        return [torch.ones(3) + self.spoil(self.config), torch.arange(4)]

    @contextlib.contextmanager
    def launched(self):
        kernels = []
        yield kernels
        kernels.append(SimpleNamespace(n_spills=self.spills(self.config)))

    def clock(self, call):
        call()
        return distance(self.config)

    def row(self, limit=float("inf")):
        return rows.Row(KEY, self, self.clock, limit, lambda: None)


def test_a_row_is_measured_through_the_table(monkeypatch):
    before = tuning.TABLE
    outcome = FakeKernels(monkeypatch).row().tuned()
    # the depth of a bucket's row stays
    assert tile(outcome.best) == (256, 128, 128, 4, 2)
    assert outcome.before == distance(before[KEY])
    assert tuning.TABLE is before
    assert before[KEY] == tuning.lookup("sweep", torch.bfloat16, 128, "sm_90")


def test_wrong_results_spills_and_errors_are_out(monkeypatch):
    kernels = FakeKernels(
        monkeypatch,
        spoil=lambda config: 0.1 if config.block_rows == 256 else 0.0,
        spills=lambda config: 8 * (config.block_columns == 256),
    )
    row = kernels.row(limit=128 * 128 * 2 * 4)
    present = row.present
    assert row.measure(present) == distance(present)
    assert "WRONG: result 0 is off by" in row.measure(replace(present, block_rows=256, stages=2))
    assert "spills 8 registers" in row.measure(replace(present, block_columns=256, stages=2))
    assert "on chip" in row.measure(replace(present, stages=5))
    assert "out of resource" in kernels.row().measure(replace(present, stages=5))


def test_what_was_spilled_before_may_be_spilled(monkeypatch):
    row = FakeKernels(monkeypatch, spills=lambda _: 8).row()
    assert tile(row.tuned().best) == (256, 128, 128, 4, 2)


def test_a_call_that_reads_another_row_is_an_error(monkeypatch):
    kernels = FakeKernels(monkeypatch)
    row = rows.Row(("sweep", "float16", 128, "sm_90"), kernels, kernels.clock, 1e9, lambda: None)
    with pytest.raises(PresentRowError, match="does not read it"):
        row.tuned()


def test_a_best_that_is_not_confirmed_leaves_the_row(monkeypatch):
    kernels = FakeKernels(monkeypatch)
    row = kernels.row()
    monkeypatch.setattr(
        rows, "search", lambda start, *_: Outcome(replace(start, warps=4), 0.5, 1.0)
    )
    row.clock = lambda call: call() and 1.0
    outcome = row.tuned()
    assert outcome.best == row.present
    assert outcome.seconds == outcome.before == 1.0


class FakeRow:
    def __init__(self, found):
        self.found = found

    def tuned(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_rows_get_their_source_and_failures_are_named(monkeypatch, capsys):
    keys = __main__.keys_of(tuning.TABLE, "sm_90", "sweep")
    assert [key[2] for key in keys if key[1] == "bfloat16"] == [64, 128, 256, tuning.ANY_DEPTH]
    assert len(__main__.keys_of(tuning.TABLE, "sm_90")) > len(keys)
    best = Config(32, 32, 32, 4, 2)
    found = [
        Outcome(best, 1.0, 2.0, {tile(START): "WRONG: result 0 is off by 1e-01"}),
        PresentRowError("no such kernel"),
        *[Outcome(best, 1.0, 2.0)] * len(keys),
    ]
    given = dict(zip(keys, found, strict=False))
    measured, wrong = __main__.tune(keys, lambda key: FakeRow(given[key]), "Card X", float("inf"))
    assert set(measured) == set(keys) - {keys[1]}
    today = time.strftime("%Y-%m-%d")
    assert set(measured.values()) == {replace(best, source="Card X", date=today)}
    assert len(wrong) == 2
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "PresentRowError: no such kernel" in shown
    assert "2.000x of the present row" in shown
    assert __main__.tune(keys, lambda _: FakeRow(found[-1]), "Card X", 0.0) == ({}, [])
    assert "skipped, the run's time is spent" in capsys.readouterr().out
    monkeypatch.setattr(__main__, "answers", lambda: False)
    measured, wrong = __main__.tune(keys, lambda _: FakeRow(found[-1]), "X", float("inf"))
    assert len(measured) == len(wrong) == 1


def test_what_is_written_is_what_is_loaded(tmp_path):
    text = measured.as_text({"op": tuning.TABLE, "kind": choice.TABLE})
    assert tuning.from_text(text) == tuning.TABLE
    assert choice.from_text(text) == choice.TABLE
    assert tuning.from_text(measured.as_text({"kind": choice.TABLE})) == {}
    shipped = measured.PATH.read_text()
    tiles, choices = tuning.from_text(shipped), choice.from_text(shipped)
    assert tiles.items() <= tuning.TABLE.items()
    assert choices.items() <= choice.TABLE.items()
    mine = {KEY: Config(32, 64, 128, 4, 2, source="Card X", date="2026-11-26")}
    chosen = {CHOICE: choice.Choice(7, source="Card X", date="2026-11-26")}
    __main__.write(mine, chosen, tmp_path / "new" / "measured.json")
    text = (tmp_path / "new" / "measured.json").read_text()
    assert tuning.from_text(text) == {**tiles, **mine}
    assert choice.from_text(text) == {**choices, **chosen}
    assert json.loads(text)[0].keys() >= {"op", "block_rows", "source", "date"}


class FakeWays:
    """A call that asks which way it is to go; both take as long as a model says."""

    def __init__(self, spoil=0.0, key=None):
        self.fused, self.spoil, self.key = False, spoil, key or CHOICE

    def call_for(self, batch):
        def call():
            kind, dtype, bucket, architecture = self.key
            shape = (batch, batch, bucket)
            self.fused = choice.is_fused(kind, getattr(torch, dtype), shape, architecture)
            self.batch = batch
            return [torch.ones(3) + self.spoil * self.fused]

        return call

    def clock(self, call):
        call()
        pairs = float(self.batch) ** 2
        return 10 + pairs * 4e-6 if self.fused else 25 + pairs * 3e-6

    def row(self, batches=(256, 1024, 2048, 4096, 8192)):
        return choices.ChoiceRow(CHOICE, self.call_for, self.clock, lambda: None, batches)


def test_a_choice_is_cut_where_the_ways_cross():
    before = choice.TABLE
    crossing = FakeWays().row().crossing()
    # a millionth of a second a pair makes up for 15 s of launches at 1.5e7 pairs, 3873 squared
    assert crossing.most_pairs == 2048 * 4096
    assert crossing.times[1024] == (10 + 2**20 * 4e-6, 25 + 2**20 * 3e-6)
    assert choice.TABLE is before
    assert FakeWays().row((16, 32)).crossing().most_pairs == choice.EVERY_SIZE.most_pairs
    assert FakeWays().row((8192, 16384)).crossing().most_pairs == choice.NO_SIZE.most_pairs


@pytest.mark.parametrize(
    ("gains", "cut"),
    [
        ([2.0, 0.99, 1.5, 0.8], 2**7 * 2**8),
        ([1.01, 0.5, 1.5, 0.8], 2**5 * 2**6),
        ([0.9, 0.9], choice.NO_SIZE.most_pairs),
        ([0.9, 1.2], choice.EVERY_SIZE.most_pairs),
    ],
    ids=str,
)
def test_a_cut_loses_least(gains, cut):
    times = {2 ** (5 + i): (1.0, gain) for i, gain in enumerate(gains)}
    assert choices.most_pairs(times) == cut


def test_ways_that_differ_choose_nothing(capsys):
    other = ("both_sides", "float16", 64, "sm_90")
    given = {CHOICE: FakeWays(spoil=0.1).row(), other: FakeWays(key=other).row()}
    found = __main__.choose(list(given), given.get, "Card X", float("inf"))
    assert found[0] == {}
    assert [text.split(":")[1] for text in found[1]] == [" WrongRowError"] * 2
    assert "WRONG: result 0 of 256 rows is off by 1.0e-01" in found[1][0]
    assert "does not read it" in found[1][1]
    chosen, wrong = __main__.choose([CHOICE], lambda _: FakeWays().row(), "Card X", float("inf"))
    today = time.strftime("%Y-%m-%d")
    assert chosen == {CHOICE: choice.Choice(2**23, source="Card X", date=today)}
    assert wrong == []
    assert "1024 rows: 14194.304 ms fused, 28145.728 ms by strips" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_left_out():
    ways = FakeWays()
    row = ways.row()
    row.call_for = lambda batch: fails if batch > 2048 else ways.call_for(batch)

    def fails():
        raise torch.cuda.OutOfMemoryError("no room")

    crossing = row.crossing()
    assert crossing.most_pairs == choice.EVERY_SIZE.most_pairs
    assert "no room" in crossing.times[8192]


def test_without_a_card_the_command_ends_in_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_no_file_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "x.json"
    path.write_text("mine")
    assert __main__.main(["--out", str(path)]) == 1
    assert f"{path} exists" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_every_op_has_a_call():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "tuned_rows_are_read.py"), "sm_90", "bfloat16"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    with pytest.raises(KeyError):
        calls.call_for("nothing", torch.float32, 8, "cpu", "reference", calls.Sizes(tiny=True))

"""The demo with tiny settings: what it computes, and what it says when it can't."""

import dataclasses
import importlib.util
import math
import re

import pytest
import torch

import ssl_fast
from ssl_fast.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import sklearn.cluster
import sklearn.metrics

from ssl_fast.demo import (
    cli,
    clustering,
    data,
    encoder,
    evaluation,
    memory,
    picture,
    plain,
    scaling,
    tables,
    training,
)
from ssl_fast.demo.results import (
    UNTRAINED,
    Results,
    readable_bytes,
    readable_seconds,
    readable_share,
)

MEBIBYTE = 2**20


def test_digits_are_split_once_and_balanced():
    digits = data.load_digits()
    assert digits.train_images.shape == (1257, 1, 8, 8)
    assert digits.test_images.shape == (540, 1, 8, 8)
    assert digits.train_images.min() == 0.0
    assert digits.train_images.max() == 1.0
    assert digits.test_labels.bincount().min() >= 52
    again = data.load_digits()
    assert torch.equal(digits.train_images, again.train_images)
    train = {tuple(image) for image in digits.train_images.flatten(1).tolist()}
    assert not any(tuple(image) in train for image in digits.test_images.flatten(1).tolist())


def test_views_differ_but_stay_near_the_image():
    images = data.load_digits().train_images[:200]
    generator = torch.Generator().manual_seed(3)
    first, second = data.random_view(images, generator), data.random_view(images, generator)
    assert first.shape == images.shape
    assert not torch.equal(first, second)
    replayed = data.random_view(images, torch.Generator().manual_seed(3))
    assert torch.equal(first, replayed)
    # Alike to their own image more than to the others.
    similarity = torch.nn.functional.normalize(first.flatten(1), dim=1) @ (
        torch.nn.functional.normalize(images.flatten(1), dim=1).T
    )
    own = similarity.diagonal()
    assert own.mean() > 0.65
    assert (own > similarity.mean(1)).float().mean() > 0.9


def test_plain_loss_is_the_formula_and_ssl_fast_s():
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = [row / row.norm() for row in torch.cat([z0, z1])]
    total = 0.0
    for i, row in enumerate(rows):
        others = [math.exp(row @ other / 0.2) for j, other in enumerate(rows) if j != i]
        total -= math.log(math.exp(row @ rows[(i + 5) % 10] / 0.2) / sum(others))
    assert plain.plain_nt_xent(z0, z1, 0.2).item() == pytest.approx(total / 10, rel=1e-12)
    assert ssl_fast.nt_xent(z0, z1, 0.2).item() == pytest.approx(total / 10, rel=1e-12)


def test_both_losses_train_alike_from_one_seed():
    images = data.load_digits().train_images[:256]
    before = encoder.new_encoder(7)

    def run(side):
        return training.pretrain(
            lambda z0, z1: scaling.loss_of(side, z0, z1), images,
            epochs=3, batch_size=64, seed=7, label=side,
        )  # fmt: skip

    ours, theirs = run(scaling.OURS), run(scaling.PLAIN)
    assert ours.losses[-1] < ours.losses[0] - 0.3
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-4)
    weights = before.trunk[0].weight
    assert torch.equal(weights, encoder.new_encoder(7).trunk[0].weight)
    assert not torch.equal(weights, ours.encoder.trunk[0].weight)


def test_scores_of_separable_and_of_random_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(20)
    separable = torch.eye(10)[labels] + 0.05 * torch.randn(200, 10, generator=generator)
    assert evaluation.score_features(
        separable[:100], labels[:100], separable[100:], labels[100:]
    ) == evaluation.Scores(1.0, 1.0)
    noise = torch.randn(200, 10, generator=generator)
    scores = evaluation.score_features(noise[:100], labels[:100], noise[100:], labels[100:])
    assert scores.probe < 0.3
    assert scores.neighbours < 0.3


def test_few_labels_are_as_many_of_each_class():
    labels = torch.arange(10).repeat(30)
    chosen = evaluation.few_labels(labels, 4, seed=1)
    assert labels[chosen].bincount().tolist() == [4] * 10
    assert chosen.unique().numel() == 40
    assert not torch.equal(chosen, evaluation.few_labels(labels, 4, seed=2))


def blobs():
    """Twelve rows around each of ten far corners, in mixed order, and which corner it was."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.arange(10).repeat(12)
    return 4 * torch.eye(10)[corners] + 0.5 * torch.randn(120, 10, generator=generator), corners


def test_clustering_has_scikit_learn_s_numbers():
    x, corners = blobs()
    found = clustering.compare(x, corners, seed=3)
    model = sklearn.cluster.KMeans(10, n_init=clustering.STARTS, random_state=3).fit(x.numpy())
    assert found.labels.tolist() == model.labels_.tolist()
    assert found.agreement == 1.0
    assert set(found.fits) == {scaling.OURS, clustering.THEIRS}
    for fit in found.fits.values():
        assert fit.rand == pytest.approx(
            sklearn.metrics.adjusted_rand_score(corners, model.labels_)
        )
        assert fit.information == pytest.approx(
            sklearn.metrics.normalized_mutual_info_score(corners, model.labels_)
        )
        assert fit.rand > 0.99
        assert fit.inertia == pytest.approx(model.inertia_, rel=1e-5)
        assert fit.iterations == model.n_iter_
        assert 0 < fit.seconds < 5


def test_clustering_of_noise_finds_no_digits():
    generator = torch.Generator().manual_seed(0)
    x, digits = torch.rand(300, 3, generator=generator), torch.arange(10).repeat(30)
    found = clustering.compare(x, digits, seed=0)
    assert abs(found.fits[scaling.OURS].rand) < 0.1
    assert found.fits[scaling.OURS].information < 0.2


def test_portraits_are_mean_images_with_their_digit_and_purity():
    images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    # Cluster 9 has no image, and cluster 2's digits are as many: the lower one names it.
    labels = torch.tensor([0, 0, 0, 2, 2, 5, 5])
    digits = torch.tensor([7, 7, 1, 8, 3, 0, 0])
    found = clustering.portraits(images, labels, digits)
    assert [(portrait.digit, portrait.purity) for portrait in found] == [
        (0, 1.0),
        (3, 0.5),
        (7, pytest.approx(2 / 3)),
    ]
    for portrait, cluster in zip(found, (5, 2, 0), strict=True):
        torch.testing.assert_close(portrait.image, images[labels == cluster].mean((0, 1)))


def test_embeddings_are_the_projector_s_with_statistics_frozen():
    images = data.load_digits().train_images[:32]
    model = encoder.new_encoder(0).train()
    statistics = model.trunk[1].running_mean.clone()
    found = encoder.embeddings_of(model, images)
    assert found.shape == (32, encoder.EMBEDDING)
    assert not found.requires_grad
    assert model.training
    assert torch.equal(model.trunk[1].running_mean, statistics)
    torch.testing.assert_close(found, model.projector(encoder.features_of(model, images)))


def hold_bytes(count):
    """A job for the child process: the call allocates and fills ``count`` bytes."""
    return lambda: torch.ones(count, dtype=torch.uint8)


def fail():
    raise ValueError("from the child")


@pytest.mark.skipif(memory.read_status_bytes("VmHWM") is None, reason="no VmHWM here")
def test_peak_memory_counts_what_a_call_holds():
    extra = memory.peak_extra_bytes(hold_bytes, 64 * MEBIBYTE)
    assert 62 * MEBIBYTE < extra < 80 * MEBIBYTE
    with pytest.raises(ValueError, match="from the child"):
        memory.peak_extra_bytes(fail)


def test_scaling_measures_both_sides():
    (point,) = scaling.measure([32], seconds=30)
    assert set(point.seconds) == {scaling.OURS, scaling.PLAIN}
    assert all(0 < seconds < 5 for seconds in point.seconds.values())
    assert point.skipped == {}


def test_scaling_skips_what_memory_or_time_lack(monkeypatch):
    monkeypatch.setattr(memory, "peak_extra_bytes", lambda *_: None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * (2 * 48) ** 2 * 4 * 2)
    points = list(scaling.measure([32, 64], seconds=30))
    assert scaling.PLAIN in points[0].seconds
    assert list(points[1].seconds) == [scaling.OURS]
    assert "half of what is free" in points[1].skipped[scaling.PLAIN]
    late = list(scaling.measure([32, 4096], seconds=0.0))
    assert "too long for the demo" in late[1].skipped[scaling.OURS]
    assert late[1].seconds == {}


def test_command_prints_the_table_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "QUICK_BATCHES", (16, 32))
    out = tmp_path / "picture.png"
    status = main(["demo", "--quick", "--epochs", "2", "--seed", "5", "--out", str(out)])
    assert status == 0
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size > 50_000
    printed = capsys.readouterr().out
    accuracies = [float(x) for x in re.findall(r"linear probe.*", printed)[0].split() if "." in x]
    assert len(accuracies) == 3
    assert all(60 < accuracy <= 100 for accuracy in accuracies)
    losses = re.findall(r"NT-Xent loss.* ([\d.]+) +([\d.]+)", printed)[0]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-3)
    assert "batch 32 (synthetic: 64 x 128, fp32)" in printed
    assert "k-means of the 1257 train images" in printed
    for space in (clustering.PIXELS, clustering.EMBEDDINGS):
        ours, theirs = (
            re.findall(rf"{space}, {side}  +([\d.]+) +([\d.]+) +([\d.]+) ", printed)[0]
            for side in (scaling.OURS, clustering.THEIRS)
        )
        assert 0.3 < float(ours[0]) <= 1.0
        assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=0.05)
        assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-3)
    assert str(out) in printed
    assert out.with_stem(f"{out.stem}_reconstruction").stat().st_size > 10_000


def some_results(agreement=1.0):
    """Results with one batch size, which plain torch skipped, and two clusters."""
    point = scaling.Point(64, {scaling.OURS: 0.5}, {scaling.OURS: 48 * MEBIBYTE})
    point.skipped[scaling.PLAIN] = "would need 30 GiB, over half of what is free"
    scores = {name: evaluation.Scores(0.9, 0.8) for name in (UNTRAINED, *scaling.SIDES)}
    fit = clustering.Fit(0.8694, 0.8912, 691.6095, 18, 0.034)
    fits = {scaling.OURS: fit, clustering.THEIRS: dataclasses.replace(fit, seconds=0.028)}
    found = clustering.Clustering(fits, torch.zeros(20, dtype=torch.int64), agreement)
    return Results(
        scores=scores,
        losses={side: [1.0] for side in scaling.SIDES},
        before=torch.zeros(1, 2),
        after=torch.zeros(1, 2),
        test_labels=torch.zeros(1),
        clusterings={clustering.PIXELS: found, clustering.EMBEDDINGS: found},
        portraits=[
            clustering.Portrait(torch.full((8, 8), shade), digit, purity)
            for shade, digit, purity in ((0.25, 3, 0.976), (0.5, 8, 1.0))
        ],
        points=[point],
        labels_per_class=10,
        threads=2,
    )


def test_the_table_of_clusters():
    lines = tables.render(some_results()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("k-means of the 20 train"))
    assert lines[start + 1].split() == [
        "adj.", "Rand", "NMI", "inertia", "iterations", "time", "same", "labels"
    ]  # fmt: skip
    rows = [re.split(" {2,}", line) for line in lines[start + 3 : start + 7]]
    assert rows[2] == ["embeddings, ssl_fast", "0.869", "0.891", "691.61", "18", "34 ms", "-"]
    assert rows[3] == [
        "embeddings, scikit-learn", "0.869", "0.891", "691.61", "18", "28 ms", "100 %"
    ]  # fmt: skip
    assert "96.4 %" in tables.render(some_results(agreement=0.964))


def test_the_picture_has_a_row_of_clusters(monkeypatch, tmp_path):
    import matplotlib.figure

    figures = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )
    picture.draw(some_results(), tmp_path / "x.png")
    panels, row = figures[0].subfigs
    assert len(panels.axes) == 6
    assert [axis.get_title() for axis in row.axes] == ["3: 97.6 %", "8: 100 %"]
    assert [axis.images[0].get_array().max() for axis in row.axes] == [0.25, 0.5]
    assert "adjusted Rand index 0.87" in row.get_suptitle()


def test_a_skipped_side_stands_in_the_table():
    results = some_results()
    assert results.large_batch() is None
    assert (
        "batch 64: plain torch skipped: it would need 30 GiB, over half of what is free; "
        "ssl_fast took 500 ms and 48 MiB" in tables.render(results)
    )


def test_missing_packages_are_named_before_any_work(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name)
    )
    assert main(["demo", "--out", str(tmp_path / "x.png")]) == 1
    message = capsys.readouterr().err
    assert "scikit-learn" in message
    assert "pip install ssl_fast[demo]" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "no/such/folder/x.png"], "no folder"),
        (["--out", "x.txt"], "expected a file ending in"),
    ],
)
def test_a_bad_out_is_refused_first(arguments, words, capsys):
    assert main(["demo", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "at least 1, got 0"),
        (["--batch-size", "1"], "at least 2"),
        (["--epochs", "many"], "many"),
    ],
)
def test_bad_numbers_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert words in capsys.readouterr().err


def test_config_command(capsys):
    assert main(["config"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_readable_numbers():
    assert [readable_bytes(n * MEBIBYTE) for n in (0.5, 48, 1024, 3277)] == [
        "0.5 MiB",
        "48 MiB",
        "1.0 GiB",
        "3.2 GiB",
    ]
    assert [readable_seconds(s) for s in (2e-4, 3.14e-3, 0.25, 4.2, 25)] == [
        "200 us",
        "3.1 ms",
        "250 ms",
        "4.20 s",
        "25 s",
    ]
    assert [readable_share(x) for x in (0.9639, 0.9999, 1.0)] == ["96.4 %", "99.9 %", "100 %"]

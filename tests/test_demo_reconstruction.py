"""The demo's second step with tiny settings: what it computes, prints and draws."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from ssl_fast.demo import (
    autoencoders,
    data,
    evaluation,
    reconstruction,
    reconstruction_picture,
    tables,
)
from ssl_fast.demo.reconstruction import AUTOENCODER, CROPPED, MASKED, PIXELS
from ssl_fast.demo.scaling import OURS, PLAIN, SIDES


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


def test_patches_are_cut_and_put_together():
    grid = autoencoders.Grid(channels=3, size=8, patch=4)
    images = torch.arange(2 * 3 * 64).float().view(2, 3, 8, 8)
    patches = grid.patches(images)
    assert patches.shape == (2, grid.length, grid.elements) == (2, 4, 48)
    assert torch.equal(patches[1, 2, :3], images[1, :, 4, 0])  # row, column, channel
    assert torch.equal(patches[0, 1, 3:6], images[0, :, 0, 5])
    assert torch.equal(grid.images(patches), images)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_both_sides_have_one_masked_loss(norm_pix_loss):
    grid = reconstruction.PHOTOGRAPHS
    torch.manual_seed(0)
    model = autoencoders.MaskedAutoencoder(grid, 0.75, norm_pix_loss=norm_pix_loss)
    images = reconstruction.crops(5, seed=3)
    assert images.shape == (5, 3, 32, 32)
    assert 0.0 <= images.min() < images.max() <= 1.0
    losses = [model.loss(images, side, torch.Generator().manual_seed(1)) for side in SIDES]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, model.predict.weight)[0] for loss in losses]
    torch.testing.assert_close(*grads)
    _, mask = model.predictions(images, torch.Generator().manual_seed(1))
    assert mask.sum(1).tolist() == [12.0] * 5


def test_both_sides_have_one_autoencoder_loss(digits):
    torch.manual_seed(0)
    model, images = autoencoders.Autoencoder(), digits.train_images[:50]
    losses = [model.loss(images, side) for side in SIDES]
    torch.testing.assert_close(*losses)
    logits = model.logits(model(images))
    exact = F.binary_cross_entropy(logits.sigmoid(), images.flatten(1))
    torch.testing.assert_close(losses[0], exact)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_filling_keeps_what_was_seen(digits):
    torch.manual_seed(0)
    model = autoencoders.MaskedAutoencoder(reconstruction.DIGITS, 0.5, norm_pix_loss=False)
    images = digits.train_images[:4]
    shown, filled = model.fill(images, torch.Generator().manual_seed(2))
    seen = shown == filled
    assert torch.equal(shown[seen], images[seen])
    assert 0.4 < float((shown == images).float().mean()) < 0.9
    assert 0.0 <= filled.min() <= filled.max() <= 1.0


def test_training_from_one_seed_is_the_same_on_both_sides(digits):
    losses = {}
    for side in SIDES:
        model = reconstruction._new(autoencoders.Autoencoder, 3)
        losses[side] = reconstruction.train(
            model, lambda images, side, _, model=model: model.loss(images, side),
            digits.train_images[:256], side=side, epochs=8, seed=3, name="x",
        )  # fmt: skip
    assert len(losses[PLAIN]) == reconstruction.COMPARED
    assert losses[OURS][: len(losses[PLAIN])] == pytest.approx(losses[PLAIN], rel=1e-4)
    assert losses[OURS][-1] < 0.96 * losses[OURS][0]


def test_fine_tuning_learns_and_l2_sp_holds_it_back(digits):
    labelled = evaluation.few_labels(digits.train_labels, 5, seed=0)
    model = reconstruction._new(reconstruction._masked_digits, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy = reconstruction.fine_tune(model, digits, labelled, sp=0.0, seed=0)
    assert accuracy > 0.2
    held = reconstruction.fine_tune(model, digits, labelled, sp=1e4, seed=0)
    assert held < accuracy
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def found(digits):
    small = data.Digits(
        digits.train_images[:300], digits.train_labels[:300],
        digits.test_images[:60], digits.test_labels[:60],
    )  # fmt: skip
    return reconstruction.collect(small, epochs=2, draws=2, seed=0)


def test_what_is_collected_and_printed(found):
    assert set(found.losses) == {AUTOENCODER, MASKED, CROPPED}
    for losses in found.losses.values():
        assert losses[OURS][0] == pytest.approx(losses[PLAIN][0], rel=1e-4)
    assert set(found.scores) == {PIXELS, AUTOENCODER, MASKED}
    assert [len(tuning.accuracies) for tuning in found.tunings] == [2, 2, 2]
    assert all(0.0 <= x <= 1.0 for tuning in found.tunings for x in tuning.accuracies)
    printed = tables.render_reconstructions(found)
    for name in (*found.losses, *found.scores, *(tuning.start for tuning in found.tunings)):
        assert name in printed
    first = found.losses[MASKED][OURS][0]
    assert f"{first:.4f}" in printed


def test_the_picture(found, monkeypatch, tmp_path):
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig",
        lambda figure, *arguments, **options: figures.append(figure)
        or save(figure, *arguments, **options),
    )  # fmt: skip
    path = tmp_path / "x.png"
    reconstruction_picture.draw(found, path)
    assert path.stat().st_size > 10_000
    upper, lower = figures[0].subfigs
    assert [len(part.axes) for part in upper.subfigs] == [12, 18, 18]
    image = upper.subfigs[0].axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(image.data), found.coded[0][0, 0])
    assert len(lower.axes) == 2

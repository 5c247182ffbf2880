"""How near images are to others: PSNR, and a bound by spectra."""

import numpy as np
import pytest

from atebm_jax.metrics import psnr, spectral_distance


def test_distance_of_two_greys_and_of_a_checkerboard_is_worked_by_hand():
    grey = np.full((3, 2, 2, 1), 0.5)
    darker = np.full((2, 2, 2, 1), 0.25)
    # Four pixels differ by 0.25: the root of 4 x 0.0625.
    assert spectral_distance(grey, darker) == pytest.approx(0.5, rel=1e-6)
    board = grey + 0.25 * np.array([[1, -1], [-1, 1]])[None, :, :, None]
    assert spectral_distance(grey, board) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (4, 6, 3), (1, 9, 1)])
def test_from_black_it_is_the_length_of_an_image(shape):
    image = np.random.default_rng(0).random((1, *shape))
    assert spectral_distance(np.zeros((1, *shape)), image) == pytest.approx(
        np.linalg.norm(image), rel=1e-5
    )


def test_no_pairing_is_nearer():
    rng = np.random.default_rng(0)
    noise = rng.random((200, 8, 8, 3))
    rows = np.broadcast_to(rng.random((200, 8, 1, 3)), noise.shape)
    # Each row's mean: the nearest images that are constant along rows.
    nearest = np.broadcast_to(noise.mean(axis=2, keepdims=True), noise.shape)
    for others in (rows, nearest):
        square = np.square(noise - others).sum(axis=(1, 2, 3)).mean()
        assert 0 < spectral_distance(noise, others) <= np.sqrt(square)


def test_few_images_of_one_kind_do_not_lie_apart():
    rng = np.random.default_rng(0)
    noise = rng.random((40, 16, 16, 3))
    assert spectral_distance(noise[:20], noise[20:]) < 0.01 * np.sqrt(noise[0].size)


def test_large_images_pass_in_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.random((7, 8, 8, 3)), 0.5 * rng.random((5, 8, 8, 3))
    whole = spectral_distance(first, second)
    monkeypatch.setattr("atebm_jax.metrics.images._CHUNK_SIZE", 8 * 8 * 3 * 2)
    assert spectral_distance(first, second) == pytest.approx(whole, rel=1e-6)


def test_psnr_is_worked_by_hand():
    truth = np.zeros((2, 2, 2, 1), np.float32)
    images = truth.copy()
    images[0] = 0.1
    images[1, 0, 0] = 0.2
    # Mean squares 0.01 and 0.04 / 4 = 0.01.
    assert psnr(images, truth) == pytest.approx([20.0, 20.0], rel=1e-6)


def test_images_of_two_shapes_are_refused():
    images = np.zeros((3, 4, 4, 1))
    with pytest.raises(ValueError, match="expected the same"):
        psnr(images, np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"\(4, 4, 1\) and \(4, 5, 1\)"):
        spectral_distance(images, np.zeros((2, 4, 5, 1)))


def test_psnr_of_the_same_image_is_infinite_and_falls_with_noise():
    rng = np.random.default_rng(0)
    truth = rng.random((1, 8, 8, 3))
    values = [
        psnr(truth + sigma * rng.normal(size=truth.shape), truth)[0]
        for sigma in (0.0, 0.01, 0.1)
    ]
    assert values[0] == np.inf
    assert values[1:] == pytest.approx([40.0, 20.0], abs=1.5)

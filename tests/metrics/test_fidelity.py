"""Peak signal-to-noise ratio."""

import numpy as np
import pytest

from atebm_jax import metrics


def test_psnr_is_worked_by_hand():
    truth = np.zeros((2, 2, 2, 1), np.float32)
    images = truth.copy()
    images[0] = 0.1
    images[1, 0, 0] = 0.2
    # Mean squares 0.01 and 0.04 / 4 = 0.01.
    assert metrics.psnr(images, truth) == pytest.approx([20.0, 20.0], rel=1e-6)


def test_psnr_of_the_same_image_is_infinite_and_falls_with_noise():
    rng = np.random.default_rng(0)
    truth = rng.random((1, 8, 8, 3))
    values = [
        metrics.psnr(truth + sigma * rng.normal(size=truth.shape), truth)[0]
        for sigma in (0.0, 0.01, 0.1)
    ]
    assert values[0] == np.inf
    assert values[1:] == pytest.approx([40.0, 20.0], abs=1.5)

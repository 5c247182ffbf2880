import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="session")
def golden():
    path = SHARED / "golden" / "autoaugment_ops.npz"
    if not path.exists():
        pytest.skip("the reference outputs (../shared/golden) are not here")
    return np.load(path)


@pytest.fixture
def encode():
    """Encodes uint8 [H, W, 3] or [H, W] as a file's bytes."""

    def to_bytes(image, kind="JPEG"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind)
        return buffer.getvalue()

    return to_bytes


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)


@pytest.fixture
def flat_folder(tmp_path, encode):
    """Makes a folder of `count` images 8x8; file i is of grey level 5 i."""

    def make(count, bad=()):
        for i in range(count):
            data = encode(np.full((8, 8, 3), 5 * i, np.uint8), "PNG")
            (tmp_path / f"{i:03d}.png").write_bytes(b"text" if i in bad else data)
        return tmp_path

    return make

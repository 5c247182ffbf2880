"""Images a second per CPU core for decoding and augmenting photographs.

    python benchmarks/decode.py --data_dir=TFDS_FOLDER

Takes `imagenet_sample:train` of a TFDS folder (JPEG), as it is and prepared with a
shorter side of 292 pixels, and prints the median of CPU time over rounds: for each
decoder alone, for the project's own augmentation with Pillow, and how many cores keep
a device busy that takes 500, 1,000 or 2,000 images of one stream a second.
"""

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from atebm_jax import data
from atebm_jax.data.prepare import resized

AUGMENT = "random_resized_crop(256)|flip"
RATES = (500, 1000, 2000)


def _pillow(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Pillow, and what else is installed."""
    found: dict[str, Callable[[bytes], np.ndarray]] = {"Pillow": _pillow}
    try:
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda image: cv2.cvtColor(
            cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR),
            cv2.COLOR_BGR2RGB,
        )
    except ImportError:
        pass
    try:
        import simplejpeg

        found["simplejpeg"] = lambda image: simplejpeg.decode_jpeg(image)
    except ImportError:
        pass
    return found


def rate(
    function: Callable[[bytes], object], images: list[bytes], rounds: int
) -> float:
    """Images a second of CPU time, median over rounds."""
    rates = []
    for _ in range(rounds):
        began = time.process_time()
        for image in images:
            function(image)
        rates.append(len(images) / (time.process_time() - began))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--count", type=int, default=300, help="images")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = data.open_source("tfds:imagenet_sample:train", options.data_dir)
    images = [bytes(source[i]["image"]) for i in range(min(options.count, len(source)))]
    sets = {
        "as they are": images,
        "prepared(256)": [resized(image, 256, 95) for image in images],
    }
    augment = data.parse(AUGMENT)
    rng = np.random.default_rng(0)
    print("| photographs | step | images a CPU-second | cores for", end="")
    print(f" {' / '.join(map(str, RATES))} images/s |\n|---|---|---:|---:|")
    for title, encoded in sets.items():
        parts: dict[str, Callable[[bytes], object]] = {
            f"decode, {name}": decode for name, decode in decoders().items()
        }
        parts[f"decode (Pillow), {AUGMENT}"] = lambda image: augment(
            data.decode(image, 3), rng
        )
        for part, function in parts.items():
            speed = rate(function, encoded, options.rounds)
            cores = " / ".join(str(math.ceil(r / speed)) for r in RATES)
            print(f"| {title} | {part} | {speed:.0f} | {cores} |", flush=True)


if __name__ == "__main__":
    main()

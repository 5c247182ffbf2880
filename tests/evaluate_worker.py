"""One of several processes that evaluate together, each with a disk of its own.

python tests/evaluate_worker.py PORT PROCESSES RANK WORKDIR OUT METRICS
"""

import sys
from functools import partial
from unittest import mock

import jax
import small  # noqa: F401

from atebm_jax import autoattack, sharding
from atebm_jax.autoattack import ensemble
from atebm_jax.evaluate import suite
from atebm_jax.evaluate.options import Options


def evaluate(workdir: str, out: str, metrics: list[str]) -> dict:
    """A small evaluation; one process alone calls it too."""
    options = Options(
        num_examples=60,
        num_samples=40,
        num_reference=80,
        num_resamples=5,
        radii=(2.0,),
        epsilons=(0.5,),
        sweep=1,
        version="custom",
        attacks=("apgd-ce", "square"),
        cache_dir=f"{out}/cache",
        save_adversarial=True,
    )
    quick = partial(autoattack.run, settings={"num_steps": 3, "num_queries": 5})
    with (
        mock.patch.object(autoattack, "run", quick),
        # Last batches are filled up to whole ones: nothing else to compile.
        mock.patch.object(ensemble, "_PARTS", (1,)),
    ):
        return suite.evaluate(workdir, out, metrics=metrics, options=options)


def main() -> None:
    port, count, rank, workdir, out, metrics = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    sharding.initialize_processes(f"localhost:{port}", int(count), int(rank))
    assert jax.process_count() == int(count)
    evaluate(workdir, out, metrics.split(","))


if __name__ == "__main__":
    main()

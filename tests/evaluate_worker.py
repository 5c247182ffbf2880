"""One of several processes that evaluate together, each with a disk of its own.

python tests/evaluate_worker.py PORT PROCESSES RANK WORKDIR OUT METRICS
"""

import sys
from functools import partial

import jax


def main() -> None:
    port, count, rank, workdir, out, metrics = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    from atebm_jax import autoattack, sharding
    from atebm_jax.evaluate import suite
    from atebm_jax.evaluate.options import Options

    sharding.initialize_processes(f"localhost:{port}", int(count), int(rank))
    assert jax.process_count() == int(count)
    quick = {"num_steps": 3, "num_queries": 5, "targets": 2, "fab_targets": 2}
    autoattack.run = partial(autoattack.run, settings=quick)
    options = Options(
        num_examples=60,
        num_samples=40,
        num_reference=80,
        num_resamples=5,
        radii=(2.0,),
        epsilons=(0.5,),
        sweep=1,
        cache_dir=f"{out}/cache",
        save_adversarial=True,
    )
    suite.evaluate(workdir, out, metrics=metrics.split(","), options=options)


if __name__ == "__main__":
    main()

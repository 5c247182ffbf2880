"""One process of a job that steps on every mesh; writes losses and weights.

python tests/process_worker.py PORT PROCESSES RANK OUT
"""

import sys

import jax
import numpy as np


def train() -> dict[str, np.ndarray]:
    """Losses and weights of two steps on every mesh."""
    import test_fsdp

    from atebm_jax import sharding

    saved = {}
    for spec in ("data:-1", "data:-1,fsdp:4"):
        mesh = sharding.make_mesh(spec)
        step, state = test_fsdp.update_on(mesh, "sgd", 0.1, "swish")
        for seed in range(2):
            state, metrics = step(state, test_fsdp.batch_on(mesh, seed))
            for name in ("loss", "auc", "gradient_norm"):
                saved[f"{spec}/{name}/{seed}"] = np.asarray(metrics[name])
        whole = jax.tree.leaves(sharding.gather(state.params, mesh))
        saved |= {f"{spec}/{i}": np.asarray(leaf) for i, leaf in enumerate(whole)}
    return saved


def main() -> None:
    port, count, rank, out = sys.argv[1:]
    # Eight devices in all, however many processes there are.
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    from atebm_jax import sharding

    sharding.initialize_processes(f"localhost:{port}", int(count), int(rank))
    saved = train()
    assert jax.process_count() == int(count) and jax.device_count() == 8
    if rank == "0":
        np.savez(out, **saved)


if __name__ == "__main__":
    main()

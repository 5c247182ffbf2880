"""Our side of `step.py`: the code as training runs it."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from sides import CHECKED_STEPS, Settings, batch, timed

from atebm_jax import ascent, energy, models, sharding, train
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.models import forms

# Of the compute dtype, in seeds and weights: what many layers add up to.
ROUNDINGS = 10.0


class JaxSide:
    """Our code: `ascent.climb` and the step of `train.plan_stage`, state donated."""

    def __init__(self, settings: Settings):
        if settings.device == "cpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
            jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
        backend = jax.default_backend()
        if backend != settings.device:
            raise UserError(
                f"--device={settings.device}, but JAX runs on {backend} here: install "
                "the matching extra of atebm_jax, or choose another device."
            )
        self.settings, self.config = settings, settings.config
        if settings.form is not None:
            # To the end of the process, which runs this side alone.
            forms.only(settings.form).__enter__()
        self.model = models.build(self.config.model)

    def weights(self) -> Any:
        """Fresh variables as nested dicts of numpy arrays."""
        images = np.zeros((1, *self.config.data.image_shape), np.float32)
        key = jax.random.key(self.config.seed)
        return jax.device_get(jax.jit(self.model.init)(key, images))

    def prepare(self, variables: Any) -> dict[str, Any]:
        """Compiles loop and step; returns seconds of compilation and versions."""
        # PyTorch uses one device too; of a CPU only ours may be several.
        devices = jax.devices()[: self.settings.cpu_devices]
        mesh = jax.make_mesh(
            (len(devices),),
            (sharding.BATCH_AXIS,),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=devices,
        )
        self.batch = sharding.put_batch(batch(self.config), mesh)
        compile_seconds = {
            "loop": timed(lambda: self._compile_loop(variables, mesh))[0],
            "step": timed(lambda: self._compile_step(variables, mesh))[0],
        }
        return {
            "compile_s": compile_seconds,
            "device": devices[0].device_kind,
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        }

    def _compile_loop(self, variables: Any, mesh: Any) -> None:
        stage = self.config.stage2

        def loop(variables, seeds, labels, num_steps):
            logits_fn = models.freeze(self.model, variables, seeds.shape[1:])
            return ascent.climb(
                lambda x: energy.score(logits_fn(x), labels),
                seeds,
                step_size=stage.contrastive_step_size,
                num_steps=num_steps,
            )

        seeds = self.batch["x_ood"].astype(jnp.float32) / 255.0
        self._loop_arguments = (
            sharding.put_replicated(variables, mesh),
            jax.device_put(seeds, sharding.batched(mesh)),
            self.batch["y_gen"],
            sharding.put_replicated(jnp.int32(stage.t_max), mesh),
        )
        self._loop = jax.jit(loop).lower(*self._loop_arguments).compile()

    def _compile_step(self, variables: Any, mesh: Any) -> None:
        total = configuration.num_steps(self.config.stage2, 50_000)
        plan = train.plan_stage(self.config, "stage2", self.model, total)

        def fresh(variables: Any) -> Any:
            # Copies, as the step takes over its buffers.
            state = plan.new_state(jax.tree.map(jnp.array, variables))
            # T starts at T_max, so that it stays where it is.
            num_steps = jnp.int32(self.config.stage2.t_max)
            curriculum = dataclasses.replace(state.extra, num_steps=num_steps)
            state = dataclasses.replace(state, extra=curriculum)
            return sharding.put_replicated(state, mesh)

        self._fresh, self._state = fresh, fresh(variables)
        everywhere = sharding.replicated(mesh)
        jitted = jax.jit(
            plan.step, donate_argnums=0, out_shardings=(everywhere, everywhere)
        )
        self._step = jitted.lower(self._state, self.batch).compile()

    def _advance(self) -> dict[str, Any]:
        self._state, metrics = self._step(self._state, self.batch)
        jax.block_until_ready((self._state, metrics))
        return metrics

    def check(self) -> dict[str, Any]:
        """Logits, contrastive images, metrics of two steps, and the state after them.

        "nearby" and "nearby_metrics" are images and metrics from seeds and weights that
        differ by as much as rounding adds up to over the layers.
        """
        variables, seeds, *rest = self._loop_arguments
        logits = jax.jit(models.logits_fn(self.model, variables))(seeds)
        images = np.asarray(self._loop(variables, seeds, *rest))
        shifted = jax.device_put(self._nudged(seeds), seeds.sharding)
        nearby = np.asarray(self._loop(variables, shifted, *rest))
        params = jax.tree.map(self._nudged, variables["params"])
        self._state = self._fresh({**variables, "params": params})
        nearby_metrics = self._checked_steps()
        self._state = self._fresh(variables)
        return {
            "logits": np.asarray(logits),
            "images": images,
            "nearby": nearby,
            "nearby_metrics": nearby_metrics,
            "metrics": self._checked_steps(),
            "params": _to_numpy(self._state.params),
            "average_params": _to_numpy(self._state.average_params),
        }

    def _nudged(self, array: Any) -> np.ndarray:
        """The array but for some roundings of either sign, float32."""
        array = np.asarray(array)
        signs = np.random.default_rng(1).choice((-1.0, 1.0), array.shape)
        rounding = ROUNDINGS * float(jnp.finfo(self.config.model.dtype).eps) * signs
        return (array * (1.0 + rounding)).astype(np.float32)

    def _checked_steps(self) -> list[dict[str, float]]:
        metrics = [self._advance() for _ in range(CHECKED_STEPS)]
        return [
            {name: float(value) for name, value in step.items()} for step in metrics
        ]

    def run(self, what: str) -> tuple[float, float]:
        """One repeat of "loop" or "step": (wall seconds, CPU seconds)."""
        if what == "loop":
            return timed(lambda: self._loop(*self._loop_arguments).block_until_ready())
        return timed(self._advance)

    def peak_bytes(self) -> int | None:
        """Of device memory so far; None where the device does not say (a CPU)."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def peak(self) -> float:
        """FLOP/s of large square matrix products in the compute dtype, best of five."""
        side = 512 if jax.default_backend() == "cpu" else 8192
        repeats = 8
        key = jax.random.key(0)
        a = jax.random.normal(key, (side, side), self.config.model.dtype) / side**0.5

        def chain(x: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, repeats, lambda _, z: z @ y, x)

        product = jax.jit(chain).lower(a, a).compile()
        product(a, a).block_until_ready()
        seconds = [
            timed(lambda: product(a, a).block_until_ready())[0] for _ in range(5)
        ]
        return 2.0 * side**3 * repeats / min(seconds)


def _to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)

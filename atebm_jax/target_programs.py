"""Programs of a config, compiled for a machine that is not here.

The step of a stage, what draws samples, and the attacks of AutoAttack.
"""

import math
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax import drawing, dry_run, hlo, models, recipes, sharding, targets
from atebm_jax.autoattack import programs, versions
from atebm_jax.errors import UserError
from atebm_jax.seeds import NOISE
from atebm_jax.targets import Target
from atebm_jax.train import jit_step, placed_state, plan_stage


class CompilerFailure(UserError):
    """The target's compiler gives up on a program, not for want of memory."""


class Compiled(NamedTuple):
    """What a compiler made of a program."""

    program: hlo.Program | None  #: its text, read; None where it does not fit
    memory: dict[str, int]  #: bytes a device by kind, "needed" among them
    seconds: float  #: that compilation took


def lower_step(
    config: ml_collections.ConfigDict, name: str, target: Target
) -> tuple[Any, Any, Any]:
    """The update of a stage that training runs, ready to be compiled for a target.

    Returns:
      The lowered update, and the placed shapes of its state and of its batch.

    Raises:
      UserError: config or target is refused, or the compiler is not here.
    """
    mesh = sharding.make_mesh(config.mesh, targets.devices(target))
    block, shape = config[name], tuple(config.data.image_shape)
    field = f"config.{name}.batch_size"
    sharding.check_batch_size(
        block.batch_size, mesh.size, field, block.num_micro_batches
    )
    model = models.build(config.model)
    # Its length needs the data; a warm-up must fit.
    plan = plan_stage(config, name, model, max(block.warmup_steps, 1), mesh)
    state = placed_state(plan, models.variable_shapes(model, shape), mesh)
    batch = dry_run.batch_shapes(
        plan.stage, shape, block.batch_size, jnp.uint8, sharding.batched(mesh)
    )
    if config.data.seeds == NOISE:
        batch.pop("x_ood", None)
    placement = jax.tree.map(lambda x: x.sharding, state)
    step: Any = jit_step(plan.step, placement, mesh)
    return step.lower(state, batch), state, batch


def compile_step(
    config: ml_collections.ConfigDict, name: str, target: Target
) -> Compiled:
    """Compiles the update that training runs; arguments and errors of `lower_step`.

    Raises:
      CompilerFailure: the compiler gives up, not for want of memory.
    """
    begin = time.monotonic()
    lowered, state, batch = lower_step(config, name, target)
    # The loop puts the next batch on the devices while a step runs.
    return compile_lowered(lowered, target, _a_device(state), _a_device(batch), begin)


def lower_sampler(
    config: ml_collections.ConfigDict, model: nn.Module, device: jax.Device
) -> Any:
    """The program that draws one chunk, to be compiled for a device."""
    static, traced = drawing.parts_of(recipes.of_config(config.evaluate.samples))
    shape = tuple(config.data.image_shape)
    images = jax.ShapeDtypeStruct((drawing.CHUNK, *shape), jnp.float32)
    numbers = jax.ShapeDtypeStruct((drawing.CHUNK,), jnp.int32)
    weights = (models.variable_shapes(model, shape), None)
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = sharding.shapes_at((weights, traced, numbers, numbers, images), place)
    program: Any = drawing.chunk_program(model, static, None)
    return program.lower(*arguments)


def prepared_shapes(config: ml_collections.ConfigDict) -> Any:
    """The shapes of a network that is made ready once."""
    shape, model = tuple(config.data.image_shape), models.build(config.model)
    return jax.eval_shape(
        lambda variables: models.freeze(model, variables, shape),
        models.variable_shapes(model, shape),
    )


def lower_attack(
    config: ml_collections.ConfigDict,
    plan: versions.Plan,
    name: str,
    network: Any,
    target: Target,
) -> Any:
    """One round of an attack on a batch of the evaluation, ready to be compiled.

    `network` is that of `prepared_shapes`.

    Raises:
      UserError: the batch does not split over the devices, as of `evaluate`.
    """
    mesh = sharding.ordered_mesh(targets.devices(target))
    size = config.evaluate.batch_size
    sharding.check_batch_size(size, mesh.size, "config.evaluate.batch_size")
    images = jax.ShapeDtypeStruct((size, *config.data.image_shape), jnp.float32)
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    whole = sharding.replicated(mesh)
    batch = programs.Batch(
        *sharding.shapes_at((images, numbers, numbers), sharding.batched(mesh)),
        *sharding.shapes_at((*scalars, key), whole),
    )
    attack: Any = programs.attack
    placed = sharding.shapes_at(network, whole)
    return attack.lower(programs.planned(plan, name), placed, batch)


def _executable(lowered: Any, target: Target) -> Any:
    """Compiles; for a GPU without Triton's products where their tiles cannot be found.

    The compiler would try them on the device, and take cuBLAS where none works.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not target.is_gpu or _needed(str(error)) is not None:
            raise
        options = {"xla_gpu_enable_triton_gemm": False}
        return lowered.compile(compiler_options=options)


def compile_lowered(
    lowered: Any, target: Target, state_bytes: int, batch_bytes: int, begin: float
) -> Compiled:
    """Compiles; of what does not fit, what the compiler says that it would need.

    Args:
      lowered, target: the program, and what it was lowered for.
      state_bytes, batch_bytes: of a device, its state or weights, and the batch that
        waits beside the program.
      begin: `time.monotonic()` before it was lowered.

    Raises:
      CompilerFailure: the compiler gives up, not for want of memory.
    """
    try:
        compiled = _executable(lowered, target)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            reason = " ".join(str(error).partition("\n")[0].split())[:300]
            raise CompilerFailure(
                f"the compiler of {target.name} fails on this program ({reason}): try "
                "another version of jax and of the compiler, or another target."
            ) from error
        memory = _memory(state_bytes + batch_bytes, needed, batch_bytes)
        return Compiled(None, memory, time.monotonic() - begin)
    found = compiled.memory_analysis()
    peak = max(
        getattr(found, "peak_memory_in_bytes", 0),
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes,
    )
    memory = _memory(
        found.argument_size_in_bytes,
        peak,
        batch_bytes,
        found.generated_code_size_in_bytes,
    )
    program = hlo.Program(compiled.as_text())
    return Compiled(program, memory, time.monotonic() - begin)


def _memory(arguments: int, peak: int, batch: int, program: int = 0) -> dict[str, int]:
    """Bytes a device by kind; "needed" is the peak with what is there beside it."""
    return {
        "arguments": arguments,
        "temporaries": peak - arguments,
        "peak": peak,
        "program": program,
        "next batch": batch,
        "needed": peak + program + batch,
    }


def _a_device(tree: Any) -> int:
    """Bytes of placed shapes that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _needed(message: str) -> int | None:
    """Bytes that a program would need, by its refusal; None of another error.

    Arguments and outputs are among the "temporaries" of which it may speak.
    """
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))

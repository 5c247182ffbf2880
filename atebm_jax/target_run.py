"""The step of a config, compiled for a machine that is not here: what it would take.

Nothing is measured: memory and communication are those of the program that the machine
would be given. The time is an estimate: on a TPU the compiler's own, of the cycles of
every instruction; on a GPU, whose compiler makes none, the time that each kernel's
FLOPs and bytes take at the peaks of the card, without launches and communication.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax import config as configuration
from atebm_jax import (
    data,
    drawing,
    dry_run,
    hlo,
    models,
    recipes,
    sharding,
    storage,
    targets,
)
from atebm_jax.autoattack import programs, versions
from atebm_jax.dry_run import GIB
from atebm_jax.errors import UserError, check_choice
from atebm_jax.progress import say, waiting
from atebm_jax.seeds import NOISE
from atebm_jax.stages import CONTRASTIVE, STAGES
from atebm_jax.targets import Target
from atebm_jax.train import jit_step, placed_state, plan_stage

# Images of an epoch where the data are not at hand.
_NUM_TRAIN = {
    "tfds:imagenet2012:train": 1_281_167,
    "tfds:cifar10:train": 50_000,
    "tfds:cifar100:train": 50_000,
}
# The scopes of loops, as traced: of the parts of a batch, and of any climb, which is a
# sampler's only one.
_PARTS = "parts"
_CLIMB = {CONTRASTIVE: "climb"}
_MOST_DOUBLINGS = 4

#: What `run` can compile.
PROGRAMS = ("train", "sample", "autoattack")


class CompilerFailure(UserError):
    """The target's compiler gives up on a program, not for want of memory."""


class Compiled(NamedTuple):
    """What a compiler made of a step."""

    program: hlo.Program | None  #: its text, read; None where the step does not fit
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
    return _compiled(lowered, target, _a_device(state), _a_device(batch), begin)


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


def _compiled(
    lowered: Any, target: Target, state: int, batch: int, begin: float
) -> Compiled:
    """Compiles; of what does not fit, what the compiler says that it would need."""
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
        memory = _memory(state + batch, needed, batch)
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
        found.argument_size_in_bytes, peak, batch, found.generated_code_size_in_bytes
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


def peak(target: Target, dtype: str) -> float:
    """FLOP/s of a device; products of float32 run on a GPU as TF32, at half of them."""
    halved = target.is_gpu and dtype == "float32"
    return target.chip.flops / (2 if halved else 1)


def estimate(
    program: hlo.Program, target: Target, dtype: str
) -> Callable[[str], float]:
    """Name of a computation -> seconds of its own instructions, worked out once."""
    chip, flops = target.chip, peak(target, dtype)

    @functools.cache
    def of(name: str) -> float:
        if not target.is_gpu:
            return program.own_cycles(name) * chip.flops_per_cycle / chip.flops
        costs = program.kernel_costs(name)
        return sum(max(f / flops, b / chip.bandwidth) for f, b in costs)

    return of


def climbs_of(config: ml_collections.ConfigDict, name: str) -> dict[str, str]:
    """The parts of a stage that climb, and the scopes of their loops."""
    parts = STAGES[name].parts(config[name])
    return {part: declared.scope for part, declared in parts.items() if declared.scope}


def _part(loop: hlo.Loop, climbs: Mapping[str, str]) -> str:
    """Which of a step's loops this is; "" for sorts, searches and the like."""
    if loop.scope.endswith(f"{_PARTS}/while"):
        return _PARTS
    # The longest scope first: others may be its end.
    for part, scope in sorted(climbs.items(), key=lambda item: -len(item[1])):
        if f"/{scope}/while/" in f"/{loop.scope}/":
            return part
    return ""


def _loops(
    program: hlo.Program, climbs: Mapping[str, str], name: str = ""
) -> Iterator[tuple[str, hlo.Loop]]:
    """The loops of a batch's parts and of PGD; of one climb's nest only the outermost.

    A sampler climbs in a loop of one turn around the loop of steps, where the compiler
    has not removed it; what a step itself searches for stands further inside.
    """
    for loop in program.loops(name):
        part = _part(loop, climbs)
        if part:
            yield part, loop
        if part not in climbs:
            yield from _loops(program, climbs, loop.body)


def times(
    program: hlo.Program,
    target: Target,
    climbs: Mapping[str, str],
    *,
    parts: int,
    dtype: str = "bfloat16",
) -> dict[str, float]:
    """Seconds of a step's parts.

    Args:
      program, target: a compiled step, and what it was compiled for.
      climbs: as of `climbs_of`.
      parts, dtype: micro-batches, and the network's dtype.

    Returns:
      Each of the climbs that has a loop (one step, of the whole batch), and "rest".
    """
    own_seconds = estimate(program, target, dtype)
    loops = list(_loops(program, climbs))

    def taking(climbed: str) -> float:
        bodies = {
            loop.body: parts if part == _PARTS else int(part == climbed)
            for part, loop in loops
        }
        return program.total(own_seconds, bodies)

    rest = taking("")
    there = {part for part, _ in loops}
    result = {part: taking(part) - rest for part in climbs if part in there}
    return result | {"rest": rest}


def whole(seconds: Mapping[str, float], turns: Mapping[str, int]) -> float:
    """Seconds of a whole step, of those of its `times` and of how often each part runs.

    What runs without a loop of its own is in the rest.
    """
    climbs = (turns[part] * x for part, x in seconds.items() if part != "rest")
    return seconds["rest"] + sum(climbs)


def communication(
    program: hlo.Program, climbs: Mapping[str, str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Collectives by place and kind: how many, and the bytes of their results."""
    loops = program.all_loops()
    inner = [loop for part, loop in _loops(program, climbs) if part in climbs]
    in_pgd = {line for loop in inner for line in program.reachable(loop.body)}
    in_loops = {line for loop in loops for line in program.reachable(loop.body)}
    places = {
        "in the loops of PGD": in_pgd,
        "in other loops": in_loops - in_pgd,
        "outside of loops": set(program.everything()) - in_loops,
    }
    result: dict[str, dict[str, dict[str, int]]] = {}
    for place, lines in places.items():
        found: dict[str, dict[str, int]] = {}
        for made in hlo.collectives(sorted(lines)):
            entry = found.setdefault(made.kind, {"number": 0, "bytes": 0})
            entry["number"] += 1
            entry["bytes"] += made.bytes
        result[place] = found
    return result


def figures(
    config: ml_collections.ConfigDict,
    name: str,
    target: Target,
    compiled: Compiled,
    step_flops: Callable[[int], float],
) -> dict[str, Any]:
    """What a compiled step takes, as numbers to print and to write.

    `step_flops` is a function of T, of a step on all devices.
    """
    block = config[name]
    result = _basics(config, target, compiled) | {
        "mesh": config.mesh,
        "batch_size": block.batch_size,
        "num_micro_batches": block.num_micro_batches,
    }
    if compiled.program is None:
        return result
    dtype, parts = config.model.dtype, block.num_micro_batches
    climbs = climbs_of(config, name)
    seconds = times(compiled.program, target, climbs, parts=parts, dtype=dtype)
    most = target.num_devices * peak(target, dtype)
    return result | {
        "time_is": _basis(target, dtype),
        "seconds": seconds,
        "step": steps(config, name, seconds, step_flops, most),
        "collectives": communication(compiled.program, climbs),
    }


def steps(
    config: ml_collections.ConfigDict,
    name: str,
    seconds: Mapping[str, float],
    step_flops: Callable[[int], float],
    most: float,
) -> dict[str, dict[str, float]]:
    """Whole steps at each of `dry_run.moments`, as numbers to print and to write.

    `seconds` are the `times` of the parts; `step_flops` as of `figures`; `most` is the
    peak of all devices, in FLOP/s.
    """
    block, images = config[name], num_images(config)
    turns = STAGES[name].turns(block)
    at: dict[str, dict[str, float]] = {}
    for moment, contrastive in dry_run.moments(name, turns).items():
        step = whole(seconds, {**turns, CONTRASTIVE: contrastive})
        at[moment] = {
            "seconds": step,
            "share_of_peak": step_flops(contrastive) / (step * most),
            "images_per_second": block.batch_size / step,
        }
        if images:
            hours = configuration.num_steps(block, images) * step / 3600
            at[moment] |= {
                "hours_of_an_epoch": images / block.batch_size * step / 3600,
                "hours_of_the_budget": hours,
            }
    return at


def _basics(
    config: ml_collections.ConfigDict, target: Target, compiled: Compiled
) -> dict[str, Any]:
    limit = int(target.chip.memory_gib * GIB)
    return {
        "target": target.name,
        "versions": targets.versions(target),
        "devices": target.num_devices,
        "remat": config.model.remat,
        "memory_bytes": compiled.memory | {"available": limit},
        "fits": compiled.program is not None and compiled.memory["needed"] <= limit,
        "compilation_seconds": round(compiled.seconds, 1),
    }


def _basis(target: Target, dtype: str) -> str:
    """What the times are."""
    if not target.is_gpu:
        return "the compiler's own estimate of cycles"
    at = "" if peak(target, dtype) == target.chip.flops else ", at the peak of TF32"
    return (
        f"the roofline of the compiled kernels' FLOPs and bytes{at}, without launches "
        "and communication"
    )


def num_images(config: ml_collections.ConfigDict) -> int | None:
    """Images of an epoch: of the data where they are here, else of what is known."""
    if config.data.train in _NUM_TRAIN:
        return _NUM_TRAIN[config.data.train]
    try:
        return len(data.open_source(config.data.train, config.data.data_dir))
    except UserError:
        return None


def run(
    config: ml_collections.ConfigDict,
    target_name: str,
    *,
    program: str = "train",
    console: Console | None = None,
    json_file: str | None = None,
) -> dict[str, Any]:
    """Compiles every stage of a config for a target, prints and says what fits.

    Where a step does not fit, changes are compiled until one does.

    Args:
      config, console, json_file: as of `dry_run.run`.
      target_name: as "v5e:2x4" or "h100:8".
      program: "train", "sample" for the program that draws the config's samples, or
        "autoattack" for the attacks of the standard version at the evaluation's radius.

    Returns:
      The figures by stage, "remedies" among them, each with its flags; or those of
      "sample"; or those of each attack.

    Raises:
      UserError: config or target is refused, the compiler is not installed, or the
        file cannot be written.
    """
    check_choice("--program", program, PROGRAMS)
    target = targets.parse(target_name)
    configuration.check(config)
    targets.devices(target)
    console = console or Console()
    path = None if json_file is None else dry_run.place_of(json_file)
    found = {}
    if program == "sample":
        found["sample"] = _sample(config, target, console)
    elif program == "autoattack":
        found = _autoattack(config, target, console)
    else:
        for name in configuration.stages_to_run(config):
            found[name] = _stage(config, name, target, console)
    if path:
        with storage.writing(path):
            storage.write_json(path, found)
    return found


def _stage(
    config: ml_collections.ConfigDict, name: str, target: Target, console: Console
) -> dict[str, Any]:
    cost = dry_run.measure(config, name)
    made = _tried(config, name, target, cost, console, "")
    what = f"{name}, batch {made['batch_size']}"
    _show(console, config, what, made)
    made["remedies"] = []
    if not made["fits"]:
        for flags, changed, on in _changes(config, name, target, cost, made):
            again = _tried(changed, name, on, cost, console, flags)
            made["remedies"].append({"flags": flags, **again})
            verdict = "fits" if again["fits"] else "does not fit"
            say(console, f"  {flags}: {_memory_line(again)}, {verdict}")
            if again["fits"]:
                _show(console, changed, what, again)
                break
    _tell_verdict(console, name, made)
    return made


def _lowered_sampler(
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


def _sample(
    config: ml_collections.ConfigDict, target: Target, console: Console
) -> dict[str, Any]:
    """Compiles and tells what draws one chunk of samples on one device."""
    begin = time.monotonic()
    recipe = recipes.of_config(config.evaluate.samples)
    model, shape = models.build(config.model), tuple(config.data.image_shape)
    devices = targets.devices(target)
    with waiting(console, f"compiling samples for {target.name}"):
        lowered = _lowered_sampler(config, model, devices[0])
        weights = dry_run.num_bytes(models.variable_shapes(model, shape))
        compiled = _compiled(lowered, target, weights, 0, begin)
    made, dtype = _basics(config, target, compiled), config.model.dtype
    if compiled.program is not None:
        number = recipe.num_steps
        taken = times(compiled.program, target, _CLIMB, parts=1, dtype=dtype)
        one = f"step of {drawing.CHUNK} images"
        climb = {CONTRASTIVE: number}
        made |= {
            "time_is": _basis(target, dtype),
            "num_steps": number,
            "seconds": {one: taken.get(CONTRASTIVE, 0.0), "rest": taken["rest"]},
            "samples_per_second": len(devices) * drawing.CHUNK / whole(taken, climb),
            "collectives": communication(compiled.program, _CLIMB),
        }
    title = f"samples of {recipe.num_steps} steps, {drawing.CHUNK} at once"
    _show(console, config, title, made)
    if "samples_per_second" in made:
        rate = made["samples_per_second"]
        say(console, f"{rate:,.3g} samples a second on {len(devices)} devices.")
    _tell_verdict(console, "sampling", made, "give one with more memory")
    return made


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
    mesh = sharding.make_mesh(devices=targets.devices(target))
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


def _autoattack(
    config: ml_collections.ConfigDict, target: Target, console: Console
) -> dict[str, dict[str, Any]]:
    """Compiles and tells the attacks of AutoAttack, each on a batch."""
    threat = (config.evaluate.attack.norm, config.evaluate.attack.epsilon)
    plan = versions.plan("standard", threat, config.model.num_classes)
    for note in plan.notes:
        say(console, note)
    size, dtype = config.evaluate.batch_size, config.model.dtype
    network = prepared_shapes(config)
    weights = dry_run.num_bytes(network)
    found = {}
    for name in plan.attacks:
        begin = time.monotonic()
        with waiting(console, f"compiling {name} for {target.name}"):
            lowered = lower_attack(config, plan, name, network, target)
            compiled = _compiled(lowered, target, weights, 0, begin)
        made = _basics(config, target, compiled)
        if compiled.program is not None:
            rounds = [round_.attack for round_ in plan.rounds].count(name)
            seconds = compiled.program.total(estimate(compiled.program, target, dtype))
            made |= {
                "time_is": _basis(target, dtype),
                "rounds": rounds,
                "seconds": {f"round of {size} images": seconds},
                "images_per_second": size / (rounds * seconds),
                "collectives": communication(compiled.program, _CLIMB),
            }
        title = f"{name}, {plan.norm} {plan.epsilon:.4g}, batch {size}"
        _show(console, config, title, made)
        way = "give a smaller config.evaluate.batch_size or a larger target"
        _tell_verdict(console, name, made, way)
        found[name] = made
    if found and all("images_per_second" in made for made in found.values()):
        rate = 1 / sum(1 / made["images_per_second"] for made in found.values())
        say(
            console,
            f"{plan.title}: {rate:,.3g} images a second on {target.num_devices} "
            "devices if every image withstands all attacks; those that fall are "
            "spared the rest.",
        )
    return found


def _tried(
    config: ml_collections.ConfigDict,
    name: str,
    target: Target,
    cost: dry_run.Cost,
    console: Console,
    flags: str,
) -> dict[str, Any]:
    what = f"compiling {name} for {target.name}{' with ' if flags else ''}{flags}"
    with waiting(console, what):
        compiled = compile_step(config, name, target)
    flops = functools.partial(cost.step_flops, config[name].batch_size)
    return figures(config, name, target, compiled, flops)


def _changes(
    config: ml_collections.ConfigDict,
    name: str,
    target: Target,
    cost: dry_run.Cost,
    made: dict[str, Any],
) -> Iterator[tuple[str, ml_collections.ConfigDict, Target]]:
    """What could make a step fit, the least costly first: (flags, config, target).

    Parts whose share of the temporaries would not fit are passed over: a part of the
    batch leaves its share of them, or more.
    """
    memory, block = made["memory_bytes"], config[name]
    kept = memory["needed"] - memory["temporaries"]

    def changed(field: str, value: Any) -> ml_collections.ConfigDict:
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        return other

    field = f"{name}.num_micro_batches"
    splits = [
        parts
        for parts in dry_run.splits(
            block.batch_size, target.num_devices, cost.whole_batch
        )
        if parts > block.num_micro_batches
    ]
    share = lambda parts: memory["temporaries"] * block.num_micro_batches / parts
    for parts in splits:
        if kept + share(parts) <= memory["available"]:
            yield f"--config.{field}={parts}", changed(field, parts), target
    if not config.model.remat:
        yield "--config.model.remat=True", changed("model.remat", True), target
    if sharding.STATE_AXIS not in config.mesh and target.num_devices > 1:
        yield "--config.mesh=fsdp:-1", changed("mesh", "fsdp:-1"), target
    for _ in range(_MOST_DOUBLINGS):
        target = target.larger()
        try:
            devices = target.num_devices
        except UserError:  # the compiler knows none so large
            return
        if block.batch_size % (devices * block.num_micro_batches):
            return
        yield f"--target={target.name}", config, target


def _memory_line(made: dict[str, Any]) -> str:
    memory = made["memory_bytes"]
    needed, available = (memory[k] / GIB for k in ("needed", "available"))
    return f"{needed:.3g} of {available:.4g} GiB a device"


def _size(number: int) -> str:
    return (
        f"{number / GIB:.2f} GiB" if number > GIB / 10 else f"{number / 2**20:.2f} MiB"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _show(
    console: Console,
    config: ml_collections.ConfigDict,
    what: str,
    made: dict[str, Any],
) -> None:
    title = f"{dry_run.in_words(config)}, {what} on {made['target']}"
    table = Table(title=Text(title, style="table.title"), show_header=False)
    for kind, number in made["memory_bytes"].items():
        table.add_row(f"memory, a device: {kind}", _size(number))
    for place, kinds in made.get("collectives", {}).items():
        told = "; ".join(
            f"{entry['number']} {kind}, {_size(entry['bytes'])}"
            for kind, entry in kinds.items()
        )
        table.add_row(f"communication {place}", told or "none")
    for part, value in made.get("seconds", {}).items():
        table.add_row(f"time: {part}", _duration(value))
    for moment, at in made.get("step", {}).items():
        speed = f"{at['images_per_second']:,.0f} images/s"
        share = f"{at['share_of_peak']:.0%} of the peak"
        table.add_row(
            f"a step{dry_run.at(moment)}",
            f"{_duration(at['seconds'])}, {speed}, {share}",
        )
        if "hours_of_an_epoch" in at:
            told = f"{at['hours_of_an_epoch']:.2g} h an epoch, "
            told += f"{at['hours_of_the_budget']:.2g} h the stage"
            table.add_row(f"all steps{dry_run.at(moment)}", told)
    console.print(table)
    if "time_is" in made:
        say(console, f"compiled, not measured; time is {made['time_is']}.")


def _tell_verdict(
    console: Console, name: str, made: dict[str, Any], way: str = "nothing tried helps"
) -> None:
    """Whether it fits; if not, what would make it, or else what to do."""
    told = f"{name} {'fits' if made['fits'] else 'does not fit'} on {made['target']}: "
    told += _memory_line(made)
    if not made["fits"]:
        tried = made.get("remedies", ())
        fitting = [remedy["flags"] for remedy in tried if remedy["fits"]]
        told += f"; it does with {fitting[0]}" if fitting else f"; {way}"
    say(console, f"{told}.")

"""Compiles a config for a machine that is not here, and tells what its programs take.

Nothing is measured: memory and communication are those of the program that the machine
would be given, and the time is an estimate (`target_costs`).
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax import config as configuration
from atebm_jax import (
    data,
    drawing,
    dry_run,
    models,
    recipes,
    sharding,
    storage,
    target_costs,
    target_programs,
    targets,
)
from atebm_jax.autoattack import versions
from atebm_jax.dry_run import GIB
from atebm_jax.errors import UserError, check_choice
from atebm_jax.progress import say, waiting
from atebm_jax.stages import CONTRASTIVE, STAGES
from atebm_jax.target_programs import Compiled
from atebm_jax.targets import Target

# Images of an epoch where the data are not at hand.
_NUM_TRAIN = {
    "tfds:imagenet2012:train": 1_281_167,
    "tfds:cifar10:train": 50_000,
    "tfds:cifar100:train": 50_000,
}
# The scope of any climb as traced, which is a sampler's only one.
_CLIMB = {CONTRASTIVE: "climb"}
_MOST_DOUBLINGS = 4

#: What `run` can compile.
PROGRAMS = ("train", "sample", "autoattack")


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
    climbs = target_costs.climbs_of(config, name)
    seconds = target_costs.times(
        compiled.program, target, climbs, parts=parts, dtype=dtype
    )
    most = target.num_devices * target_costs.peak(target, dtype)
    return result | {
        "time_is": _basis(target, dtype),
        "seconds": seconds,
        "step": steps(config, name, seconds, step_flops, most),
        "collectives": target_costs.communication(compiled.program, climbs),
    }


def steps(
    config: ml_collections.ConfigDict,
    name: str,
    seconds: Mapping[str, float],
    step_flops: Callable[[int], float],
    most: float,
) -> dict[str, dict[str, float]]:
    """Whole steps at each of `dry_run.moments`, as numbers to print and to write.

    `seconds` are those of `target_costs.times`; `step_flops` as of `figures`; `most` is
    the peak of all devices, in FLOP/s.
    """
    block, images = config[name], num_images(config)
    turns = STAGES[name].turns(block)
    at: dict[str, dict[str, float]] = {}
    for moment, contrastive in dry_run.moments(name, turns).items():
        step = target_costs.whole(seconds, {**turns, CONTRASTIVE: contrastive})
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
    in_tf32 = target_costs.peak(target, dtype) != target.chip.flops
    at = ", at the peak of TF32" if in_tf32 else ""
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


def _sample(
    config: ml_collections.ConfigDict, target: Target, console: Console
) -> dict[str, Any]:
    """Compiles and tells what draws one chunk of samples on one device."""
    begin = time.monotonic()
    recipe = recipes.of_config(config.evaluate.samples)
    model, shape = models.build(config.model), tuple(config.data.image_shape)
    devices = targets.devices(target)
    with waiting(console, f"compiling samples for {target.name}"):
        lowered = target_programs.lower_sampler(config, model, devices[0])
        weights = dry_run.num_bytes(models.variable_shapes(model, shape))
        compiled = target_programs.compile_lowered(lowered, target, weights, 0, begin)
    made, dtype = _basics(config, target, compiled), config.model.dtype
    if compiled.program is not None:
        taken = target_costs.times(
            compiled.program, target, _CLIMB, parts=1, dtype=dtype
        )
        chunk = target_costs.whole(taken, {CONTRASTIVE: recipe.num_steps})
        one = f"step of {drawing.CHUNK} images"
        made |= {
            "time_is": _basis(target, dtype),
            "num_steps": recipe.num_steps,
            "seconds": {one: taken.get(CONTRASTIVE, 0.0), "rest": taken["rest"]},
            "samples_per_second": len(devices) * drawing.CHUNK / chunk,
            "collectives": target_costs.communication(compiled.program, _CLIMB),
        }
    title = f"samples of {recipe.num_steps} steps, {drawing.CHUNK} at once"
    _show(console, config, title, made)
    if "samples_per_second" in made:
        rate = dry_run.a_second(made["samples_per_second"])
        on = dry_run.devices_in_words(len(devices))
        say(console, f"{rate} samples a second on {on}.")
    _tell_verdict(console, "sampling", made, "give one with more memory")
    return made


def _autoattack(
    config: ml_collections.ConfigDict, target: Target, console: Console
) -> dict[str, dict[str, Any]]:
    """Compiles and tells the attacks of AutoAttack, each on a batch."""
    threat = (config.evaluate.attack.norm, config.evaluate.attack.epsilon)
    plan = versions.plan("standard", threat, config.model.num_classes)
    for note in plan.notes:
        say(console, note)
    size, dtype = config.evaluate.batch_size, config.model.dtype
    network = target_programs.prepared_shapes(config)
    weights = dry_run.num_bytes(network)
    found = {}
    for name in plan.attacks:
        begin = time.monotonic()
        with waiting(console, f"compiling {name} for {target.name}"):
            lowered = target_programs.lower_attack(config, plan, name, network, target)
            compiled = target_programs.compile_lowered(
                lowered, target, weights, 0, begin
            )
        made = _basics(config, target, compiled)
        if compiled.program is not None:
            rounds = [round_.attack for round_ in plan.rounds].count(name)
            seconds = compiled.program.total(
                target_costs.estimate(compiled.program, target, dtype)
            )
            made |= {
                "time_is": _basis(target, dtype),
                "rounds": rounds,
                "seconds": {f"round of {size} images": seconds},
                "images_per_second": size / (rounds * seconds),
                "collectives": target_costs.communication(compiled.program, _CLIMB),
            }
        title = f"{name}, {plan.norm} {plan.epsilon:.4g}, batch {size}"
        _show(console, config, title, made)
        way = "give a smaller config.evaluate.batch_size or a larger target"
        _tell_verdict(console, name, made, way)
        found[name] = made
    if found and all("images_per_second" in made for made in found.values()):
        rate = 1 / sum(1 / made["images_per_second"] for made in found.values())
        on = dry_run.devices_in_words(target.num_devices)
        say(
            console,
            f"{plan.title}: {dry_run.a_second(rate)} images a second on {on} if every "
            "image withstands all attacks; those that fall are spared the rest.",
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
        compiled = target_programs.compile_step(config, name, target)
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
        speed = f"{dry_run.a_second(at['images_per_second'])} images/s"
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

"""Memory, FLOPs and speed of a training step before anything is allocated or read.

Everything comes from tracing with shapes: FLOPs from XLA's count of each part without
its loops (which the count would take for one turn), activations from what
differentiation has to keep, at one and at two images. Both are exact about the
arithmetic and know nothing of the compiler's own buffers: hence the reserve. Compilers
keep less than differentiation does; `target_run` asks them.

Where the data can be opened, some images are looked at too: whether the seeds of a
curriculum can come near them.
"""

import dataclasses
import errno
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax import (
    archs,
    data,
    energy,
    models,
    reachability,
    seeds,
    sharding,
    stages,
    storage,
)
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.local_path import is_device, local, real
from atebm_jax.models import forms
from atebm_jax.progress import say
from atebm_jax.stages import CONTRASTIVE, Part
from atebm_jax.train import plan_stage

GIB = 2**30
# Share of a device's memory left for what is not counted: the compiler's workspace,
# fragmentation, the runtime itself.
RESERVE = 0.1
_MOST_DEVICES = 1024
# The part of every step that comes after those a method declares.
_LOSS = "loss gradient"


class Machine(NamedTuple):
    """What the step shall run on."""

    devices: int = 1  #: how many
    memory_gib: float = 80.0  #: of each, GiB
    peak_tflops: float = 989.0  #: of each, in the config's compute dtype
    utilisation: float = 0.4  #: share of the peak to expect, an assumption

    def check(self) -> None:
        """Refuses what no machine has by a `UserError` that names the flag."""
        for flag, value in self._asdict().items():
            flag = "device_memory_gib" if flag == "memory_gib" else flag
            if not 0 < value < math.inf:
                raise UserError(
                    f"--{flag} is {value:g}: it must be positive, and finite."
                )
        if self.utilisation > 1:
            raise UserError(
                f"--utilisation is {self.utilisation:g}: a share of the peak is at "
                "most 1."
            )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one stage's step takes."""

    parameters: int  #: numbers in the network
    #: parameters, averages and optimiser, on every device; with an fsdp axis its part
    #: of them
    state_bytes: int
    gradient_bytes: int  #: of one gradient of all parameters
    image_bytes: int  #: of one image of each stream, with what PGD makes of it, float32
    #: what the gradient of the loss keeps per image of each stream
    loss_bytes: int
    pgd_bytes: int  #: what an image gradient keeps per image
    flops: dict[str, float]  #: part -> FLOPs of one image (of each stream) and one turn
    #: part -> how often it runs in a step; T_max for contrastive steps
    turns: dict[str, int]
    #: the whole parameters that a step gathers; 0 without an fsdp axis
    gathered_bytes: int = 0
    #: whether a batch has to pass at once, for its statistics
    whole_batch: bool = False
    compiled_share: float = 1.0  #: of what gradients keep, in a compiled program

    def step_flops(
        self, batch_size: int, contrastive_steps: int | None = None
    ) -> float:
        """FLOPs of a whole step, at T_max or at another T."""
        turns = self.turns
        if contrastive_steps is not None:
            turns = turns | {CONTRASTIVE: contrastive_steps}
        return batch_size * sum(self.flops[part] * turns[part] for part in self.flops)

    def device_bytes(self, batch_size: int, devices: int, parts: int) -> int:
        """Bytes a device needs for its share of a batch that passes in `parts`."""
        share = math.ceil(batch_size / devices)
        part = math.ceil(share / parts)
        gradients = self.gradient_bytes * (1 if parts == 1 else 2)
        inputs = share * self.image_bytes
        kept = part * max(self.loss_bytes, self.pgd_bytes) * self.compiled_share
        return (
            self.state_bytes
            + self.gathered_bytes
            + gradients
            + inputs
            + math.ceil(kept)
        )


def measure(config: ml_collections.ConfigDict, name: str, fsdp: int = 1) -> Cost:
    """Traces the parts of a stage of a complete config with shapes.

    `fsdp` is the number of devices that share one state.

    Raises:
      UserError: the config describes no network or no step.
    """
    # XLA's forms are those of GPUs and TPUs, whose memory and FLOPs are wanted.
    with forms.only("xla"):
        return _measured(config, name, fsdp)


def _measured(config: ml_collections.ConfigDict, name: str, fsdp: int) -> Cost:
    model = models.build(config.model)
    # Its length needs the data; a warm-up must fit.
    plan = plan_stage(config, name, model, max(config[name].warmup_steps, 1))
    stage = plan.stage
    shape = tuple(config.data.image_shape)
    variables = models.variable_shapes(model, shape)
    state = jax.eval_shape(plan.new_state, variables)
    batch = batch_shapes(stage, shape, 1)
    parts = plan.method.parts(plan.block)
    params, stats = variables["params"], variables.get("batch_stats", {})
    gradient = num_bytes(params)

    def by_params(number: int) -> int:
        batch = batch_shapes(stage, shape, number)
        made = _made(stage, variables, batch)
        return _kept(lambda *of: stage.loss(*of)[0], params, stats, batch, made)

    def by_images(number: int) -> int:
        images = jax.ShapeDtypeStruct((number, *shape), jnp.float32)
        score = lambda x, v: energy.score(models.logits_fn(model, v)(x))
        return _kept(score, images, variables)

    return Cost(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        state_bytes=_bytes_of_a_part(state, fsdp),
        gradient_bytes=gradient,
        image_bytes=2
        * num_bytes({k: v for k, v in batch.items() if k.startswith("x_")}),
        # What two images need more than one.
        loss_bytes=by_params(2) - by_params(1),
        pgd_bytes=by_images(2) - by_images(1),
        flops=_flops(stage, model, variables, batch, parts),
        turns=plan.method.turns(plan.block) | {_LOSS: 1},
        gathered_bytes=0 if fsdp == 1 else gradient,
        whole_batch=plan.method.whole_batch(plan.block) and "batch_stats" in variables,
        compiled_share=_compiled_share(config.model),
    )


def _compiled_share(model: ml_collections.ConfigDict) -> float:
    # With rematerialisation only what stands between blocks is kept, and all of it.
    return 1.0 if model.remat else models.FAMILIES[model.name].compiled_share


def _bytes_of_a_part(tree: Any, count: int) -> int:
    """Bytes on one of `count` devices that share a state."""

    def part(leaf: Any) -> int:
        split = sharding.split_axis(tuple(leaf.shape), count) is not None
        return num_bytes(leaf) // (count if split else 1)

    return sum(map(part, jax.tree.leaves(tree)))


def moments(name: str, turns: Mapping[str, int]) -> dict[str, int]:
    """Contrastive steps to tell a whole step with, by name: the least T and the most.

    Of a method without T all steps are alike, "each".
    """
    most = turns.get(CONTRASTIVE, 0)
    if not stages.STAGES[name].curriculum:
        return {"each": most}
    return {f"T={steps}": steps for steps in (0, most)}


def at(moment: str) -> str:
    """The name of one of `moments` behind a noun: " at T=7", or nothing."""
    return "" if moment == "each" else f" at {moment}"


def batch_shapes(
    stage: stages.Stage,
    shape: tuple[int, ...],
    number: int,
    dtype: Any = jnp.float32,
    place: Any = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a stage: images [number, H, W, C] and labels of each stream.

    Training reads "cls" for every method. The shapes have a place, a sharding, unless
    they are only traced.
    """
    images = jax.ShapeDtypeStruct((number, *shape), dtype, sharding=place)
    labels = jax.ShapeDtypeStruct((number,), jnp.int32, sharding=place)
    streams = dict.fromkeys(("cls", *stage.streams))
    batch = {f"x_{stream}": images for stream in streams}
    return batch | {f"y_{stream}": labels for stream in streams if stream != "ood"}


def _made(stage: stages.Stage, variables: Any, batch: Any) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    number, *shape = batch["x_cls"].shape
    extra = jax.eval_shape(lambda key: stage.init(key, tuple(shape)), key)
    if stage.split_extra:
        extra = jax.tree.map(lambda x: x.update(shape=(number, *x.shape[1:])), extra)
    return jax.eval_shape(
        stage.adversaries, key if stage.needs_key else None, variables, extra, batch
    )


def _flops(
    stage: stages.Stage,
    model: nn.Module,
    variables: Any,
    batch: Any,
    parts: Mapping[str, Part],
) -> dict[str, float]:
    """FLOPs of each part and of the loss, for one image of each stream."""

    def of(function: Callable[..., Any], *arguments: Any) -> float:
        analysis = jax.jit(function).lower(*arguments).cost_analysis() or {}
        return float(analysis["flops"])

    def of_part(part: Part) -> float:
        def read(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return part.reads(models.logits_fn(model, variables)(x), y).sum()

        function = jax.grad(read, 1) if part.scope else read
        return of(function, variables, batch["x_cls"], batch["y_cls"])

    def loss(params: Any, stats: Any, batch: Any, made: Any) -> jax.Array:
        return stage.loss(params, stats, batch, made)[0]

    made = _made(stage, variables, batch)
    stats = variables.get("batch_stats", {})
    found = {name: of_part(part) for name, part in parts.items()}
    return found | {_LOSS: of(jax.grad(loss), variables["params"], stats, batch, made)}


def _kept(function: Callable[..., Any], by: Any, *rest: Any) -> int:
    """Bytes that differentiation by the first argument keeps."""

    def pullback(by: Any, *rest: Any) -> Any:
        return jax.vjp(lambda by: function(by, *rest), by)[1]

    return num_bytes(jax.eval_shape(pullback, by, *rest))


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def remedies(
    config: ml_collections.ConfigDict, name: str, cost: Cost, machine: Machine
) -> list[str]:
    """What would make a batch fit, the least first; empty if it fits or none does."""
    batch_size, parts = config[name].batch_size, config[name].num_micro_batches
    devices = machine.devices

    def fitting(cost: Cost, ways: list[tuple[int, int]], words: str) -> list[str]:
        """The first of (devices, parts) that fits, in words; empty if none does."""
        for way in ways:
            need = cost.device_bytes(batch_size, *way) / GIB
            if need <= machine.memory_gib * (1 - RESERVE):
                return [words.format(*way, f"{need:.1f} GiB")]
        return []

    if fitting(cost, [(devices, parts)], ""):
        return []
    found, fsdp = [], _fsdp(config, machine)
    candidates = {"": cost}
    if not config.model.remat:
        lighter = config.copy_and_resolve_references()
        lighter.model.remat = True
        candidates["--config.model.remat=True "] = measure(lighter, name, fsdp)
    numbers = splits(batch_size, devices, cost.whole_batch)
    ways = [(devices, number) for number in numbers]
    for flags, candidate in candidates.items():
        words = f"{flags}--config.{name}.num_micro_batches={{1}} ({{2}} a device)"
        found += fitting(candidate, ways, words)
    if fsdp == 1 and devices > 1:
        split = measure(config, name, devices)
        words = "--config.mesh=fsdp:-1 ({2} a device)"
        found += fitting(split, [(devices, parts)], words)
    more = range(devices + 1, _MOST_DEVICES + 1)
    ways = [(number, parts) for number in more if batch_size % number == 0]
    return found + fitting(cost, ways, "{0} devices ({2} each)")


def _fsdp(config: ml_collections.ConfigDict, machine: Machine) -> int:
    return sharding.parse_mesh(config.mesh, machine.devices).get(sharding.STATE_AXIS, 1)


def splits(batch_size: int, devices: int, whole_batch: bool) -> Iterator[int]:
    """Numbers of micro-batches that a batch allows on so many devices."""
    for parts in range(1, 2 if whole_batch else batch_size // devices + 1):
        if batch_size % (parts * devices) == 0:
            yield parts


def run(
    config: ml_collections.ConfigDict,
    machine: Machine,
    *,
    console: Console | None = None,
    json_file: str | None = None,
) -> dict[str, Any]:
    """Estimates every stage of a config, prints tables, and says what fits.

    Args:
      config, machine: a complete config, and what it shall run on.
      console: where to print; default the terminal.
      json_file: also write the figures there; `~` is the home.

    Returns:
      The figures, by stage.

    Raises:
      UserError: the config or the machine is refused, or the file cannot be written.
    """
    machine.check()
    configuration.check(config)
    for name in configuration.stages_to_run(config):
        if config[name].batch_size % machine.devices:
            raise UserError(
                f"config.{name}.batch_size is {config[name].batch_size}: it does not "
                f"split over --devices={machine.devices}."
            )
    path = None if json_file is None else place_of(json_file)
    figures = _estimate(config, machine, console or Console())
    if path:
        with storage.writing(path):
            storage.write_json(path, figures)
    return figures


def place_of(json_file: str) -> epath.Path:
    """Where the figures go; refused before the work where they could not.

    A device or a pipe (`/dev/stdout`) is written through.
    """
    path = real(local("--dry_run_json", json_file))
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not is_device(path):
            storage.probe(path)
    except OSError as error:
        raise UserError(
            f"--dry_run_json={json_file} cannot be written "
            f"({error.strerror or error}): give a file in a folder that exists."
        ) from error
    return path


def _estimate(
    config: ml_collections.ConfigDict, machine: Machine, console: Console
) -> dict[str, Any]:
    figures = {}
    for name in configuration.stages_to_run(config):
        cost = measure(config, name, _fsdp(config, machine))
        figures[name] = _figures(config, name, cost, machine)
        _show(console, config, name, figures[name])
        if stages.STAGES[name].curriculum:
            figures[name]["reachability"] = _reachability(config, name, console)
    return figures


def _reachability(
    config: ml_collections.ConfigDict, name: str, console: Console
) -> dict[str, Any] | None:
    """Whether seeds can come near the images; None where these cannot be opened."""
    drawn = config.data.seeds in seeds.DRAWN
    roles = ("train",) if drawn else ("train", "seeds")
    try:
        sources = {
            role: data.open_source(config.data[role], config.data.data_dir)
            for role in roles
        }
        found = reachability.of_config(config, sources, name)
    except UserError as error:
        say(console, f"reachability was not measured: {error}")
        return None
    for line in reachability.lines(found):
        say(console, line)
    return found._asdict()


def _figures(
    config: ml_collections.ConfigDict, name: str, cost: Cost, machine: Machine
) -> dict[str, Any]:
    stage = config[name]
    parts = stage.num_micro_batches
    need = cost.device_bytes(stage.batch_size, machine.devices, parts)
    speed = machine.devices * machine.peak_tflops * 1e12 * machine.utilisation
    seconds = {
        moment: cost.step_flops(stage.batch_size, steps) / speed
        for moment, steps in moments(name, cost.turns).items()
    }
    return {
        **dataclasses.asdict(cost),
        **machine._asdict(),
        "batch_size": stage.batch_size,
        "num_micro_batches": parts,
        "device_bytes": need,
        "fits": need <= machine.memory_gib * GIB * (1 - RESERVE),
        "remedies": remedies(config, name, cost, machine),
        "seconds_per_step": seconds,
        "images_per_second": {t: stage.batch_size / s for t, s in seconds.items()},
    }


def a_second(rate: float) -> str:
    """A rate with three digits or more: "23,104", "0.412"."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def devices_in_words(number: int) -> str:
    """How many devices: "1 device", "8 devices"."""
    return f"{number} device{'s' * (number != 1)}"


def in_words(config: ml_collections.ConfigDict) -> str:
    """Network, image size and compute dtype of a config, for titles."""
    size = "x".join(map(str, config.data.image_shape[:2]))
    return f"{archs.describe(config.model)} at {size}, {config.model.dtype}"


def _show(
    console: Console,
    config: ml_collections.ConfigDict,
    name: str,
    figures: dict[str, Any],
) -> None:
    on = devices_in_words(figures["devices"])
    title = f"{in_words(config)}, {name}, batch {figures['batch_size']} on {on}"
    table = Table(title=Text(title, style="table.title"), show_header=False)
    image_mib = max(figures["loss_bytes"], figures["pgd_bytes"]) / 2**20
    table.add_row("parameters", f"{figures['parameters']:,}")
    state = figures["state_bytes"] / GIB
    passing = (figures["gradient_bytes"] + figures["gathered_bytes"]) / GIB
    where = Text(f"state, a device (mesh {config.mesh})")
    table.add_row(where, f"{state:.2f} GiB")
    table.add_row("gradient and gathered parameters, a device", f"{passing:.2f} GiB")
    share = f"{figures['compiled_share']:.0%} of it in a compiled program (calibrated)"
    table.add_row(
        "kept by gradients, an image of each stream", f"{image_mib:.0f} MiB, {share}"
    )
    for part, flops in figures["flops"].items():
        turns = figures["turns"][part]
        table.add_row(f"{part}, an image", f"{flops / 1e9:.1f} GFLOP x {turns}")
    share = f"{figures['utilisation']:.0%} of the peak (assumed)"
    for moment, seconds in figures["seconds_per_step"].items():
        rate = figures["images_per_second"][moment]
        table.add_row(
            f"a step{at(moment)}, at {share}",
            f"{seconds:.3g} s, {a_second(rate)} images/s",
        )
    table.add_row(
        "memory, a device, estimated (--target asks the compiler)",
        f"{figures['device_bytes'] / GIB:.1f} GiB",
    )
    console.print(table)
    usable = figures["memory_gib"] * (1 - RESERVE)
    fits, remedy = "fits", ""
    if not figures["fits"]:
        fits = "does not fit"
        remedy = " No split, rematerialisation or number of devices would help."
        if figures["remedies"]:
            remedy = f" It would with {'; or '.join(figures['remedies'])}."
    room = f"{usable:.0f} of {figures['memory_gib']:g} GiB"
    say(console, f"{name} {fits} into {room}.{remedy}")

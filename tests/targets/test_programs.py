"""What the compilers of a TPU and of a GPU make of steps, a sampler and an attack.

Small networks, compiled for machines that are not here. Each check is a function from a
program to what is wrong with it; one program in which everything is wrong shows that
each of them sees it.
"""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import reference
import tiny

from atebm_jax import (
    drawing,
    energy,
    hlo,
    models,
    sharding,
    target_programs,
    targets,
)
from atebm_jax.autoattack import versions
from atebm_jax.models import xcit

# Images a device, of a step and of a chunk of samples: no weight has as many rows.
PER_DEVICE, NUM_CLASSES = 6, 10
IMAGES = (PER_DEVICE, drawing.CHUNK)
SMALLEST_KERNEL = 3 * 3 * 1 * 64
SHAPE = (16, 16, 1)
PROGRAMS = ("stage1", "stage2", "stage2 under fsdp", "sampler", "attack")
ATTACK_STEPS = 3
RESULT = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
# Where numbers are written, not what they are.
PLACING = {"get-tuple-element", "bitcast", "copy", "copy-start", "copy-done"}


@pytest.fixture(scope="module", params=["v5e:2x4", "h100:8"])
def target(request):
    return reference.target(request.param)


@pytest.fixture(scope="module", params=PROGRAMS)
def made(request, target):
    """A program, and how many bytes of it are state."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return program_of(request.param, target)


def settings(mesh="data:-1", **overrides):
    fields = {"model.dtype": "bfloat16", "model.widen_factor": 8, "mesh": mesh}
    fields |= {"data.image_shape": SHAPE}
    sizes = {f"{s}.batch_size": 8 * PER_DEVICE for s in ("stage1", "stage2")}
    return tiny.config(**fields, **sizes, **overrides)


def program_of(name, target):
    if name == "sampler":
        return SimpleNamespace(program=sampler(target))
    if name == "attack":
        return SimpleNamespace(program=attack(target))
    config = settings("data:-1,fsdp:4" if "fsdp" in name else "data:-1")
    lowered, state, _ = target_programs.lower_step(config, name.split()[0], target)
    compiled = reference.compiled(lowered)
    return SimpleNamespace(
        program=reference.Program(compiled.as_text()),
        memory=compiled.memory_analysis(),
        state=state,
    )


def sampler(target):
    config = settings()
    model = models.build(config.model)
    device = targets.devices(target)[0]
    lowered = target_programs.lower_sampler(config, model, device)
    return reference.Program(reference.compiled(lowered).as_text())


def attack(target):
    config = settings(**{"evaluate.batch_size": 8 * PER_DEVICE})
    steps = {"num_steps": ATTACK_STEPS}
    plan = versions.plan("standard", ("l2", 0.5), NUM_CLASSES, settings=steps)
    network = target_programs.prepared_shapes(config)
    lowered = target_programs.lower_attack(config, plan, "apgd-t", network, target)
    return reference.Program(reference.compiled(lowered).as_text())


def network_loops(program):
    """The innermost loops that read a network."""
    return [
        loop
        for loop in program.all_loops()
        if products(program.reachable(loop.body)) and not program.loops(loop.body)
    ]


def products(lines):
    """(dtypes, sizes) of operands and results of convolutions and products."""
    types, found = {}, []
    for line in lines:
        match = RESULT.match(line)
        if match:
            types[match[1]] = match[2]
            if match[3] in ("convolution", "dot") or "cudnn$conv" in line:
                found.append((match[2], re.findall(r"%([\w.\-]+)", match[4])[:2]))
    return [
        " ".join([made, *(types.get(name, "") for name in of)]) for made, of in found
    ]


def talking_loops(program):
    """Communication inside of loops."""
    bodies = (program.reachable(loop.body) for loop in program.all_loops())
    return [c for body in bodies for c in hlo.collectives(body)]


def wide_products(program):
    """Products of the loops that are not in bfloat16, but for the last layer's."""
    bodies = (program.reachable(loop.body) for loop in network_loops(program))
    last = re.compile(rf"[\[,]{NUM_CLASSES}[\],]")
    return [
        product
        for body in bodies
        for product in products(body)
        if "f32[" in product and not last.search(product)
    ]


def doubles(program):
    return [
        line for line in program.everything() if re.search(r"\b[fc](64|128)\[", line)
    ]


def host_transfers(program):
    words = (" send(", " recv(", " infeed(", " outfeed(", "callback", "S(5)")
    return [line for line in program.everything() if any(w in line for w in words)]


def fixed_loops(program):
    """Loops over a network that run as often as the program says."""
    found = []
    for loop in network_loops(program):
        (line,) = (x for x in program.everything() if f"body=%{loop.body}" in x)
        condition = re.search(r"condition=%([\w.\-]+)", line)[1]
        if any(" constant(" in x for x in program.reachable(condition)):
            found.append(loop)
    return found


def sums_of_gradients(program):
    """Sums over devices outside of loops that carry a kernel."""
    found = hlo.collectives(program.outside_loops())
    kinds = ("all-reduce", "reduce-scatter")
    return [c for c in found if c.kind in kinds and c.elements >= SMALLEST_KERNEL]


def waits_for_kernels(program):
    """All-reduces of kernels during which a GPU computes nothing."""
    sums = (c for c in program.waits if c.kind == "all-reduce")
    return [c for c in sums if c.elements >= SMALLEST_KERNEL]


def work_on_weights(program):
    """What the loops compute of arrays that stay, none of them as long as the batch."""
    return [
        line
        for loop in network_loops(program)
        for line in _of_staying(program.lines(loop.body))
    ]


def _of_staying(lines):
    found = [match for line in lines if (match := RESULT.match(line))]
    names = {m[1]: re.findall(r"%([\w.\-]+)", m[4]) for m in found}
    (root,) = (m for m in found if m[3] == "tuple" and m[0].lstrip().startswith("ROOT"))
    inputs = {
        m[1]: int(re.search(r"index=(\d+)", m[4])[1])
        for m in found
        if m[3] == "get-tuple-element" and "param" in names[m[1]][0]
    }
    carried = names[root[1]]
    alone, work = set(), []
    for match in found:
        name, made, kind, _ = match.groups()
        if name in inputs:
            array = re.match(r"\w+\[(\d+)[,\]]", made)
            stays = inputs.get(carried[inputs[name]]) == inputs[name]
            if stays and array and int(array[1]) not in IMAGES:
                alone.add(name)
        elif names[name] and all(n in alone for n in names[name] if n in names):
            operands = [n for n in names[name] if n in names]
            if operands and kind not in PLACING:
                work.append(match[0])
            if operands:
                alone.add(name)
    return work


CHECKS = {
    "communication in a loop": talking_loops,
    "products of the loops in float32": wide_products,
    "float64": doubles,
    "transfers to the host": host_transfers,
    "work on weights alone in a loop": work_on_weights,
}


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_in_the_program_that_does_not_belong_there(made, check):
    assert network_loops(made.program)
    assert CHECKS[check](made.program) == []


def test_all_numbers_of_contrastive_steps_are_one_program(made):
    """The steps of the classifier's adversary and of AutoAttack are settled."""
    fixed = {loop.body for loop in fixed_loops(made.program)}
    for loop in network_loops(made.program):
        settled = "adversary" in loop.scope or "jit(attack)" in loop.scope
        assert (loop.body in fixed) == settled, loop


def test_curricula_are_numbers_in_one_program(target):
    texts = {
        re.sub(r"dense<[-+.\de]+> : tensor<[if]32>", "number", lowered.as_text())
        for t_max, threshold in ((3, 0.7), (50, 0.8))
        for lowered, *_ in [
            target_programs.lower_step(
                settings(**{"stage2.t_max": t_max, "stage2.auc_threshold": threshold}),
                "stage2",
                target,
            )
        ]
    }
    assert len(texts) == 1


def test_turns_of_a_settled_loop_are_read(target):
    (loop,) = network_loops(attack(target))
    assert loop.turns == ATTACK_STEPS


def test_gradients_are_summed_once(made):
    if not hasattr(made, "state"):
        assert hlo.collectives(made.program.everything()) == []
        return
    # Those of kernels are in bfloat16, the others in float32; with fsdp each is summed
    # over both axes of the mesh.
    axes = len(jax.tree.leaves(made.state)[0].sharding.mesh.axis_names)
    assert 1 <= len(sums_of_gradients(made.program)) <= 2 * axes


def test_gpu_computes_during_all_reduces_of_kernels(target, made):
    """Under fsdp a sum over all devices has two parts: the second awaits the first."""
    if not target.is_gpu:
        pytest.skip("a TPU's compiler makes no all-reduce asynchronous by itself")
    assert waits_for_kernels(made.program) == []


def test_state_takes_no_memory_of_its_own(made):
    if not hasattr(made, "state"):
        return
    leaves = jax.tree.leaves(made.state)
    assert made.program.num_aliases == len(leaves)
    kept = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
    )
    # A TPU pads small arrays.
    assert kept <= made.memory.alias_size_in_bytes <= made.memory.output_size_in_bytes


def test_a_class_token_among_patches_is_compiled(target):
    """A GPU's compiler fails where they are concatenated between a sum and a norm."""
    if not target.is_gpu:
        pytest.skip("a TPU's compiler makes no difference")
    sizes = {"size": "tiny", "depth": 1, "patch": 4}
    model = xcit.XCiT(num_classes=NUM_CLASSES, **sizes)
    shape = (32, 32, 3)
    weights = models.variable_shapes(model, shape)
    images = jax.ShapeDtypeStruct((PER_DEVICE, *shape), jnp.float32)

    def gradients(weights, images):
        return jax.grad(lambda x: energy.score(model.apply(weights, x)).sum())(images)

    place = jax.sharding.SingleDeviceSharding(targets.devices(target)[0])
    placed = sharding.shapes_at((weights, images), place)
    reference.compiled(jax.jit(gradients).lower(*placed))


def everything_wrong(target):
    """A program with all the deliberate mistakes."""
    mesh = sharding.make_mesh(devices=targets.devices(target))
    network = reference.TwoLayers(channels=64)
    # Of images smaller than a window, compilers transpose the kernel in every turn.
    shape = (2, 2, 1)
    everywhere, split = sharding.replicated(mesh), sharding.batched(mesh)
    weights = sharding.shapes_at(models.variable_shapes(network, shape), everywhere)
    images = jax.ShapeDtypeStruct((8 * PER_DEVICE, *shape), jnp.float32, sharding=split)

    def wrong(weights, images):
        def turn(_, x):
            # Statistics of the batch, and weights that are worked on in every turn.
            def score(x):
                logits, _ = network.apply(
                    weights, x, train=True, mutable=["batch_stats"]
                )
                return energy.score(logits).sum()

            return x + jax.grad(score)(x)

        x = jax.lax.fori_loop(0, 3, turn, images)
        for _ in range(3):
            gradients = jax.grad(lambda w: network.apply(w, x).sum())(weights)
            weights = jax.tree.map(jnp.add, weights, gradients)
        shown = jax.device_put(x, jax.memory.Space.Host)
        return x.astype(jnp.float64).sum(), shown, weights

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(wrong).lower(weights, images)
    return reference.Program(reference.compiled(lowered).as_text())


def test_everything_that_does_not_belong_there_would_be_seen(target):
    program = everything_wrong(target)
    seen = {name for name, check in CHECKS.items() if check(program)}
    assert seen == set(CHECKS)
    assert fixed_loops(program) == network_loops(program) != []
    assert len(sums_of_gradients(program)) > 2 and program.num_aliases == 0
    assert bool(waits_for_kernels(program)) == target.is_gpu

"""What is computed in bfloat16 and what in no loop: read off the traced update."""

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from jax.extend.core import Literal, jaxprs_in_params

from atebm_jax import (
    api,
    config,
    constraints,
    drawing,
    editing,
    models,
    recipes,
    sharding,
    train,
)
from atebm_jax.autoattack import programs
from atebm_jax.evaluate import classification
from atebm_jax.evaluate.context import Context
from atebm_jax.models import forms

BATCH_SIZE = 8

NETWORKS = {
    "wide_resnet": ({"depth": 10, "widen_factor": 1}, (8, 8, 3)),
    "mean_sparse_wide_resnet": ({"depth": 10, "widen_factor": 1}, (8, 8, 3)),
    "resnet": ({"depth": 18}, (8, 8, 3)),
    "convnext": ({"size": "tiny", "stem": "conv"}, (32, 32, 3)),
    "vit": ({"size": "small", "position_grid": 2, "stem": "conv"}, (32, 32, 3)),
    "xcit": ({"size": "small", "depth": 1, "patch": 4}, (32, 32, 3)),
    "swin": ({"size": "tiny", "window": 2, "position_grid": 8}, (32, 32, 3)),
}

# Normalisation, cross-entropy, logsumexp, softplus and norms of images.
IN_FLOAT32 = {"rsqrt", "sqrt", "exp", "log", "log1p", "cumsum", "sort"}
PRODUCTS = {"conv_general_dilated", "dot_general"}


def equations(jaxpr) -> Iterator:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


# Where numbers are written, not what they are; kernels are flipped within products.
PLACING = {"reshape", "broadcast_in_dim", "squeeze", "transpose", "rev", "slice"}


def weight_work(jaxpr, weights) -> tuple[list, list]:
    """What a program computes of weights alone: primitives, and flags of its results.

    Args:
      jaxpr: the program.
      weights: a flag for each of its inputs, whether it depends on weights alone.
    """
    known, work = dict(zip(jaxpr.invars, weights, strict=True)), []
    for equation in jaxpr.eqns:
        inputs = [v for v in equation.invars if not isinstance(v, Literal)]
        alone = bool(inputs) and all(known.get(v, False) for v in inputs)
        results = [alone] * len(equation.outvars)
        inner = list(jaxprs_in_params(equation.params))
        if len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
            flags = [
                not isinstance(v, Literal) and known.get(v, False)
                for v in equation.invars
            ]
            found, results = weight_work(inner[0], flags)
            work += found
        elif alone and equation.primitive.name not in PLACING:
            work.append(equation.primitive.name)
        known |= dict(zip(equation.outvars, results, strict=True))
    return work, [known.get(v, False) for v in jaxpr.outvars]


def floats(variables) -> list:
    """Dtypes of the floating-point ones among some variables."""
    kinds = [getattr(v.aval, "dtype", None) for v in variables]
    return [
        kind
        for kind in kinds
        if kind is not None and jnp.issubdtype(kind, jnp.floating)
    ]


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request):
    """(state, state afterwards, metrics, program) of stage 2 in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        reference.shallow(patch)
        return trace_of(request.param)


def trace_of(name, **changes):
    fields, shape = NETWORKS[name]
    settings = tiny.config(
        **{"data.image_shape": shape, "stage2.weight_r1": 0.1}, **changes
    )
    settings.model.update(name=name, dtype="bfloat16", **fields)
    model = models.build(settings.model)
    total = config.num_steps(settings.stage2, 100)
    plan = train.plan_stage(settings, "stage2", model, total)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    state = jax.eval_shape(plan.new_state, variables)
    labels = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32)
    pixels = jax.ShapeDtypeStruct((BATCH_SIZE, *shape), jnp.uint8)
    batch = {"x_gen": pixels, "x_cls": pixels, "x_ood": pixels}
    batch |= {"y_gen": labels, "y_cls": labels}
    trace = jax.make_jaxpr(plan.step, return_shape=True)
    # Flax and JAX themselves mix dtypes and ranks here. The form is accelerators'.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        forms.only("xla"),
    ):
        program, (after, metrics) = trace(state, batch)
    return state, after, metrics, program.jaxpr


def inner_loops(program) -> list:
    """The loops that differentiate a network: bodies with matrix products."""
    loops = [e for e in equations(program) if e.primitive.name == "while"]
    return [
        loop
        for loop in loops
        if any(
            e.primitive.name in PRODUCTS
            for e in equations(loop.params["body_jaxpr"].jaxpr)
        )
    ]


def test_state_and_metrics_are_float32(traced):
    state, after, metrics, _ = traced
    for tree in (state, after, metrics):
        kinds = {x.dtype for x in jax.tree.leaves(tree)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_images_of_the_inner_loops_are_accumulated_in_float32(traced):
    loops = inner_loops(traced[3])
    assert len(loops) == 2  # contrastive images and the classifier's adversary
    for loop in loops:
        carried = loop.outvars
        assert set(floats(carried)) == {jnp.dtype("float32")}
        assert any(v.aval.shape[:1] == (BATCH_SIZE,) for v in carried)


def test_products_of_the_inner_loops_are_of_bfloat16(traced):
    """All but the last layer, whose logits are float32 by design.

    And but attention's: JAX keeps its scores, and so their gradients, in float32.
    """
    for loop in inner_loops(traced[3]):
        found = [
            floats(e.invars)
            for e in equations(loop.params["body_jaxpr"].jaxpr)
            if e.primitive.name in PRODUCTS and not is_attention(e)
        ]
        fine = [kinds for kinds in found if kinds[0] != jnp.bfloat16]
        assert all(kinds[0] == kinds[1] for kinds in found)
        # Forward and image gradient of that layer.
        assert len(fine) <= 2 < len(found)


def is_attention(equation) -> bool:
    """A product for each image and head: of two activations, not with a parameter."""
    if equation.primitive.name != "dot_general":
        return False
    _, (each_left, _) = equation.params["dimension_numbers"]
    return len(each_left) > 0


def test_norms_and_losses_are_float32(traced):
    for equation in equations(traced[3]):
        if equation.primitive.name in IN_FLOAT32:
            kinds = set(floats(equation.invars))
            assert kinds <= {jnp.dtype("float32")}, equation


def weight_work_of_turns(program) -> list[str]:
    """What the inner loops compute of weights alone, in every turn again.

    Whatever is constant in a loop and neither a number nor of a batch is weights.
    """
    work = []
    for loop in inner_loops(program):
        body, before = loop.params["body_jaxpr"], loop.params["cond_nconsts"]
        constants = loop.invars[before : before + loop.params["body_nconsts"]]
        flags = [v.aval.ndim > 0 and v.aval.shape[0] != BATCH_SIZE for v in constants]
        flags += [False] * (len(body.jaxpr.invars) - len(flags))
        work += weight_work(body.jaxpr, flags)[0]
    return work


def test_what_depends_on_the_weights_alone_is_computed_before_the_loops(traced):
    assert weight_work_of_turns(traced[3]) == []


SHAPE = (8, 8, 3)
READERS = ("sampler", "edit", "attack", "autoattack", "evaluation")


def reader(name, model, variables):
    """A compiled function that reads a network in a loop, and its arguments."""
    images = jax.ShapeDtypeStruct((BATCH_SIZE, *SHAPE), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32)
    one, steps = jnp.float32(1), jnp.int32(3)
    settings = tiny.config().evaluate.attack
    if name == "sampler":
        program = drawing.chunk_program(model, recipes.Recipe(), None)
        traced = (np.uint32(0), one, steps[None], None)
        return program, ((variables, None), traced, labels, labels, images)
    if name == "edit":
        program = editing._program(model, "pgd", "constant", 4)
        ball = constraints.ball(np.zeros(images.shape, np.float32))
        rows = editing.Rows(ball, labels, jnp.ones(BATCH_SIZE))
        return program, (variables, np.uint32(0), steps, rows)
    if name == "attack":
        traced = ("epsilon", "step_size", "num_steps")
        fixed = {k: v for k, v in settings.items() if k not in traced}
        numbers = dict(zip(traced, (one, one, steps)))
        return api._attacker(model, **fixed), (numbers, variables, images, labels)
    if name == "autoattack":
        network = jax.eval_shape(lambda v: models.freeze(model, v, SHAPE), variables)
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = programs.Batch(images, labels, labels, one, steps, key)
        attack = programs.Program(False, "apgd-ce", "l2")
        return lambda *rest: programs.attack(attack, *rest), (network, batch)
    mesh = sharding.make_mesh()
    context = SimpleNamespace(model=model, image_shape=SHAPE, mesh=mesh)
    program = Context.compiled(context, classification.under_attack(settings))
    batch = {"images": images, "labels": labels, "mask": labels}
    return program, (variables, batch)


@pytest.mark.parametrize("name", READERS)
def test_whoever_reads_a_network_in_a_loop_makes_it_ready_before(name):
    model = reference.network(dtype=jnp.bfloat16)
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        forms.only("xla"),
    ):
        variables = models.variable_shapes(model, SHAPE)
        program, arguments = reader(name, model, variables)
        found = jax.make_jaxpr(program)(*arguments).jaxpr
    assert inner_loops(found)
    assert weight_work_of_turns(found) == []


def test_network_that_is_not_made_ready_would_be_seen(monkeypatch):
    """The deliberate mistake: conversions, and a scale and a shift for each norm."""
    unready = lambda model, variables, shape: models.logits_fn(model, variables)
    monkeypatch.setattr(models, "freeze", unready)
    # Of another seed, as tests share the programs of a config.
    work = weight_work_of_turns(trace_of("wide_resnet", seed=1)[3])
    assert {"convert_element_type", "rsqrt", "mul", "sub"} <= set(work)

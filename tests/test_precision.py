"""What is computed in bfloat16, and what never is: read off the traced update."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
import reference
import tiny
from jax.extend.core import jaxprs_in_params

from atebm_jax import config, models, train

BATCH_SIZE = 8

NETWORKS = {
    "wide_resnet": ({"depth": 10, "widen_factor": 1}, (8, 8, 3)),
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


def trace_of(name):
    fields, shape = NETWORKS[name]
    settings = tiny.config(**{"data.image_shape": shape, "stage2.weight_r1": 0.1})
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
    # Flax and JAX themselves mix dtypes and ranks here.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
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

"""Any config either runs a step or is refused by the name of a field."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from budget import budget
from hypothesis import event, given
from hypothesis import strategies as st

from atebm_jax import UserError, ascent, config, data, job, models, sharding, train
from atebm_jax.models import resnet
from atebm_jax.stages import STAGES, joint

_IMAGES = 40


class Accepted(Exception):
    """A job has refused nothing and is about to write."""


_INTS = (-(2**63), -(2**31), -17, -1, 0, 1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 24, 32)
_INTS += (34, 64, 128, 1000, 2**31 - 1, 2**31, 2**40, 2**63)
_FLOATS = (math.nan, math.inf, -math.inf, -1e39, -1.0, -0.1, 0.0, 1e-50, 1e-8, 0.1)
_FLOATS += (0.5, 0.75, 0.999, 1.0, 1.5, 2.0, 8.0, 1e8, 1e38, 1e39, 1e300)
_JUNK = ("", " ", "auto", "none", "\x00", "é", "8", "-1", "|", ",", ":", "a" * 300)
_NUMBERS = st.sampled_from((*_INTS[2:-3], *_FLOATS))
_TUPLES = st.one_of(
    st.lists(_NUMBERS, max_size=4).map(tuple),
    st.tuples(*[st.integers(-1, 33)] * 3),
    st.sampled_from((("a",), (None,), ((1,), 2), (8, 8, 1.0), (True, 8, 1))),
)

# What a field understands, so that more than its refusal is seen.
_WORDS: dict[str, tuple[str, ...]] = {
    "name": (*sorted(models.BUILT_IN), "wide-resnet"),
    "size": ("tiny", "small", "base", "medium", "large"),
    "stem": ("patch", "conv"),
    "blocks": ("1-1-1", "1-2-1", "1-0-1", "1-1"),
    "widths": ("4-4-8-8", "8-4-4-4", "1-1-1", "0-1-1-1"),
    "shortcut": ("active", "raw"),
    "activation": ("relu", "swish", "gelu"),
    "dtype": (*models.DTYPES, "float16", "float64", "int8"),
    "norm": ("l2", "linf", "unbounded", "L2"),
    "optimizer": ("sgd", "adamw", "adam", "lion"),
    "schedule": ("constant", "cosine", "step"),
    "stages": ("auto", *STAGES, "stage1,stage2", "stage2,stage1", "jem,ratio"),
    "on_dying": (*config.ON_DYING, "die"),
    "normalization": (*joint.CHOICES["normalization"], "group"),
    "contrastive_objective": (*joint.CHOICES["contrastive_objective"], "joint"),
    "judge": ("svc", "mlp"),
    "sampler": (*ascent.RULES, "sgld(noise=0.1)", "sgld(nois=1)"),
    "mesh": ("data:-1", "data:-1,fsdp:2", "fsdp:-1", "data:3", "fsdp:0", "data:99"),
    "init_from": ("nowhere", "random", "/", "~", "gs://nowhere/x", "file://x"),
    "data_dir": ("nowhere", "/dev/null"),
}
_SPECS = ("noise", "digits:train", "digits:test", "digits:", "tfds:cifar10:train")
_SPECS += ("tfds:x", "folder:", "folder:/dev/null", "folder:nowhere", "prepared:x")
_WORDS |= dict.fromkeys(("train", "eval", "test", "seeds"), _SPECS)

_CALLS = [f"{name}({n})" for name in data.augment.OPS for n in ("", 0, 1, 8, 33)]
_CALLS += [*data.augment.OPS, "resize(8,bicubic)", "flip(1)", "pad_crop(99999999)"]
_CALLS += ["resize(99999999)", "center_crop(-1)", "cutout(2**3)", "resize(8))"]
_PIPELINES = st.lists(st.sampled_from(_CALLS), max_size=3).map("|".join)


def values(field: str, default: Any) -> st.SearchStrategy:
    """Values of a field's type, sensible and not."""
    leaf = field.rpartition(".")[2]
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.one_of(st.integers(1, 40), st.sampled_from(_INTS))
    if isinstance(default, float):
        return st.one_of(st.floats(0.01, 0.99), st.sampled_from(_FLOATS))
    if isinstance(default, tuple):
        return _TUPLES
    if leaf.startswith(("augment", "preprocess")):
        return st.one_of(_PIPELINES, st.sampled_from(_JUNK))
    words = _WORDS[leaf]
    return st.one_of(st.sampled_from(words), st.sampled_from((*words, *_JUNK)))


_FIELDS = dict(config.flatten(tiny.config()))


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Every kind of layer, few of each."""
    with pytest.MonkeyPatch.context() as patch:
        reference.shallow(patch)
        patch.setitem(resnet.STAGES, 50, (1, 1, 1, 1))
        yield


@st.composite
def overrides(draw: Any, most: int = 4) -> dict[str, Any]:
    """A network for images of any size, and some fields at random."""
    chosen = dict(draw(st.sampled_from(tiny.NETWORKS)))
    side = st.one_of(st.sampled_from((1, 8, 16, 32)), st.integers(1, 33))
    shape = draw(st.tuples(side, side, st.sampled_from((1, 3))))
    chosen["data.image_shape"] = shape
    chosen["model.num_classes"] = draw(st.sampled_from((1, 2, 10, 1000)))
    # Shifts of one pixel in the config that everything starts from.
    chosen["data.augment_cls"] = ""
    for field in draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=most)):
        chosen[field] = draw(values(field, _FIELDS[field]))
    return chosen


def sources_for(chosen: dict[str, Any]) -> dict[str, data.Source]:
    """Images in memory, of the shape that was drawn first, unless a source was."""
    height, width, channels = (*chosen["data.image_shape"], 0, 0, 0)[:3]
    good = all(type(n) is int and 0 < n < 50 for n in (height, width))
    if not good or type(channels) is not int or channels not in (1, 3):
        height, width, channels = 8, 8, 1
    classes = chosen["model.num_classes"]
    images = np.zeros((_IMAGES, height, width, channels), np.uint8)
    labels = np.arange(_IMAGES) % classes if 0 < classes < 2**20 else [0] * _IMAGES
    source = data.ArraySource(images, labels, num_classes=max(classes, 1))
    roles = ("train", "eval", "test")
    return {role: source for role in roles if f"data.{role}" not in chosen}


def accept(settings: Any, sources: Any, workdir: Any) -> None:
    """Everything that a job checks before it writes, nothing else."""
    with pytest.MonkeyPatch.context() as patch:

        def claim(*arguments: Any) -> None:
            raise Accepted

        patch.setattr(job, "_claim", claim)
        with pytest.raises(Accepted):
            job.run(settings, workdir, sources=sources)


def plans(settings: Any, num_train: int, mesh: Any) -> dict[str, train.Plan]:
    """Of each stage to run."""
    model = models.build(settings.model)
    totals = {
        name: config.num_steps(settings[name], num_train)
        for name in config.stages_to_run(settings)
    }
    return {
        name: train.plan_stage(settings, name, model, total, mesh)
        for name, total in totals.items()
    }


def batch_of(settings: Any, name: str) -> dict[str, Any]:
    """Shapes of a stage's batch with seeds from the step itself."""
    size, shape = settings[name].batch_size, tuple(settings.data.image_shape)
    batch = {}
    for stream in (s for s in STAGES[name].streams if s != "ood"):
        batch[f"x_{stream}"] = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
        batch[f"y_{stream}"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    return batch


def refusal(chosen: dict[str, Any], settings: Any, workdir: Any) -> str | None:
    """Why a config is refused, or None; any other error goes through."""
    try:
        accept(settings, sources_for(chosen), workdir)
    except UserError as error:
        return str(error)
    return None


def configured(chosen: dict[str, Any]) -> Any:
    """The config with the values that were drawn, if its types allow them."""
    settings = tiny.config()
    for field, value in chosen.items():
        group, _, leaf = field.rpartition(".")
        block = operator.attrgetter(group)(settings) if group else settings
        with block.ignore_type():
            block[leaf] = value
    return settings


@budget(15)
@given(overrides())
def test_config_is_traced_or_refused_by_the_name_of_a_field(tmp_path_factory, chosen):
    settings = configured(chosen)
    message = refusal(chosen, settings, tmp_path_factory.mktemp("job") / "new")
    if message is not None:
        event("refused")
        assert any(field.rpartition(".")[2] in message for field in chosen), message
        assert message.count("\n") == 0
        return
    event("traced")
    mesh = sharding.make_mesh(settings.mesh)
    model = models.build(settings.model)
    variables = jax.eval_shape(lambda: job._random_variables(model, settings))
    for name, plan in plans(settings, _IMAGES, mesh).items():
        state = jax.eval_shape(plan.new_state, variables)
        after, metrics = jax.eval_shape(plan.step, state, batch_of(settings, name))
        like = jax.tree.map(lambda x: (x.shape, x.dtype), (state, after))
        assert like[0] == like[1]
        assert all(x.shape == () for x in metrics.values())


# What the update itself depends on, and no name of a file.
_OF_STEPS = sorted(
    field
    for field in _FIELDS
    if field.startswith(("stage1.", "stage2.", "model.")) or field == "mesh"
)


@st.composite
def small_jobs(draw: Any) -> dict[str, Any]:
    """A network that compiles fast, and fields of its updates at random."""
    chosen = {"model.name": "small", "model.depth": 10, "model.widen_factor": 1}
    side = st.integers(1, 9)
    chosen["data.image_shape"] = draw(st.tuples(side, side, st.sampled_from((1, 3))))
    chosen["model.num_classes"] = draw(st.sampled_from((1, 2, 10)))
    chosen["data.augment_cls"] = ""
    for field in draw(st.lists(st.sampled_from(_OF_STEPS), min_size=2, max_size=6)):
        chosen[field] = draw(values(field, _FIELDS[field]))
    return chosen


@budget(3)
@given(small_jobs(), st.sampled_from(("stage1", "stage2")), st.integers(0, 3))
def test_config_takes_a_step_or_is_refused(tmp_path_factory, chosen, stage, turns):
    settings = configured(chosen)
    if stage not in config.stages_to_run(settings):
        return
    if refusal(chosen, settings, tmp_path_factory.mktemp("job") / "new") is not None:
        event("refused")
        return
    # What would only take long, or much memory.
    sizes = (settings[stage].batch_size, settings.model.widen_factor)
    long = settings[stage].adversary.num_steps > 50 or settings.model.depth > 16
    if max(sizes) > 64 or long:
        event("too large to run here")
        return
    event("ran")
    mesh = sharding.make_mesh(settings.mesh)
    model = models.build(settings.model)
    plan = plans(settings, _IMAGES, mesh)[stage]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = plan.new_state(job._random_variables(model, settings))
        if stage == "stage2":
            num_steps = jnp.asarray(min(turns, settings.stage2.t_max), jnp.int32)
            grown = dataclasses.replace(state.extra, num_steps=num_steps)
            state = dataclasses.replace(state, extra=grown)
        placed = sharding.put_state(state, mesh)
        rng = np.random.default_rng(0)
        batch = {
            name: rng.integers(0, 2 if name[0] == "y" else 256, x.shape).astype(x.dtype)
            for name, x in batch_of(settings, stage).items()
        }
        for name in batch:
            if name.startswith("y_"):
                batch[name] %= settings.model.num_classes
        placement = sharding.state_shardings(placed, mesh)
        compiled = train.jit_step(plan.step, placement, mesh)
        after, metrics = compiled(placed, sharding.put_batch(batch, mesh))
    assert int(after.step) == 1
    # Applied, or counted as broken: never half of it.
    finite = np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all()
    assert int(after.skipped) == (0 if finite else 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        # Tracing so many blocks never ended.
        ("model.depth", 6 * 10**8 + 4, r"model\.depth .*at most 1000"),
        # Overflowed a counter of 32 bits, or became infinite in float32.
        ("stage2.t_max", 2**31, r"config\.stage2\.t_max .*below 2\*\*31"),
        ("stage1.adversary.num_steps", 2**40, r"adversary\.num_steps .*below"),
        ("stage1.learning_rate", 1e39, r"config\.stage1\.learning_rate .*float32"),
        ("data.augment_cls", "resize(99999999)", "augment_cls.*1 to 8192"),
        # Were told without the name of the field.
        ("data.augment_cls", "flip(1)", r"config\.data\.augment_cls.*wrong arguments"),
        ("data.train", "digits:", r"config\.data\.train: digits has no split"),
        ("init_from", "nowhere", r"config\.init_from: there is no checkpoint"),
        ("model.name", "convnext", r"image_shape .*\(8, 8\): a ConvNeXt"),
        # Ended in a traceback.
        ("init_from", "file://x", r"config\.init_from: .*no kind of storage"),
        ("data.image_shape", (True, 8, 1), "image_shape"),
    ],
)
def test_what_once_broke_a_job_is_refused_by_name(tmp_path, field, value, message):
    usual = {"data.augment_cls": "", "model.name": "wide_resnet"}
    settings = configured(usual | {field: value})
    with pytest.raises(UserError, match=message):
        job.run(settings, tmp_path / "new")
    assert not (tmp_path / "new").exists()

"""Other training methods, JEM and RATIO: losses, one step, replay buffer, resuming."""

import functools
import io
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from ml_collections import ConfigDict
from rich.console import Console

from atebm_jax import (
    UserError,
    ascent,
    checkpoint,
    command_line,
    config,
    dry_run,
    hlo,
    losses,
    models,
    optim,
    sharding,
    stages,
    target_costs,
    train,
    train_step,
)
from atebm_jax.evaluate import cost
from atebm_jax.metric_writer import MetricWriter, read_metrics
from atebm_jax.stages import jem

SHAPE, BATCH_SIZE = (6, 6, 3), 8
NETWORK = reference.TwoLayers()
WEIGHTS = reference.random_variables(NETWORK, SHAPE)
BATCH = reference.random_batch(BATCH_SIZE, SHAPE, NETWORK.num_classes)
# JEM without anything random: every place has one chain, which goes on.
STILL = {"batch_size": BATCH_SIZE, "buffer_size": BATCH_SIZE, "fresh_share": 0.0}
STILL |= {"sgld_noise": 0.0, "image_noise": 0.0, "sgld_steps": 3}


class Mean(nn.Module):
    """Logits (mean of the image, 0), to be worked by hand."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, ())
        mean = weight * images.mean(axis=(1, 2, 3))
        return jnp.stack([mean, jnp.zeros_like(mean)], axis=1)


def stage(name, network=NETWORK, **settings):
    return stages.STAGES[name].build(network, reference.stage_config(name, **settings))


def constant(*values):
    """Images [N, 2, 2, 1] of one value each."""
    return jnp.broadcast_to(
        jnp.float32(values)[:, None, None, None], (len(values), 2, 2, 1)
    )


def loss_of(chosen, batch, made, weights):
    total, (_, outputs) = chosen.loss(weights["params"], {}, batch, made)
    return total, chosen.statistics(outputs)


# --- Losses ---------------------------------------------------------------------------


def test_jem_loss_is_worked_by_hand():
    """Logits (0, 0), (ln 3, 0), (ln 7, 0): CE ln 2, s ln 4 of real, ln 8 of chains."""
    images = {"x_cls": 0.0, "x_gen": np.log(3.0), "x_sampled": np.log(7.0)}
    made = {name: constant(value, value) for name, value in images.items()}
    made["places"] = jnp.zeros(2, jnp.int32)
    weights = {"params": {"weight": jnp.float32(1.0)}}
    total, figures = loss_of(
        stage("jem", Mean()), {"y_cls": jnp.int32([0, 1])}, made, weights
    )
    np.testing.assert_allclose(total, np.log(2) + np.log(8) - np.log(4), rtol=1e-6)
    expected = {"loss_ce": np.log(2), "loss_energy": np.log(2), "auc": 0.0}
    expected |= {"score_real": np.log(4), "score_contrastive": np.log(8)}
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-6, atol=1e-7)
    # What is left over from the images would be a metric that nobody can write.
    assert all(x.ndim == 0 for x in figures.values())


def test_ratio_loss_is_worked_by_hand():
    """p = (3/4, 1/4) on both: CE ln 4/3, KL(uniform || p) = ln(4/3) / 2."""
    made = dict.fromkeys(("x_adv", "x_confident"), constant(np.log(3.0)))
    weights = {"params": {"weight": jnp.float32(1.0)}}
    batch = {"y_cls": jnp.int32([0])}
    total, figures = loss_of(stage("ratio", Mean()), batch, made, weights)
    np.testing.assert_allclose(figures["loss_ce"], np.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(figures["loss_uniform"], np.log(4 / 3) / 2, rtol=1e-6)
    np.testing.assert_allclose(total, 0.75 * np.log(4 / 3), rtol=1e-6)


def test_ratio_makes_seeds_confident_inside_their_ball():
    made = jax.jit(stage("ratio").adversaries)(None, WEIGHTS, (), BATCH)
    logits = jax.jit(lambda x: NETWORK.apply(WEIGHTS, x))
    before, after = (
        losses.from_uniform(logits(x)) for x in (BATCH["x_ood"], made["x_confident"])
    )
    assert (after > before).all()
    away = np.asarray(made["x_confident"] - BATCH["x_ood"]).reshape(BATCH_SIZE, -1)
    assert 0.5 < np.linalg.norm(away, axis=1).max() <= 1.0 + 1e-6


# --- One step in PyTorch, written for this test ---------------------------------------


class Torch:
    """`reference.TwoLayers` and its weights in PyTorch."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        flat = flax.traverse_util.flatten_dict(WEIGHTS["params"], sep=".")
        self.params = {
            name: self.torch.tensor(np.asarray(x), requires_grad=True)
            for name, x in flat.items()
        }
        stats = WEIGHTS["batch_stats"]
        self.stats = {
            name: [self.torch.tensor(np.asarray(norm[k])) for k in ("mean", "var")]
            for name, norm in stats.items()
        }

    def images(self, x):
        return self.torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)

    def labels(self, y):
        return self.torch.tensor(np.asarray(y)).long()

    def logits(self, x, train=False):
        functions, get = self.torch.nn.functional, self.params
        for index, stride in enumerate((1, 2)):
            kernel = get[f"conv{index}.kernel"].permute(3, 2, 0, 1)
            x = functions.conv2d(x, kernel, stride=stride, padding=1)
            norm = f"bn{index}"
            mean, var = (part.clone() for part in self.stats[norm])
            affine = get[f"{norm}.scale"], get[f"{norm}.bias"]
            x = functions.batch_norm(x, mean, var, *affine, training=train, eps=1e-5)
            x = functions.relu(x)
        return x.mean(dim=(2, 3)) @ get["fc.kernel"] + get["fc.bias"]

    def climbed(self, x, score, steps, move):
        """x after steps of `move(x, gradient of the summed scores)`."""
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (gradient,) = self.torch.autograd.grad(score(x).sum(), x)
            x = move(x.detach(), gradient)
        return x.detach()

    def in_ball(self, x, epsilon, step_size=0.1):
        """A step of PGD from x, as a move."""

        def move(z, gradient):
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = z + step_size * gradient / (length + 1e-10) - x
            norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            inside = delta * (epsilon / (norm + 1e-7)).clamp(max=1.0)
            return (x + inside).clamp(0, 1)

        return move

    def jem_loss(self):
        score = lambda x: self.logits(x).logsumexp(dim=1)
        start = self.images(BUFFER[:, 0])
        chains = self.climbed(start, score, 3, lambda x, g: x + 0.25 * g)
        ce = self.torch.nn.functional.cross_entropy(
            self.logits(self.images(BATCH["x_cls"])), self.labels(BATCH["y_cls"])
        )
        real = score(self.images(BATCH["x_gen"]))
        return ce - (real.mean() - score(chains).mean())

    def ratio_loss(self):
        ce = self.torch.nn.functional.cross_entropy
        x, outside = self.images(BATCH["x_cls"]), self.images(BATCH["x_ood"])
        y = self.labels(BATCH["y_cls"])
        mistake = lambda z: ce(self.logits(z), y, reduction="none")
        confidence = lambda z: -self.logits(z).log_softmax(dim=1).mean(dim=1)
        x = self.climbed(x, mistake, 10, self.in_ball(x, 0.5))
        outside = self.climbed(outside, confidence, 20, self.in_ball(outside, 1.0))
        logits = self.logits(self.torch.cat([x, outside]), train=True)
        uniform = self.torch.full((NETWORK.num_classes,), 1 / NETWORK.num_classes)
        target = uniform.expand(len(outside), -1)
        divergence = self.torch.nn.functional.kl_div(
            logits[len(x) :].log_softmax(dim=1), target, reduction="batchmean"
        )
        return 0.5 * ce(logits[: len(x)], y) + 0.5 * divergence

    def step(self, loss):
        """(loss, parameters after a step of Nesterov SGD, weight decay 5e-4)."""
        rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
        optimizer = self.torch.optim.SGD(list(self.params.values()), **rates)
        value = loss()
        value.backward()
        optimizer.step()
        after = {name: x.detach().numpy() for name, x in self.params.items()}
        return float(value.detach()), after


BUFFER = np.random.default_rng(1).random((BATCH_SIZE, 1, *SHAPE), np.float32)


@pytest.mark.parametrize(("name", "settings"), [("jem", STILL), ("ratio", {})])
def test_one_step_is_that_of_pytorch(name, settings):
    torch = Torch()
    value, expected = torch.step(getattr(torch, f"{name}_loss"))
    step, optimizer = reference.jitted_step(stage(name, **settings), "sgd", 0.1, 5e-4)
    extra = jnp.asarray(BUFFER) if name == "jem" else ()
    state = train_step.create_state(WEIGHTS, optimizer, extra=extra)
    after, figures = step(state, BATCH)
    np.testing.assert_allclose(figures["loss"], value, rtol=1e-5)
    params = flax.traverse_util.flatten_dict(after.params, sep=".")
    for key, wanted in expected.items():
        # A ReLU that flips in the attack's last digits moves a gradient by this.
        np.testing.assert_allclose(params[key], wanted, rtol=0, atol=2e-5, err_msg=key)
    moved = reference.max_difference(after.batch_stats, WEIGHTS["batch_stats"])
    assert (moved > 0) == (name == "ratio")


# --- The replay buffer ----------------------------------------------------------------


def test_a_twentieth_of_the_chains_begins_anew_and_places_are_even():
    """4,000 draws of 8: 5 % within 4 standard errors; each of 5 chains a fifth."""
    buffer = jnp.full((BATCH_SIZE, 5, 1, 1, 1), 2.0)
    share = stages.STAGES["jem"].build(NETWORK, reference.stage_config("jem"))
    assert reference.stage_config("jem").fresh_share == 0.05 and share.needs_key
    draw = jax.vmap(lambda key: jem._starts(jax.random.split(key, 3), buffer, 0.05))
    places, images = jax.jit(draw)(jax.random.split(jax.random.key(0), 4000))
    fresh = np.asarray(images[..., 0, 0, 0] < 1)
    assert abs(fresh.mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / fresh.size)
    counts = np.bincount(np.asarray(places).ravel(), minlength=5)
    assert np.abs(counts / places.size - 0.2).max() < 4 * np.sqrt(0.16 / places.size)
    # Noise is uniform in [0, 1], chains come from the buffer as they are.
    noise = np.asarray(images)[fresh]
    assert 0 <= noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.05
    assert (np.asarray(images)[~fresh] == 2).all()


def test_results_go_back_to_their_places_and_no_other_changes():
    chosen = stage("jem", batch_size=BATCH_SIZE, buffer_size=3 * BATCH_SIZE - 1)
    buffer = chosen.init(jax.random.key(0), SHAPE)
    assert buffer.shape == (BATCH_SIZE, 3, *SHAPE)  # rounded up to whole batches
    assert 0 <= buffer.min() and buffer.max() < 1
    made = jax.jit(chosen.adversaries)(jax.random.key(1), WEIGHTS, buffer, BATCH)
    after = np.asarray(chosen.update(buffer, made))
    rows, places = np.arange(BATCH_SIZE), np.asarray(made["places"])
    np.testing.assert_array_equal(after[rows, places], made["x_sampled"])
    untouched = np.ones(buffer.shape[:2], bool)
    untouched[rows, places] = False
    np.testing.assert_array_equal(after[untouched], np.asarray(buffer)[untouched])
    assert len(set(places.tolist())) > 1
    # Langevin steps leave [0, 1]: nothing projects them.
    assert made["x_sampled"].min() < 0 or made["x_sampled"].max() > 1


def test_noise_of_chains_and_of_real_images_is_that_of_the_paper():
    """On a network without any gradient: variance 20 x 0.005^2, and 0.015^2."""
    weights = {"params": {"weight": jnp.float32(0.0)}}
    chosen = stage("jem", Mean(), batch_size=64, buffer_size=64, fresh_share=0.0)
    buffer = jnp.full((64, 1, 8, 8, 1), 0.5)
    images = jnp.full((64, 8, 8, 1), 0.5)
    made = chosen.adversaries(
        jax.random.key(0), weights, buffer, {"x_gen": images, "x_cls": images}
    )
    wanted = {"x_sampled": np.sqrt(20) * 0.005, "x_gen": 0.015, "x_cls": 0.015}
    for name, deviation in wanted.items():
        noise = np.asarray(made[name]) - 0.5
        np.testing.assert_allclose(noise.std(), deviation, rtol=0.06, err_msg=name)
        assert abs(noise.mean()) < 4 * deviation / 64
    assert not np.array_equal(made["x_gen"], made["x_cls"])


# --- Jobs -----------------------------------------------------------------------------

TINY = {"batch_size": 16, "num_steps": 6, "warmup_steps": 0, "eval_every_steps": 3}
TINY |= {"checkpoint_every_steps": 2, "buffer_size": 48, "sgld_steps": 2}


def settings(method, **overrides):
    used = TINY if method == "jem" else {k: TINY[k] for k in list(TINY)[:5]}
    blocks = {f"{method}.{name}": value for name, value in used.items()}
    return tiny.config(stages=method, **(blocks | overrides))


def last_state(workdir, method):
    folder = checkpoint.stage_folder(workdir, method)
    with checkpoint.ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            folder / str(checkpoint.steps_in(folder)[-1]) / "state"
        )


class Killed(BaseException):
    """Nothing of the job handles it."""


def test_jem_killed_on_the_way_ends_with_the_same_bits(monkeypatch, tmp_path):
    tiny.only_the_loop(monkeypatch)
    tiny.run(settings("jem"), tmp_path / "alone")
    write = MetricWriter.write

    def write_or_die(self, stage, step, metrics):
        if step == 6 and "loss" in metrics:
            raise Killed
        write(self, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write_or_die)
        with pytest.raises(Killed):
            tiny.run(settings("jem"), tmp_path / "killed")
    assert int(last_state(tmp_path / "killed", "jem")["step"]) == 4
    tiny.run(settings("jem"), tmp_path / "killed")
    one, other = (last_state(tmp_path / name, "jem") for name in ("alone", "killed"))
    reference.assert_same_bits(one, other)
    assert one["extra"].shape == (16, 3, 8, 8, 1)


@pytest.mark.parametrize(
    ("method", "seeds"), [("jem", "noise"), ("ratio", "gaussian_per_class")]
)
def test_method_trains_evaluates_and_reports(method, seeds, tmp_path):
    report, _ = tiny.run(settings(method, **{"data.seeds": seeds}), tmp_path)
    assert report["stages"].keys() == {method}
    assert report["stages"][method]["step"] == 6
    # Neither has a curriculum of T, nor seeds that it would have to lead somewhere.
    assert "T" not in report["stages"][method] and "reachability" not in report
    losses_seen = [r["loss"] for r in read_metrics(tmp_path) if "loss" in r]
    assert np.isfinite(losses_seen).all()
    weights, meta = checkpoint.load_weights(tmp_path)
    assert meta["stage"] == method and weights["params"]


def test_divergence_before_the_first_checkpoint_is_reported_too(tmp_path):
    """Also when the same command is given again: it comes to the same end."""
    broken = {"jem.learning_rate": 1e30, "max_skipped_in_row": 2}
    chosen = settings("jem", on_dying="report", **broken)
    for _ in range(2):
        report, printed = tiny.run(chosen, tmp_path)
        assert report["stages"] == {} and report["diverged"]["stage"] == "jem"
        assert "NaN or Inf in 2 steps in a row" in report["diverged"]["seen"]
        assert "jem diverged at step" in printed
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["diverged"] == report["diverged"]


def test_dry_run_counts_the_climbs_of_a_method():
    jem_cost = dry_run.measure(settings("jem"), "jem")
    assert jem_cost.turns == {"contrastive step": 2, "loss gradient": 1}
    ratio_cost = dry_run.measure(settings("ratio"), "ratio")
    turns = {"adversary step": 10, "outside step": 20, "loss gradient": 1}
    assert ratio_cost.turns == turns
    for measured in (jem_cost, ratio_cost):
        assert measured.flops.keys() == measured.turns.keys()
        assert measured.step_flops(16, 2) > 0


def noisy(model, block):
    """E[s(x + n)], n with 7 steps towards the score: one batch, no labels, no CE."""

    def adversaries(key, variables, extra, batch):
        x = batch["x_gen"]
        score = lambda x: models.freeze(model, variables, x.shape[1:])(x).max(axis=1)
        with jax.named_scope("noise"):
            return {"x": ascent.climb(score, x, step_size=0.1, num_steps=7)}

    def loss(params, batch_stats, batch, made):
        variables = {"params": params, "batch_stats": batch_stats}
        (made, real), _ = models.one_pass(
            model, variables, [made["x"], batch["x_gen"]], frozen=True
        )
        loss = ((real - made) ** 2).mean()
        return loss, (batch_stats, {"loss_smooth": loss})

    return stages.Stage(("gen",), adversaries, loss)


NOISY = stages.Method(
    ("gen",),
    noisy,
    parts=lambda block: {
        "noise step": stages.Part(
            7, lambda logits, y: logits.max(axis=1), "noise/climb"
        )
    },
    loss_passes=lambda block: 6,
)


def test_new_method_is_a_file_and_a_line_of_the_table(monkeypatch, tmp_path):
    """Without labels, with a climb of its own: trained, counted, shown."""
    monkeypatch.setitem(stages.STAGES, "noisy", NOISY)
    counts = {k: TINY[k] for k in list(TINY)[:5] if k != "warmup_steps"}
    chosen = tiny.config(
        stages="noisy", **{f"noisy.{name}": value for name, value in counts.items()}
    )
    report, printed = tiny.run(chosen, tmp_path)
    assert report["stages"]["noisy"]["step"] == 6 and "diverged" not in report
    assert " smooth 0." in printed
    found = dry_run.run(chosen, dry_run.Machine(), console=Console(file=io.StringIO()))
    flops, turns = found["noisy"]["flops"], found["noisy"]["turns"]
    assert turns == {"noise step": 7, "loss gradient": 1}
    # Forward and backward of one image, against both for two by the parameters too.
    assert flops["noise step"] == pytest.approx(flops["loss gradient"] / 3, rel=0.15)
    (seconds,) = found["noisy"]["seconds_per_step"].values()
    once = 16 * (7 * flops["noise step"] + flops["loss gradient"])
    assert seconds == pytest.approx(once / (989e12 * 0.4))
    assert cost.passes_of_training(chosen, "noisy") == 7 * 2 + 6
    assert target_costs.climbs_of(chosen, "noisy") == {"noise step": "noise/climb"}


@functools.cache
def compiled(method):
    """A method's update over eight devices: its fresh state, and the program."""
    mesh = sharding.make_mesh()
    more = {"jem.buffer_size": 16 * 64} if method == "jem" else {}
    chosen = settings(method, **more, **{"data.image_shape": SHAPE})
    plan = train.plan_stage(chosen, method, NETWORK, 6, mesh)
    like = train.placed_state(plan, models.variable_shapes(NETWORK, SHAPE), mesh)
    placement = jax.tree.map(lambda x: x.sharding, like)
    state = jax.jit(plan.new_state, out_shardings=placement)(WEIGHTS)
    batch = sharding.put_batch(reference.random_batch(16, SHAPE, 4), mesh)
    step = train.jit_step(plan.step, placement, mesh)
    return state, reference.Program(
        reference.compiled(step.lower(state, batch)).as_text()
    )


@pytest.mark.parametrize(("method", "climbs"), [("jem", 1), ("ratio", 2)])
def test_no_collective_is_in_a_loop_of_a_method(method, climbs):
    _, program = compiled(method)
    bodies = program.loop_bodies()
    assert sum(bool(reference.convolutions(body)) for body in bodies) == climbs
    for body in bodies:
        assert hlo.collectives(body) == []
    # The gradients are summed all the same.
    assert "all-reduce" in {c.kind for c in hlo.collectives(program.outside_loops())}


def test_buffer_lies_with_the_batch_and_never_leaves_its_device():
    state, program = compiled("jem")
    assert {shard.data.shape for shard in state.extra.addressable_shards} == {
        (2, 64, *SHAPE)
    }
    found = hlo.collectives(program.outside_loops())
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    # Scores for the AUC, and gradients: no image of batch or buffer.
    assert max(c.elements for c in found if c.kind == "all-gather") <= 16
    assert max(c.elements for c in found) <= 3 * 3 * 8 * 8


def test_jem_in_parts_keeps_every_chain_in_its_place():
    """Parts draw their own noise, but a chain that goes on goes on alike."""
    states = []
    for parts in (1, 4):
        chosen = stage("jem", **STILL)
        step = train_step.make(
            chosen,
            optim.optimizer("sgd", weight_decay=0.0),
            optim.schedule("constant", peak=0.1, num_steps=2),
            num_micro_batches=parts,
        )
        state = train_step.create_state(
            WEIGHTS,
            optim.optimizer("sgd", weight_decay=0.0),
            extra=jnp.asarray(BUFFER),
        )
        states.append(jax.jit(step)(state, BATCH)[0])
    reference.assert_close(states[1].extra, states[0].extra, atol=1e-6)
    reference.assert_close(states[1].params, states[0].params, atol=2e-6)
    assert reference.max_difference(states[0].extra, BUFFER) > 1e-3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("jem.fresh_share", 1.5, "jem.fresh_share is 1.5.*at most 1"),
        ("jem.buffer_size", 0, "jem.buffer_size is 0.*at least 1"),
        ("jem.sgld_steps", -1, "jem.sgld_steps is -1"),
        ("jem.image_noise", -0.1, "jem.image_noise is -0.1"),
        ("jem.sgld_step_size", 0.0, "sgld_step_size is 0.0: it must be positive"),
        ("ratio.ood_adversary.epsilon", -1.0, "epsilon is -1.0"),
    ],
)
def test_settings_of_other_methods_that_make_no_sense_are_refused(
    field, value, message
):
    method = field.partition(".")[0]
    chosen = settings(method, **{field: value})
    with pytest.raises(UserError, match=message):
        config.check(chosen)
        train.plan_stage(chosen, method, NETWORK, 6)


# --- Ablations of stage 2 -------------------------------------------------------------


def test_batch_statistics_of_stage2_are_of_all_its_images_and_move():
    chosen = stage("stage2", normalization="batch")
    images = {"x_contrastive": BATCH["x_ood"], "x_adv": BATCH["x_cls"]}
    logits = NETWORK.apply(WEIGHTS, BATCH["x_ood"])
    made = images | {"seed_logits": logits, "travel": jnp.float32(0)}
    _, (moved, outputs) = jax.jit(chosen.loss)(
        WEIGHTS["params"], WEIGHTS["batch_stats"], BATCH, made
    )
    every = np.stack([BATCH["x_gen"], *images.values()], axis=1).reshape(-1, *SHAPE)
    expected, stats = NETWORK.apply(WEIGHTS, every, train=True, mutable=["batch_stats"])
    reference.assert_close(moved, stats["batch_stats"], atol=1e-6)
    ce = losses.cross_entropy(expected[2::3], jnp.asarray(BATCH["y_cls"])).mean()
    np.testing.assert_allclose(outputs["loss_ce"], ce, rtol=1e-5)


def test_stage2_without_a_curriculum_begins_at_t_max_and_stays(tmp_path, monkeypatch):
    tiny.only_the_loop(monkeypatch)
    fixed = {"stage2.t_start": 3, "stage2.t_max": 3, "stage2.auc_threshold": 0.0}
    few = {"stage2.num_steps": 4, "log_every_steps": 1}
    from_scratch = {"stages": "stage2", "init_from": "random"}
    tiny.run(tiny.config(**from_scratch, **fixed, **few), tmp_path)
    assert [r["T"] for r in read_metrics(tmp_path) if "T" in r] == [3] * 4
    weights = checkpoint.load_weights(tmp_path)[0]
    # From random weights, whose running statistics nobody has moved.
    assert all((s["mean"] == 0).all() for s in weights["batch_stats"].values())


def test_unknown_normalization_and_impossible_start_of_t_are_refused():
    with pytest.raises(UserError, match="'group'.*frozen, batch"):
        stage("stage2", normalization="group")
    with pytest.raises(UserError, match="t_start is 9 and config.stage2.t_max 3"):
        config.check(tiny.config(**{"stage2.t_start": 9, "stage2.t_max": 3}))


def test_rows_of_methods_differ_in_the_method_alone():
    rows = {
        name: command_line.load_config(f"{tiny.DIGITS}:{name}")
        for name in ("dat", "at", "jem", "ratio", "dat_clean")
    }
    for name, row in rows.items():
        assert row.data == rows["dat"].data and row.seed == 0, name
        assert row.evaluate.attack == rows["dat"].evaluate.attack
    assert config.stages_to_run(rows["at"]) == ("stage1",)
    assert config.stages_to_run(rows["jem"]) == ("jem",)
    changed = config.differences(
        checkpoint.as_json(rows["dat"]), checkpoint.as_json(rows["dat_clean"])
    )
    assert changed == ["stage2.adversary.num_steps: 5 before, 0 now"]
    assert isinstance(rows["ratio"].ratio.ood_adversary, ConfigDict)

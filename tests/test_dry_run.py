"""Memory, FLOPs and advice from shapes alone."""

import io
import json
import math
import os
from pathlib import Path

import jax
import pytest
import reference
import tiny
from rich.console import Console

from atebm_jax import UserError, dry_run, models
from atebm_jax.command_line import load_config
from atebm_jax.dry_run import GIB, RESERVE, Cost, Machine
from atebm_jax.models import resnet

REPOSITORY = Path(__file__).parents[1]


def settings(**overrides):
    chosen = {"stages": "stage2", "init_from": "anything", "model.name": "wide_resnet"}
    return tiny.config(**chosen | overrides)


@pytest.fixture(scope="module")
def cost():
    return dry_run.measure(settings(), "stage2")


def quiet():
    return Console(file=io.StringIO(), width=200)


def test_state_is_parameters_averages_and_momentum(cost):
    model = models.build(settings().model)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    )
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    stats = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["batch_stats"]))
    assert cost.parameters == params
    assert cost.gradient_bytes == 4 * params
    # Beside parameters, averages and momentum only counters and the AUC window.
    assert 0 < cost.state_bytes - 4 * (3 * params + 2 * stats) < 200


def test_flops_of_the_convolutions_are_counted_by_hand(cost):
    # WRN-10-1 at 8x8: multiply-adds of every convolution and of the linear layer.
    by_hand = 64 * (9 * 1 * 16 + 2 * 9 * 16 * 16)
    by_hand += 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    by_hand += 4 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) + 640
    # XLA leaves out what meets the padding.
    assert 0.6 < cost.flops["seed scores"] / (2 * by_hand) < 1.2
    assert cost.flops["contrastive step"] / cost.flops["seed scores"] == pytest.approx(
        2, rel=0.15
    )
    # Three streams, forward and backward for images' and kernels' sake.
    ratio = cost.flops["loss gradient"] / cost.flops["seed scores"]
    assert ratio == pytest.approx(9, rel=0.15)


def test_a_step_costs_its_turns(cost):
    flops, turns = cost.flops, cost.turns
    assert turns["contrastive step"] == settings().stage2.t_max
    at_seven = cost.step_flops(4, contrastive_steps=7)
    expected = 7 * flops["contrastive step"] + flops["seed scores"]
    expected += turns["adversary step"] * flops["adversary step"]
    assert at_seven == pytest.approx(4 * (expected + flops["loss gradient"]))


def test_small_networks_are_of_every_family():
    assert {network["model.name"] for network in tiny.NETWORKS} == models.BUILT_IN


# With a module that its blocks share, and with attention; tracing others says little
# more.
TRACED = {"pssilu_wide_resnet", "xcit"}


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(
            network,
            id="-".join(map(str, network.values())),
            marks=() if network["model.name"] in TRACED else pytest.mark.slow,
        )
        for network in tiny.NETWORKS
    ],
)
def test_stage_2_of_every_family_is_measured(network, monkeypatch):
    reference.shallow(monkeypatch)
    monkeypatch.setitem(resnet.STAGES, 50, (1, 1, 1, 1))
    monkeypatch.setattr(dry_run, "_flops", lambda *_: {})
    # Windows of a Swin that fit the images.
    more = {"data.image_shape": (32, 32, 3), "model.window": 2}
    chosen = settings(**network, **more)
    cost = dry_run.measure(chosen, "stage2")
    shapes = models.variable_shapes(models.build(chosen.model), (32, 32, 3))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"]))
    assert cost.parameters == count and cost.gradient_bytes == 4 * count
    # The adversary keeps nothing for the parameters' sake.
    assert cost.loss_bytes > cost.pgd_bytes > 0


def test_rematerialisation_keeps_less(cost):
    lighter = dry_run.measure(settings(**{"model.remat": True}), "stage2")
    assert lighter.loss_bytes < 0.7 * cost.loss_bytes
    assert lighter.state_bytes == cost.state_bytes
    assert lighter.flops["loss gradient"] > cost.flops["loss gradient"]


def test_bfloat16_keeps_less_than_float32(cost):
    # Flax's normalisation leaves bfloat16 and float32 to promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = dry_run.measure(settings(**{"model.dtype": "bfloat16"}), "stage2")
    assert half.loss_bytes < cost.loss_bytes


def test_parts_and_devices_divide_the_activations():
    cost = Cost(1, 1000, 100, 10, 50, 20, {}, {})
    assert cost.device_bytes(8, 1, 1) == 1000 + 100 + 80 + 8 * 50
    assert cost.device_bytes(8, 1, 4) == 1000 + 200 + 80 + 2 * 50
    assert cost.device_bytes(8, 4, 1) == 1000 + 100 + 20 + 2 * 50


def test_advice_names_the_smallest_change_that_fits(cost):
    config = settings()
    whole = cost.device_bytes(16, 1, 1)
    quarter = cost.device_bytes(16, 1, 4)
    between = (quarter + cost.device_bytes(16, 1, 2)) / 2
    machine = Machine(1, between / GIB / (1 - RESERVE), 1.0, 0.5)
    advice = dry_run.remedies(config, "stage2", cost, machine)
    assert whole > between
    assert advice[0].startswith("--config.stage2.num_micro_batches=4 ")
    assert any("remat" in line for line in advice)
    assert any(line.startswith(("4 devices", "2 devices")) for line in advice)
    roomy = machine._replace(memory_gib=1.0)
    assert dry_run.remedies(config, "stage2", cost, roomy) == []


def test_batch_with_statistics_is_not_advised_to_pass_in_parts(cost):
    """Stage 1 of any network with batch normalisation; stage 2 keeps it still."""
    assert not cost.whole_batch
    assert dry_run.measure(settings(), "stage1").whole_batch
    assert list(dry_run.splits(16, 2, True)) == [1]
    assert list(dry_run.splits(16, 2, False)) == [1, 2, 4, 8]


def test_nothing_helps_where_the_state_alone_is_too_large(cost):
    machine = Machine(1, cost.state_bytes / 2 / GIB, 1.0, 0.5)
    assert dry_run.remedies(settings(), "stage2", cost, machine) == []
    console = quiet()
    dry_run.run(settings(), machine, console=console)
    assert "does not fit" in console.file.getvalue()
    assert "No split" in console.file.getvalue()


def test_warm_up_of_a_stage_of_unknown_length_is_no_obstacle():
    warm = settings(**{"stage2.warmup_steps": 200})
    assert dry_run.measure(warm, "stage2").parameters > 0


def test_reachability_is_measured_where_there_are_data(tmp_path):
    console, path = quiet(), tmp_path / "cost.json"
    short = settings(**{"stage2.contrastive_step_size": 0.02})
    dry_run.run(short, Machine(), console=console, json_file=str(path))
    found = json.loads(path.read_text())["stage2"]["reachability"]
    assert found["farthest_contrastive"] == pytest.approx(0.6)
    assert found["sentence"] in console.file.getvalue()


def test_figures_go_into_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(dry_run, "_estimate", lambda *arguments: {"stage2": 1})
    dry_run.run(settings(), Machine(), console=quiet(), json_file="~/cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == {"stage2": 1}


def test_link_stays_a_link_to_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_estimate", lambda *arguments: {"stage2": 1})
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    dry_run.run(settings(), Machine(), console=quiet(), json_file=str(link))
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"stage2": 1}


@pytest.mark.parametrize("place", ["~/nowhere/cost.json", "~", "~nobody/cost.json"])
def test_figures_that_have_no_place_are_refused_before_the_work(
    tmp_path, monkeypatch, place
):
    def work(*arguments):
        raise AssertionError("work")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(dry_run, "_estimate", work)
    with pytest.raises(UserError, match=f"--dry_run_json={place} cannot be written"):
        dry_run.run(settings(), Machine(), console=quiet(), json_file=place)


@pytest.mark.parametrize(
    ("place", "message"),
    [("gs://x/cost.json", "is in a cloud"), ("", "is empty: give a path")],
)
def test_figures_go_to_a_local_file_that_is_named(place, message):
    with pytest.raises(UserError, match=f"--dry_run_json.* {message}"):
        dry_run.run(settings(), Machine(), console=quiet(), json_file=place)


@pytest.mark.parametrize("name", ["x" * 300, "loop/x"])
def test_figures_that_could_not_be_written_are_refused_before_the_work(
    tmp_path, monkeypatch, name
):
    def work(*arguments):
        raise AssertionError("work")

    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(dry_run, "_estimate", work)
    with pytest.raises(UserError, match="--dry_run_json=.* cannot be written"):
        dry_run.run(
            settings(), Machine(), console=quiet(), json_file=str(tmp_path / name)
        )


def test_figures_go_through_devices_and_links(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_estimate", lambda *arguments: {"stage2": 1})
    (tmp_path / "link").symlink_to("cost.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        path = str(tmp_path / name)
        dry_run.run(settings(), Machine(), console=quiet(), json_file=path)
    assert json.loads(os.read(reader, 999)) == {"stage2": 1}
    os.close(reader)
    assert json.loads((tmp_path / "cost.json").read_text()) == {"stage2": 1}
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_without_data_it_says_that_reachability_was_not_measured():
    console = quiet()
    figures = dry_run.run(
        settings(**{"data.train": "folder:/nowhere"}), Machine(), console=console
    )
    assert figures["stage2"]["reachability"] is None
    assert "reachability was not measured: " in console.file.getvalue()
    assert "/nowhere" in console.file.getvalue()


def test_figures_are_printed_and_written(tmp_path):
    console, path = quiet(), tmp_path / "cost.json"
    figures = dry_run.run(
        settings(stages="stage1,stage2", init_from=""),
        Machine(2, 80.0, 989.0, 0.4),
        console=console,
        json_file=str(path),
    )
    assert json.loads(path.read_text()) == figures
    assert set(figures) == {"stage1", "stage2"} and figures["stage2"]["fits"]
    shown = console.file.getvalue()
    assert "fits into 72 of 80 GiB" in shown and "contrastive step" in shown
    assert list(figures["stage1"]["seconds_per_step"]) == ["each"]
    assert "│ a step, at 40% of the peak" in shown and "a step at T=0, at 40%" in shown
    slow, fast = figures["stage2"]["seconds_per_step"].values()
    assert slow < fast


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(devices=0), "--devices is 0"),
        (Machine(memory_gib=-1.0), "--device_memory_gib is -1"),
        (Machine(memory_gib=math.inf), "--device_memory_gib is inf: .*and finite"),
        (Machine(utilisation=2.0), "at most 1"),
        (Machine(devices=3), "does not split over --devices=3"),
    ],
)
def test_impossible_machine_is_refused(machine, message):
    with pytest.raises(UserError, match=message):
        dry_run.run(settings(), machine, console=quiet())


def test_rates_and_devices_are_told_in_plain_numbers():
    rates = [dry_run.a_second(rate) for rate in (23_104.4, 99.96, 0.4123)]
    assert rates == ["23,104", "100", "0.412"]
    assert [dry_run.devices_in_words(n) for n in (1, 8)] == ["1 device", "8 devices"]


@pytest.mark.parametrize(
    "name",
    [
        "imagenet256:resnet50_t30 v5e:2x4",
        "imagenet256:wrn50_4_t65 h100:8",
        "imagenet256:convnext_tiny h100:8",
        "imagenet256:xcit_s12 h100:8",
        "cifar10:wrn34_10_t50 v5e:2x4",
        "cifar10:dm_wrn28_10 h100:8",
    ],
)
def test_estimated_memory_is_a_little_more_than_compilers_need(name, monkeypatch):
    monkeypatch.setattr(dry_run, "_flops", lambda *_: {})
    row, _ = name.split(" ")
    file, _, row = row.partition(":")
    config = load_config(str(REPOSITORY / "configs" / f"{file}.py:{row}"))
    compiled = json.loads((REPOSITORY / "docs" / "targets.json").read_text())[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        cost = dry_run.measure(config, "stage2")
    batch_size, devices = config.stage2.batch_size, compiled["devices"]
    estimated = cost.device_bytes(batch_size, devices, 1)
    needed = compiled["memory_bytes"]["needed"]
    assert needed <= estimated <= 1.4 * needed


def test_rematerialised_step_keeps_all_that_gradients_keep():
    model = settings(**{"model.remat": True}).model
    assert dry_run._compiled_share(model) == 1.0
    model.remat = False
    assert dry_run._compiled_share(model) < 1.0

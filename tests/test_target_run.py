"""What is said of a compiled step, and what is tried where it does not fit.

Nothing is compiled here: `tests/targets` does that.
"""

import importlib.metadata
import importlib.util
import io
import json
import math
import re
import subprocess
import time
from types import SimpleNamespace

import jax
import pytest
import tiny
from rich.console import Console

from atebm_jax import (
    UserError,
    dry_run,
    hlo,
    models,
    progress,
    target_costs,
    target_programs,
    target_run,
    targets,
)
from atebm_jax.autoattack import versions
from atebm_jax.dry_run import GIB
from atebm_jax.stages import STAGES
from atebm_jax.target_programs import Compiled

# Two parts of a batch, in each both loops; in the rest a search and the all-reduce.
STEP = """HloModule jit_step

%climb (c.1: (s32[])) -> (s32[]) {
  %c.1 = (s32[]) parameter(0)
  %f.1 = f32[4] fusion(%c.1), calls=%g, backend_config={"estimated_cycles":"1000"}
}

%attack (c.2: (s32[])) -> (s32[]) {
  %c.2 = (s32[]) parameter(0)
  %f.2 = f32[4] fusion(%c.2), calls=%g, backend_config={"estimated_cycles":"100"}
}

%search (c.3: (s32[])) -> (s32[]) {
  %c.3 = (s32[]) parameter(0)
  %f.3 = f32[4] fusion(%c.3), calls=%g, backend_config={"estimated_cycles":"1"}
}

%part (c.4: (s32[])) -> (s32[]) {
  %c.4 = (s32[]) parameter(0)
  %w.1 = (s32[]) while(%c.4), body=%climb, metadata={op_name="jit(step)/parts/while/body/climb/while"}
  %w.2 = (s32[]) while(%c.4), body=%attack, metadata={op_name="jit(step)/parts/while/body/adversary/climb/while"}
  %f.4 = f32[4] fusion(%c.4), calls=%g, backend_config={"estimated_cycles":"10000"}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3] parameter(0)
  %w.3 = (s32[]) while(%a), body=%part, metadata={op_name="jit(step)/parts/while"}
  %w.4 = (s32[]) while(%a), body=%search, metadata={op_name="jit(step)/search/while"}
  %all-reduce.1 = f32[1024] all-reduce(%a), to_apply=%sum, backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501


def settings(**overrides):
    chosen = {"stages": "stage2", "init_from": "anything", "stage2.t_max": 7}
    return tiny.config(**chosen | overrides)


STAGE2 = target_costs.climbs_of(settings(), "stage2")


def compiled(gib, temporaries=None, text=STEP):
    """A step that needs so much; of it temporaries."""
    needed = int(gib * GIB)
    inner = int((gib - 1 if temporaries is None else temporaries) * GIB)
    memory = {"arguments": needed - inner, "temporaries": inner, "needed": needed}
    return Compiled(hlo.Program(text), memory, 1.0)


@pytest.fixture
def pretend(monkeypatch):
    """Compilers that are here, and a memory for every config: config, target -> GiB."""

    def use(need):
        made = []

        def compile_step(config, name, target):
            made.append((config, target.name))
            return need(config, target)

        flops = {"contrastive step": 2.0, "adversary step": 2.0, "loss gradient": 9.0}
        turns = {"contrastive step": 7, "adversary step": 5, "loss gradient": 1}
        cost = dry_run.Cost(1, 2, 3, 4, 5, 6, flops, turns)
        monkeypatch.setattr(dry_run, "measure", lambda config, name: cost)
        monkeypatch.setattr(target_programs, "compile_step", compile_step)
        monkeypatch.setattr(
            targets, "devices", lambda target: range(math.prod(target.sizes))
        )
        return made

    return use


def told(config, target, **options):
    console = Console(file=io.StringIO(), width=160)
    figures = target_run.run(config, target, console=console, **options)
    return figures["stage2"], console.file.getvalue()


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v9:2x2", "h100:2x2", "h100:0", "2x4"])
def test_target_that_is_none_is_refused_with_what_is_known(name):
    with pytest.raises(UserError, match=f"--target is '{name}'.*v5e:2x4.*h100:8"):
        targets.parse(name)


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("v5e:2x4", "v5e:4x4"),
        ("v5e:4x4", "v5e:4x8"),
        ("v5p:2x2x1", "v5p:2x2x2"),
        ("v5p:2x2x2", "v5p:2x2x4"),
        ("h100:8", "h100:16"),
        ("h100", "h100:2"),
    ],
)
def test_larger_target_has_twice_the_devices(name, larger):
    assert targets.parse(name).larger().name == larger


@pytest.mark.parametrize(
    ("name", "extra"), [("v5e:2x4", "target-tpu"), ("h100:8", "target-gpu")]
)
def test_without_the_compiler_the_extra_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'atebm_jax\[{extra}\]'"):
        target_run.run(settings(), name)


@pytest.mark.parametrize(
    ("name", "compiler"), [("v5e:2x4", "libtpu"), ("h100:8", "jax-cuda13-pjrt")]
)
def test_versions_are_those_of_the_compiler_that_is_here(name, compiler, monkeypatch):
    here = {"jax": "1.2", compiler: "3.4"}

    def version(wheel):
        if wheel not in here:
            raise importlib.metadata.PackageNotFoundError(wheel)
        return here[wheel]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert targets.versions(targets.parse(name)) == here


def test_times_are_of_one_step_of_each_loop_of_the_rest_and_of_whole_steps():
    found = target_costs.times(
        hlo.Program(STEP), targets.parse("v5e:2x4"), STAGE2, parts=2
    )
    second = 197e12 / 131_072  # cycles
    cycles = {name: round(seconds * second) for name, seconds in found.items()}
    rest = 2 * 10_000 + 1 + 5
    assert cycles == {
        "contrastive step": 2 * 1000,
        "adversary step": 2 * 100,
        "rest": rest,
    }
    turns = {"contrastive step": 7, "seed scores": 1, "adversary step": 3}
    assert target_costs.whole(cycles, turns) == rest + 2 * (3 * 100 + 7 * 1000)


def test_attacks_inside_and_outside_take_the_turns_of_their_own():
    text = STEP.replace("body/climb/while", "body/outside/adversary/climb/while")
    climbs = target_costs.climbs_of(settings(), "ratio")
    target = targets.parse("v5e:2x4")
    found = target_costs.times(hlo.Program(text), target, climbs, parts=1)
    second = 197e12 / 131_072  # cycles
    cycles = {name: round(seconds * second) for name, seconds in found.items()}
    rest = 10_000 + 1 + 5
    assert cycles == {
        "adversary step": 100,
        "outside step": 1000,
        "rest": rest,
    }
    turns = {"adversary step": 3, "outside step": 20}
    assert target_costs.whole(cycles, turns) == rest + 3 * 100 + 20 * 1000


@pytest.mark.parametrize("name", STAGES)
def test_climbs_are_traced_in_the_scopes_that_their_method_declares(name):
    config = settings(**{f"{name}.batch_size": 2})
    model, shape = models.build(config.model), tuple(config.data.image_shape)
    stage = STAGES[name].build(model, config[name])
    batch = dry_run.batch_shapes(stage, shape, 2)
    key = jax.random.key(0)
    extra = jax.eval_shape(lambda key: stage.init(key, shape), key)
    lowered = jax.jit(stage.adversaries).lower(
        key if stage.needs_key else None,
        models.variable_shapes(model, shape),
        extra,
        batch,
    )
    text = lowered.as_text(debug_info=True)
    loops = set(re.findall(r"/([\w/]*climb)/while", text))
    assert loops == set(target_costs.climbs_of(config, name).values())
    assert name != "ratio" or loops == {"adversary/climb", "outside/adversary/climb"}


def test_chains_of_jem_take_their_turns_and_no_adversary(monkeypatch):
    monkeypatch.setattr(targets, "devices", lambda target: range(8))
    config = settings(**{"jem.sgld_steps": 4})
    attack = next(line for line in STEP.splitlines() if "/adversary/" in line)
    one = compiled(1, text=STEP.replace(attack, ""))
    asked = []
    made = target_run.figures(
        config, "jem", targets.parse("v5e:2x4"), one, lambda t: asked.append(t) or 1.0
    )
    # No step of JEM has a T of its own.
    assert list(made["step"]) == ["each"] and asked == [4]
    cycles = round(made["step"]["each"]["seconds"] * 197e12 / 131_072)
    assert cycles == 10_000 + 1 + 5 + 4 * 1000
    console = Console(file=io.StringIO(), width=160)
    target_run._show(console, config, "jem", made)
    shown = console.file.getvalue()
    assert "│ a step " in shown and "│ all steps " in shown and "T=" not in shown


def test_time_on_a_gpu_is_what_bytes_and_flops_of_its_kernels_take():
    found = target_costs.times(
        hlo.Program(STEP), targets.parse("h100:8"), STAGE2, parts=1
    )
    assert found["contrastive step"] == pytest.approx((4 + 1) * 4 / 3.35e12, rel=0.3)


def test_products_of_float32_have_half_the_peak_of_a_gpu():
    side = 4096
    text = f"""HloModule product

ENTRY %main (a: f32[{side},{side}]) -> f32[{side},{side}] {{
  %a = f32[{side},{side}] parameter(0)
  ROOT %d = f32[{side},{side}] dot(%a, %a), lhs_contracting_dims={{1}}
}}
"""
    target, program = targets.parse("h100:8"), hlo.Program(text)
    whole = 2 * side**3 / 989e12
    for dtype, slower in (("bfloat16", 1), ("float32", 2)):
        found = program.total(target_costs.estimate(program, target, dtype))
        assert found == pytest.approx(slower * whole)
    assert target_costs.peak(targets.parse("v5e:2x4"), "float32") == 197e12


def test_network_in_float32_on_a_gpu_is_told_so(pretend):
    pretend(lambda config, target: compiled(1))
    for dtype, said in (("float32", True), ("bfloat16", False)):
        _, shown = told(settings(**{"model.dtype": dtype}), "h100:8")
        assert "time is the roofline" in shown and ("of TF32" in shown) == said


def test_communication_is_told_by_place():
    found = target_costs.communication(hlo.Program(STEP), STAGE2)
    assert found["in the loops of PGD"] == found["in other loops"] == {}
    assert found["outside of loops"] == {"all-reduce": {"number": 1, "bytes": 4096}}


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory: Used 26.50G of 15.75G hbm.", 26.5),
        (
            "RESOURCE_EXHAUSTED: total memory for HLO temporaries (512.00M) exceeds",
            0.5,
        ),
        ("INTERNAL: Used 3 registers", None),
        ("RESOURCE_EXHAUSTED: shared memory", None),
    ],
)
def test_what_a_refused_program_needs_is_read_off_the_refusal(message, gib):
    assert target_programs._needed(message) == (gib and gib * GIB)


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])
def test_failure_of_the_compiler_is_one_sentence(name):
    """A GPU's has tried to do without Triton."""
    tried = []

    def compile(compiler_options=None):
        tried.append(compiler_options)
        raise jax.errors.JaxRuntimeError("INTERNAL: no tiles for\n  %dot.1 = ...")

    lowered, target = SimpleNamespace(compile=compile), targets.parse(name)
    said = rf"of {name} fails on this program \(INTERNAL: no tiles for\): try another"
    with pytest.raises(target_programs.CompilerFailure, match=said):
        target_programs.compile_lowered(lowered, target, 0, 0, 0.0)
    without = {"xla_gpu_enable_triton_gemm": False}
    assert tried == [None, *([without] if target.is_gpu else [])]


def test_step_that_fits_is_told_with_all_figures(pretend, tmp_path):
    made = pretend(lambda config, target: compiled(9.2))
    path = tmp_path / "cost.json"
    figures, shown = told(settings(), "v5e:2x4", json_file=str(path))
    assert len(made) == 1 and figures["fits"] and figures["remedies"] == []
    assert json.loads(path.read_text())["stage2"] == figures
    assert figures["versions"]["jax"] == jax.__version__
    assert "9.20 GiB" in shown and "1 all-reduce" in shown
    assert "compiled, not measured; time is the compiler's own estimate" in shown
    assert "stage2 fits on v5e:2x4: 9.2 of 15.75 GiB a device." in shown
    slow, fast = (figures["step"][key] for key in ("T=7", "T=0"))
    assert slow["seconds"] > fast["seconds"]
    assert slow["images_per_second"] == 16 / slow["seconds"]
    steps = 1438 / 16  # of an epoch of the digits
    assert slow["hours_of_an_epoch"] == pytest.approx(steps * slow["seconds"] / 3600)
    assert slow["hours_of_the_budget"] == 6 * slow["seconds"] / 3600


def test_least_costly_change_that_fits_is_found_by_compiling(pretend):
    def need(config, target):
        parts = config.stage2.num_micro_batches
        # In two parts its share would fit, and does not.
        return compiled({1: 21, 2: 16, 4: 9}[parts], temporaries=20 / parts)

    made = pretend(need)
    figures, shown = told(settings(**{"stage2.batch_size": 64}), "v5e:2x4")
    assert not figures["fits"]
    assert [c.stage2.num_micro_batches for c, _ in made] == [1, 2, 4]
    last = figures["remedies"][-1]
    assert last["flags"] == "--config.stage2.num_micro_batches=4" and last["fits"]
    assert "16 of 15.75 GiB a device, does not fit" in shown
    assert "it does with --config.stage2.num_micro_batches=4." in shown


def test_parts_remat_fsdp_and_more_chips_are_tried_in_this_order(pretend):
    made = pretend(
        lambda config, target: compiled(
            9 if target.name == "v5e:4x8" else 40, temporaries=30
        )
    )
    figures, shown = told(settings(**{"stage2.batch_size": 256}), "v5e:2x4")
    flags = [remedy["flags"] for remedy in figures["remedies"]]
    # No part would fit beside what stays.
    assert flags == [
        *(f"--config.stage2.num_micro_batches={n}" for n in (8, 16, 32)),
        "--config.model.remat=True",
        "--config.mesh=fsdp:-1",
        "--target=v5e:4x4",
        "--target=v5e:4x8",
    ]
    assert made[4][0].model.remat and made[5][0].mesh == "fsdp:-1"
    assert "it does with --target=v5e:4x8" in shown


def test_step_that_nothing_helps_is_told_so(pretend):
    pretend(lambda config, target: compiled(99, temporaries=1))
    figures, shown = told(settings(), "h100:1")
    assert not any(remedy["fits"] for remedy in figures["remedies"])
    assert "stage2 does not fit on h100:1" in shown and "nothing tried helps" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=v5e:2x4"], "--workdir is missing"),
        (["--target=v5e:2x4", "--workdir=w"], "--target is for --dry_run"),
        (
            ["--dry_run", "--target=v5e:2x4", "--devices=4"],
            "--devices and --target=v5e:2x4 exclude each other",
        ),
        (["--dry_run", "--target=v5e"], "--target is 'v5e': give a TPU"),
        (["--dry_run", "--target="], "--target is '': give a TPU"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    config = str(tiny.ROOT / "tests" / "small.py")
    done = subprocess.run(
        tiny.command("atebm_jax.main", f"--config={config}", *flags),
        capture_output=True,
        text=True,
        check=False,
        env=tiny.environment(),
    )
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_waiting_is_told_on_a_terminal_and_elsewhere(monkeypatch):
    monkeypatch.setattr(progress, "_BETWEEN_LINES_OF_WAITING", 0.01)
    plain = Console(file=io.StringIO(), width=80)
    with progress.waiting(plain, "compiling [x]"):
        time.sleep(0.1)
    lines = plain.file.getvalue().splitlines()
    assert lines[0] == "compiling [x] ..." and "so far" in lines[1]
    bars = Console(file=io.StringIO(), width=80, force_terminal=True)
    with progress.waiting(bars, "compiling [x]"):
        time.sleep(0.2)
    assert "compiling [x]" in bars.file.getvalue()


# As compilers leave the two loops of a sampler, of which the outer has one turn; a rule
# may search in a step.
SAMPLER = """HloModule jit_sample

%search (c.1: (s32[])) -> (s32[]) {
  %c.1 = (s32[]) parameter(0)
  %f.1 = f32[4] fusion(%c.1), calls=%g, backend_config={"estimated_cycles":"1"}
}

%step (c.2: (s32[])) -> (s32[]) {
  %c.2 = (s32[]) parameter(0)
  %f.2 = f32[4] fusion(%c.2), calls=%g, backend_config={"estimated_cycles":"1000"}
  %w.1 = (s32[]) while(%c.2), body=%search, metadata={op_name="jit(sample)/climb/while/body/closed_call/while/body/while"}, backend_config={"known_trip_count":{"n":"9"}}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3] parameter(0)
  %f.3 = f32[4] fusion(%a), calls=%g, backend_config={"estimated_cycles":"500"}
  %w.2 = (s32[]) while(%a), body=%step, metadata={op_name="jit(sample)/climb/while/body/closed_call/while"}
}
"""  # noqa: E501
# The same where the outer loop is still there.
_LOOP = SAMPLER.splitlines()[-2]
_OUTER = _LOOP.replace("%step", "%once").replace("/body/closed_call/while", "")
NESTED = SAMPLER.replace(_LOOP, _OUTER).replace(
    "ENTRY",
    f"""%once (c.3: (s32[])) -> (s32[]) {{
  %a = (s32[]) parameter(0)
{_LOOP}
}}

ENTRY""",
)

# As a TPU's compiler writes the turns of loops, and a GPU's.
ATTACK = """HloModule jit_attack

%until (c.2: (s32[], s32[])) -> pred[] {
  %n.2 = s32[]{:T(128)} constant(100)
  %c.2 = (s32[], s32[]) parameter(0)
  %g.2 = s32[]{:T(128)} get-tuple-element(%c.2), index=0
  %m.2 = s32[]{:T(128)} get-tuple-element(%c.2), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%g.2, %n.2), direction=LT
}

%newton (c.1: (s32[])) -> (s32[]) {
  %c.1 = (s32[]) parameter(0)
  %f.1 = f32[4] fusion(%c.1), calls=%g, backend_config={"estimated_cycles":"1"}
}

%step (c.3: (s32[], s32[])) -> (s32[], s32[]) {
  %c.3 = (s32[], s32[]) parameter(0)
  %f.2 = f32[4] fusion(%c.3), calls=%g, backend_config={"estimated_cycles":"1000"}
  %w.1 = (s32[]) while(%c.3), body=%newton, backend_config={"known_trip_count":{"n":"12"}}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3] parameter(0)
  %f.3 = f32[4] fusion(%a), calls=%g, backend_config={"estimated_cycles":"500"}
  %w.2 = (s32[], s32[]) while(%a), condition=%until, body=%step, metadata={op_name="jit(attack)/while"}
}
"""  # noqa: E501


@pytest.mark.parametrize("text", [SAMPLER, NESTED], ids=["one loop", "both loops"])
def test_samples_are_told_a_second_on_all_devices(text, pretend, monkeypatch):
    pretend(lambda config, target: compiled(1))
    one = Compiled(hlo.Program(text), {"needed": GIB}, 1.0)
    monkeypatch.setattr(target_programs, "compile_lowered", lambda *_: one)
    monkeypatch.setattr(target_programs, "lower_sampler", lambda *_: None)
    config = settings(**{"evaluate.samples.num_steps": 4})
    console = Console(file=io.StringIO(), width=160)
    made = target_run.run(config, "v5e:2x4", program="sample", console=console)
    figures = made["sample"]
    assert figures["fits"] and figures["num_steps"] == 4
    second = 197e12 / 131_072  # cycles
    cycles = {name: round(x * second) for name, x in figures["seconds"].items()}
    assert cycles == {"step of 32 images": 1000 + 9, "rest": 500}
    whole = (500 + 4 * 1009) / second
    assert figures["samples_per_second"] == pytest.approx(8 * 32 / whole)
    assert "samples a second on 8 devices" in console.file.getvalue()


def test_autoattack_is_told_for_each_attack_and_for_all_its_rounds(
    pretend, monkeypatch
):
    pretend(lambda config, target: compiled(1))
    lowered, made_of = [], Compiled(hlo.Program(ATTACK), {"needed": GIB}, 1.0)

    def lower_attack(config, plan, name, network, target):
        lowered.append((name, plan.norm, plan.epsilon))

    monkeypatch.setattr(target_programs, "lower_attack", lower_attack)
    monkeypatch.setattr(target_programs, "compile_lowered", lambda *_: made_of)
    threat = {"evaluate.attack.norm": "l2", "evaluate.attack.epsilon": 0.25}
    config = settings(**threat, **{"evaluate.batch_size": 40, "model.num_classes": 4})
    console = Console(file=io.StringIO(), width=160)
    made = target_run.run(config, "v5e:2x4", program="autoattack", console=console)
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    assert lowered == [(name, "l2", 0.25) for name in names] and tuple(made) == names
    seconds = (500 + 100 * (1000 + 12)) * 131_072 / 197e12
    # One target class for each of the three other classes.
    for name, rounds in zip(names, (1, 3, 3, 1), strict=True):
        assert made[name]["rounds"] == rounds and made[name]["fits"]
        assert made[name]["seconds"] == {
            "round of 40 images": pytest.approx(seconds, rel=1e-6)
        }
        rate = made[name]["images_per_second"]
        assert rate == pytest.approx(40 / rounds / seconds)
    shown = console.file.getvalue()
    assert f"{40 / 8 / seconds:,.0f} images a second on 8 devices" in shown
    assert "apgd-t has 3 instead of 9 target classes" in shown


def test_attack_that_does_not_fit_is_told_with_a_way_out(pretend, monkeypatch):
    pretend(lambda config, target: compiled(1))
    large = Compiled(None, {"needed": 99 * GIB}, 1.0)
    monkeypatch.setattr(target_programs, "lower_attack", lambda *_: None)
    monkeypatch.setattr(target_programs, "compile_lowered", lambda *_: large)
    console = Console(file=io.StringIO(), width=160)
    made = target_run.run(settings(), "v5e:2x4", program="autoattack", console=console)
    assert not any(figures["fits"] for figures in made.values())
    assert "give a smaller config.evaluate.batch_size" in console.file.getvalue()


def test_ball_without_extent_is_told_to_need_no_attack(pretend):
    pretend(lambda config, target: compiled(1))
    console = Console(file=io.StringIO(), width=160)
    config = settings(**{"evaluate.attack.epsilon": 0.0})
    assert (
        target_run.run(config, "v5e:2x4", program="autoattack", console=console) == {}
    )
    assert "the radius is 0" in console.file.getvalue()


def test_batch_of_attacks_must_split_over_the_target():
    config = settings(**{"evaluate.batch_size": 33})
    plan = versions.plan("standard", ("l2", 0.5), 10)
    target = SimpleNamespace(kind="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "devices", lambda target: jax.devices())
        with pytest.raises(UserError, match="evaluate.batch_size is 33"):
            target_programs.lower_attack(config, plan, "apgd-ce", None, target)


def test_turns_are_read_beside_a_loop_or_from_the_constant_of_its_condition():
    (outer,) = hlo.Program(ATTACK).loops()
    (inner,) = hlo.Program(ATTACK).loops(outer.body)
    assert (outer.turns, inner.turns) == (100, 12)
    other = hlo.Program(ATTACK.replace("%g.2, %n.2", "%g.2, %m.2"))
    assert other.loops()[0].turns is None


def test_change_to_a_topology_that_is_none_is_not_tried(pretend, monkeypatch):
    made = pretend(lambda config, target: compiled(99, temporaries=1))

    def devices(target):
        if target.name != "v5e:2x4":
            raise UserError(f"--target={target.name} is refused by its compiler.")
        return range(8)

    monkeypatch.setattr(targets, "devices", devices)
    figures, shown = told(settings(), "v5e:2x4")
    assert {name for _, name in made} == {"v5e:2x4"} and not figures["fits"]
    assert "nothing tried helps" in shown


def test_unknown_program_is_refused():
    with pytest.raises(UserError, match="--program 'draw'.*sample, autoattack"):
        target_run.run(settings(), "v5e:2x4", program="draw")

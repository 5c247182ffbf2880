"""The benchmarks run, both sides agree, and mistakes are told; no time is asserted."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from reference import MEAN, STD

from atebm_jax import convert
from atebm_jax.models import wide_resnet

ROOT = Path(__file__).parents[1]
TINY = [
    "--model=10/1",
    "--batch_size=2",
    "--steps=2",
    "--repeats=1",
    "--dtype=float32",
    "--config.data.image_shape=(8, 8, 3)",
]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_both_sides_agree_and_the_record_is_complete(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch, the other side of the comparison, is not installed")
    path = tmp_path / "step.json"
    done = run("step.py", *TINY, f"--json={path}")
    assert done.returncode == 0, done.stderr
    assert "stage-2 step" in done.stdout and "median [quartiles]" in done.stdout
    record = json.loads(path.read_text())
    assert record["agreement"]["image_median"] < 1e-4
    assert record["agreement"]["params"] < 1e-3
    assert "peak_bytes" in record["sides"]["ours"]
    assert {"command", "machine", "flags", "model", "stage2"} < record.keys()
    for side in ("ours", "torch"):
        assert record["sides"][side]["versions"]
        for what in ("loop", "step"):
            times = record["sides"][side]["times"][what]
            assert len(times["wall_s"]) == len(times["cpu_s"]) == 1
            assert record["sides"][side]["compile_s"][what] >= 0
            assert {"q1", "median", "q3"} == record["summary"][what][side][
                "cpu_s"
            ].keys()
    assert record["summary"]["step"]["ratio"]["cpu_s"]["median"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("row", ["resnet50_t30", "convnext_tiny"])
def test_imagenet_networks_agree_with_their_twins(row, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch, the other side of the comparison, is not installed")
    path = tmp_path / "step.json"
    done = run(
        "step.py",
        f"--config=configs/imagenet256.py:{row}",
        "--image_size=32",
        "--batch_size=2",
        "--steps=2",
        "--repeats=1",
        "--dtype=float32",
        "--config.stage2.adversary.num_steps=1",
        "--peak",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["agreement"]["logits"] < 1e-5
    assert 0 < record["peak"]["share"] < 1


@pytest.mark.slow
def test_ways_to_write_the_step_are_compared(tmp_path):
    path = tmp_path / "choices.json"
    done = run("choices.py", *TINY, f"--json={path}")
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert set(record["step"]) == {"as it is", "apart", "remat", "unrolled"}
    assert set(record["layout"]) == {"NHWC", "NCHW"}
    assert "unrolled" in done.stdout and "NCHW" in done.stdout


def test_rows_with_a_record_are_not_run_again(tmp_path):
    times = {side: {"wall_s": {"median": 2.0}} for side in ("ours", "torch", "ratio")}
    card = {"device": "NVIDIA H100 80GB HBM3", "peak_bytes": 7 * 2**30}
    record = {
        "flags": {"batch_size": 64, "steps": 3},
        "model": {"dtype": "bfloat16"},
        "sides": {"ours": card},
        "stage2": {"adversary": {"num_steps": 2}},
        "summary": {"loop": times, "step": times},
        "peak": {"share": 0.5},
    }
    other = record | {"sides": {"ours": {"device": "cpu", "peak_bytes": None}}}
    (tmp_path / "resnet50.json").write_text(json.dumps(record))
    (tmp_path / "wrn34_10.json").write_text(json.dumps(other))
    done = run("gpu.py", f"--out={tmp_path}", "--rows=wrn34_10,resnet50")
    assert done.returncode == 0, done.stderr
    assert "step.py" not in done.stdout
    shown = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in done.stdout.splitlines()
        if len(cells := line.strip("│").split("│")) > 1
    }
    kept = json.loads((ROOT / "docs" / "targets.json").read_text())
    one_card = kept["imagenet256:resnet50_t30 h100:8 64"]
    step, inner, rest = one_card["seconds"].values()
    bounds = f"{64 / (3 * step):,.4g}", f"{64 / (rest + 2 * inner + 3 * step):,.4g}"
    measured = ["32", "32", "2.00"]
    assert shown["resnet50, loop"] == [*measured, "50 %", bounds[0], "", ""]
    needed = f"{one_card['memory_bytes']['peak'] / 2**30:.1f}"
    assert shown["resnet50, step"] == [*measured, "", bounds[1], "7.0", needed]
    assert shown["wrn34_10, step"] == [*measured, "", "", "", ""]


def test_measured_and_compiled_in_other_dtypes_are_not_put_side_by_side(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    record = {
        "sides": {"ours": {"device": "NVIDIA H100 80GB HBM3"}},
        "flags": {"batch_size": 128, "steps": 20},
    }
    for dtype, found in (("float32", True), ("bfloat16", False)):
        record["model"] = {"dtype": dtype}
        assert bool(gpu.compiled("wrn34_10", record)) == found


FLOAT64 = """
import sys
import jax, jax.numpy as jnp, numpy as np, torch
import torch_reference, torch_side
from atebm_jax import ascent, convert, energy, command_line, models
from atebm_jax.models import wide_resnet

torch.set_default_dtype(torch.float64)
torch_reference._pick = lambda logits, y: logits.gather(1, y[:, None])[:, 0]
config = command_line.load_config("configs/cifar10.py:small")
config.model.update(depth=16, widen_factor=2, dtype="float64")
config.stage2.t_max = 3
twin = torch_side._wide_resnet(config)
torch_side._estimate_statistics(twin, config)
state = {k: v.numpy() for k, v in twin.double().eval().state_dict().items()}
logits_fn = models.logits_fn(
    wide_resnet.build(config.model),
    jax.tree.map(jnp.asarray, convert.from_torch("wide_resnet", state)),
)
x, y = np.random.default_rng(0).random((4, 16, 16, 3)), np.arange(4)
theirs = torch_reference.Stage2(twin, config.stage2, twin).contrastive(
    torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y)
)
ours = ascent.climb(
    lambda x: energy.score(logits_fn(x), jnp.asarray(y)), jnp.asarray(x), num_steps=3,
    step_size=config.stage2.contrastive_step_size,
)
assert ours.dtype == jnp.float64
assert np.abs(ours - x).max() > 0.01
print(float(np.abs(ours - theirs.numpy().transpose(0, 2, 3, 1)).max()))
"""


def test_both_loops_are_the_same_function_in_float64():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch, the other side of the comparison, is not installed")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": str(ROOT / "benchmarks"),
    }
    done = subprocess.run(
        [sys.executable, "-c", FLOAT64],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-12


@pytest.mark.slow
def test_forms_of_operations_agree(tmp_path):
    path = tmp_path / "step.json"
    options = ("--compare=forms", "--cpu_devices=2", f"--json={path}")
    done = run("step.py", *TINY, *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert list(record["sides"]) == ["cpu", "xla"]
    assert record["agreement"]["image_median"] < 1e-4


@pytest.mark.slow
def test_both_sides_of_autoattack_go_equally_often_through_the_network(tmp_path):
    if importlib.util.find_spec("torchattacks") is None:
        pytest.skip("torchattacks, the other side of the comparison, is not installed")
    options = {"num_classes": 4, "mean": MEAN, "std": STD}
    network = wide_resnet.network(depth=10, widen_factor=1, **options)
    variables = reference.random_variables(network, (8, 8, 3))
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    labels = network.apply(variables, images).argmax(axis=-1)
    weights, arrays = tmp_path / "weights.npz", tmp_path / "images.npz"
    np.savez(weights, **convert.to_torch("wide_resnet", variables))
    np.savez(arrays, images=images, labels=labels)
    path = tmp_path / "autoattack.json"
    done = run(
        "autoattack.py",
        f"--weights={weights}",
        f"--images={arrays}",
        "--epsilon=1e-6",
        "--steps=2",
        "--queries=4",
        "--repeats=1",
        "--batch_size=4",
        "--count",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "cpu seconds without compilation" in done.stdout
    record = json.loads(path.read_text())
    for side in ("ours", "torch"):
        (made,) = record["runs"][side]
        assert made["cpu"] > 0 and set(made["parts"]) == set(made["robust"])
        assert set(made["robust"].values()) == {4}
        seen = record["passes"][side]
        # Three targets; APGD looks at its start too.
        assert seen["apgd-t"]["backward"] == 3 * (2 + 1) * 4
        assert seen["fab-t"]["backward"] == 3 * 2 * 4
        assert 4 * (4 + 1) <= seen["square"]["forward"] <= 4 * (4 + 3)
    assert record["runs"]["ours"][0]["compile_cpu"] > 0


def test_data_speed_has_a_row_for_each_worker_count_and_evaluation(tmp_path):
    path = tmp_path / "data.json"
    done = run(
        "data.py",
        "--config=configs/digits.py",
        "--workers=0",
        "--batch_size=32",
        "--images=64",
        "--repeats=1",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    speeds = json.loads(path.read_text())["images_per_second"]
    assert list(speeds) == ["train, 0 workers", "evaluation"]
    assert all(value > 0 for values in speeds.values() for value in values)


@pytest.mark.parametrize(
    ("script", "argument", "said"),
    [
        ("step.py", "--model=16x2", "DEPTH/WIDTH"),
        ("step.py", "--batch_size=0", "positive integer"),
        ("step.py", "--cpu_devices=5", "does not split evenly"),
        ("step.py", "--config=absent.py", "absent.py"),
        ("step.py", "--config.model.wideness=2", "wideness"),
        ("step.py", "--repeat", "--repeat"),
        ("targets.py", "--targets=v5e:2x4", "--json is missing"),
        ("targets.py", "--loops=resnet51", "wrn16_4"),
        ("gpu.py", "--rows=wrn", "--out"),
        ("data.py", "--workers=two", "--workers=two"),
        ("autoattack.py", "--num=0", "positive integer"),
        ("autoattack.py", "--repeats=1", "give either --workdir"),
        ("autoattack.py", "--workdir=absent", "absent"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    script, argument, said, monkeypatch, capsys
):
    # In this process: a mistake is found before any worker starts.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [script, argument])
    with pytest.raises(SystemExit) as exit_code:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    message = capsys.readouterr().err
    assert exit_code.value.code == 2
    assert message.startswith("error: ") and said in message
    assert message.count("\n") == 1


def test_table_of_targets_is_printed_from_what_is_kept(tmp_path):
    memory = {"needed": 2**33, "available": 2**34}
    at = {"images_per_second": 1234.5, "share_of_peak": 0.25}
    steps = {"T=0": at | {"hours_of_the_budget": 1.5}, "T=30": at}
    fitting = {"memory_bytes": memory, "fits": True, "step": steps}
    steps["T=30"] = at | {"hours_of_the_budget": 12.0}
    remedy = fitting | {"flags": "--config.model.remat=True"}
    small = {"T=30": {"images_per_second": 99.0}}
    by_libtpu = {"versions": {"jax": "1", "libtpu": "2"}}
    kept = {
        "imagenet256:resnet50_t30 v5e:2x4": fitting | {"remedies": [], **by_libtpu},
        "imagenet256:swin_b h100:8": {
            "memory_bytes": memory,
            "fits": False,
            "remedies": [remedy],
            "versions": {"jax": "1", "jax-cuda13-pjrt": "3"},
        },
        "cifar10:small v5e:2x4": {
            "memory_bytes": memory,
            "fits": False,
            "remedies": [],
        },
        "cifar10:small v5e:2x4 16": {"fits": True, "step": small, **by_libtpu},
        "cifar10:small v5e:2x4 128": {"fits": False},
    }
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(kept))
    done = run("targets.py", f"--json={path}", "--markdown")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    expected = "8.0 of 16.0 | 1,234 | 1,234 | 25% | 1.5 to 12 | *compiled* |"
    assert lines[0] == f"| `imagenet256:resnet50_t30` | v5e:2x4 | as it is | {expected}"
    assert lines[1].endswith(f"| `--config.model.remat=True` | {expected}")
    assert "does not fit" in lines[2]
    # Of entries without versions nothing is told; alike ones are told once.
    said = "Compiled with jax 1, libtpu 2; jax 1, jax-cuda13-pjrt 3."
    assert lines[3:] == ["", said]
    chips = run("targets.py", f"--json={path}", "--markdown", "--images_a_chip=16")
    line = "| `cifar10:small` | v5e | 99 | too large | *compiled* |"
    assert chips.stdout.splitlines()[2:] == [line, "", "Compiled with jax 1, libtpu 2."]


@pytest.mark.parametrize(
    ("flags", "page"),
    [([], "cost.md"), (["--images_a_chip=2,8,16,64,128"], "launch.md")],
)
def test_tables_in_the_docs_are_of_what_is_kept(flags, page):
    done = run("targets.py", "--json=docs/targets.json", "--markdown", *flags)
    assert done.returncode == 0 and done.stdout in (ROOT / "docs" / page).read_text()


def test_rows_that_differ_in_their_curriculum_alone_are_compiled_once(tmp_path):
    kept = json.loads((ROOT / "docs" / "targets.json").read_text())
    one, other = (f"cifar10:wrn34_10_{t} h100:8" for t in ("t50", "t40"))
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({one: kept[one]}))
    row, target = other.split()
    done = run("targets.py", f"--json={path}", f"--rows={row}", f"--targets={target}")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())[other]
    # The page's figures of both rows are of a compilation each.
    assert kept[one]["step"] != kept[other]["step"]
    for moment, figures in kept[other]["step"].items():
        assert found["step"][moment] == pytest.approx(figures, rel=1e-9)
    assert found["memory_bytes"] == kept[other]["memory_bytes"]
    assert found["compiled_as"] == one


@pytest.mark.parametrize("held", ["{", "[]"])
def test_damaged_records_are_told_in_one_sentence(held, tmp_path):
    for name in ("targets.json", "resnet50.json"):
        (tmp_path / name).write_text(held)
    for script, *arguments in (
        ("targets.py", f"--json={tmp_path / 'targets.json'}", "--markdown"),
        ("gpu.py", f"--out={tmp_path}", "--rows=resnet50"),
    ):
        done = run(script, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert str(tmp_path) in done.stderr and "to begin anew" in done.stderr


def test_targets_needs_a_file_and_rows_that_are_there(tmp_path):
    done = run("targets.py")
    assert done.returncode == 2 and "--json is missing" in done.stderr
    done = run("targets.py", f"--json={tmp_path / 'a'}", "--rows=cifar10:smll")
    assert done.returncode == 2 and "cifar10:small" in done.stderr
    # A row that compares methods on a CPU is none for targets.
    done = run("targets.py", f"--json={tmp_path / 'a'}", "--rows=cifar10:jem")
    assert done.returncode == 2 and "--rows" in done.stderr

"""Weak scaling in the compiled program, and the arithmetic of the estimate."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scaling

sys.path.pop(0)


def test_work_and_bytes_of_a_device_do_not_grow_with_the_devices():
    two, eight = scaling.measure("data:-1", 2, (2, 8))
    # Only the AUC's ranking of the whole batch grows.
    for name in ("MFLOP a device", "state and batch, KiB a device"):
        assert eight[name] == pytest.approx(two[name], rel=0.01)
    assert eight["communicated, KiB"] == pytest.approx(
        two["communicated, KiB"], rel=0.01
    )


def test_ring_sends_nearly_twice_the_gradient():
    cluster = scaling.Cluster(devices=4, peak=1e12, link=1e9)
    # 2 * 3/4 * 4 bytes * 1e6 parameters at 1e9 bytes a second.
    assert scaling.all_reduce_seconds(1_000_000, cluster) == pytest.approx(6e-3)


def test_smallest_batch_leaves_the_share_to_arithmetic():
    cluster = scaling.Cluster(devices=4, peak=1e12, link=1e9)
    # 9 * 6 ms of 0.4e12 FLOP/s are 21.6 GFLOP, eleven images of 2 GFLOP.
    assert scaling.smallest_batch(2e9, 1_000_000, cluster) == 11


def test_communication_is_read_from_the_program():
    text = (
        "  %a = (f32[3,4]{1,0}, f32[5]{0}) all-reduce(%x, %y), to_apply=%add\n"
        "  %b = bf16[8]{0} all-gather-start(%z)\n  %c = f32[100] add(%x, %y)\n"
    )
    assert scaling.communicated(text) == 4 * 12 + 4 * 5 + 2 * 8

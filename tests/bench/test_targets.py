"""The committed targets are those of the project, and mistakes in the file are reported."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from apt.bench.gate import Run, check_budget
from apt.bench.kernels import OpCase, cases_of
from apt.bench.machine import describe_machine
from apt.bench.ops import OPS
from apt.bench.records import Measurement
from apt.bench.shapes import SHAPES
from apt.bench.targets import read_targets
from apt.errors import ConfigError
from apt.kernels.roofline import Rates

H100 = replace(describe_machine(torch.device("cpu")), device="NVIDIA H100 80GB HBM3", kind="cuda")
TARGETS = Path(__file__).resolve().parents[2] / "benchmarks" / "targets.toml"


def test_the_committed_targets():
    targets = read_targets(TARGETS)
    by_name = {budget.name: budget for budget in targets.budgets}
    bounds = {name: budget.at_least or budget.at_most for name, budget in by_name.items()}
    assert bounds == {
        "modulated norms forward at 720p: 90 % of the copy bandwidth": 0.90,
        "norms with rotation forward at 720p: 85 % of the copy bandwidth": 0.85,
        "norms backward at 720p: 80 % of the copy bandwidth": 0.80,
        "fused_rmsprop at 720p: 90 % of the copy bandwidth": 0.90,
        "query_pooling forward at 720p: 30 % of the copy bandwidth": 0.30,
        "query_pooling backward at 720p: 33 % of the copy bandwidth": 0.33,
        "never slower than torch.compile": 1.02,
        "apt_8b at 720p in 2.3 s with cuDNN attention": 2300.0,
        "apt_8b at 720p in real time": 2041.7,
    }
    assert not by_name["apt_8b at 720p in real time"].enforced
    assert set(targets.policies) == {"cuda", "cpu"}
    for budget in targets.budgets:
        assert all("H100" in name or "H200" in name for name in budget.devices)


def shares(op: str, direction: str) -> list[float]:
    """The shares that the committed budgets require of an op at 720p."""
    case = {"op": op, "shape": "720p", "direction": direction, "variant": "triton"}
    case |= {"topic": "kernels", "dtype": "float32" if op == "fused_rmsprop" else "bfloat16"}
    return [
        budget.at_least
        for budget in read_targets(TARGETS).budgets
        if budget.metric == "share_of_copy"
        and all(fnmatch(case[key], pattern) for key, pattern in budget.where.items())
        and budget.at_least is not None
    ]


def test_an_op_is_held_to_what_is_predicted_of_it():
    """The predictions are those of NOTES.md: neither can change alone."""
    row = r"^\| `(\w+)` v1[^|]*\| (forward|backward|step) \| [\d.]+ \| (\d+) %"
    notes = TARGETS.with_name("NOTES.md").read_text(encoding="utf-8")
    predicted = {
        (op, "forward" if way == "step" else way): int(percent) / 100
        for op, way, percent in re.findall(row, notes, re.MULTILINE)
    }
    assert len(predicted) == 13
    for (op, direction), share in predicted.items():
        assert shares(op, direction) == [share], (op, direction)


def judged(case: OpCase) -> str:
    """The verdict of "never slower than torch.compile" on a kernel of ours that takes 1.5 times as
    long, on a machine as fast as an H100."""
    rates = Rates(matmul_tflops=798, memory_gb_s=3000)
    floor = 1e3 * rates.seconds(case.op.cost(case.shape, case.dtype, case.direction == "backward"))
    (budget,) = [b for b in read_targets(TARGETS).budgets if b.launch_bound_ms is not None]
    slow, peer = (
        Run(
            machine=H100,
            topic="kernels",
            measurement=Measurement(
                case=case.key(variant), samples_ms=(time,), metrics={"floor_ms": floor}
            ),
        )
        for variant, time in (("triton", 1.5), ("compile", 1.0))
    )
    verdict = check_budget(budget, slow, [slow, peer])
    assert verdict is not None
    return verdict.outcome


def test_launch_bound_shapes_are_exempt_and_large_ones_are_not():
    for name in ("modulated_norm", "residual_modulated_norm", "qk_norm_rope"):
        for shape, outcome in (("digits", "not judged"), ("480p", "failed"), ("720p", "failed")):
            for case in cases_of(OPS[name], SHAPES[shape]):
                assert judged(case) == outcome, case
    assert judged(cases_of(OPS["modulated_norm"], SHAPES["1024px"])[0]) == "not judged"


GOOD = """
[devices]
fast = ["X*"]
[regression.cpu]
percent = 5.0
floor_ms = 1.0
[[budget]]
name = "b"
devices = "fast"
where = { op = "*" }
metric = "median_ms"
at_most = 1.0
"""


def test_a_small_file(tmp_path):
    path = tmp_path / "targets.toml"
    path.write_text(GOOD)
    (budget,) = read_targets(path).budgets
    assert budget.devices == ("X*",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("at_most = 1.0", "at_mots = 1.0", "at_mots"),
        ('devices = "fast"', 'devices = "slow"', "slow"),
        ("[devices]", "[device]", "unknown tables: device"),
        ("percent = 5.0", "percent = -5.0", "percent > 0"),
        ("percent = 5.0", "", "percent"),
        ("[[budget]]", "[[budget]", "not a file of targets"),
    ],
)
def test_mistakes(tmp_path, old, new, message):
    path = tmp_path / "targets.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_targets(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="not a file of targets"):
        read_targets(tmp_path / "targets.toml")

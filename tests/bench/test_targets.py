"""The committed targets are those of the project, and a mistake in the file is told."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from apt.bench.ops import OPS
from apt.bench.targets import read_targets
from apt.errors import ConfigError

TARGETS = Path(__file__).resolve().parents[2] / "benchmarks" / "targets.toml"


def test_the_committed_targets():
    targets = read_targets(TARGETS)
    by_name = {budget.name: budget for budget in targets.budgets}
    bounds = {name: budget.at_least or budget.at_most for name, budget in by_name.items()}
    assert bounds == {
        "ops forward at 720p: 90 % of the copy bandwidth": 0.90,
        "ops backward at 720p: 80 % of the copy bandwidth": 0.80,
        "never slower than torch.compile": 1.02,
        "apt_8b at 720p in 2.3 s with cuDNN attention": 2300.0,
        "apt_8b at 720p in real time": 2041.7,
    }
    assert not by_name["apt_8b at 720p in real time"].enforced
    forward = "ops forward at 720p: 90 % of the copy bandwidth"
    assert set(targets.policies) == {"cuda", "cpu"}
    fused = {name for name in OPS if fnmatch(name, by_name[forward].where["op"])}
    assert fused == {
        "modulated_norm", "residual_modulated_norm",
        "norm_rope", "qk_norm_rope", "joint_qk_norm_rope",
    }  # fmt: skip
    for budget in targets.budgets:
        assert all("H100" in name or "H200" in name for name in budget.devices)


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
        ("[[budget]]", "[[budget]", "no file of targets"),
    ],
)
def test_mistakes(tmp_path, old, new, message):
    path = tmp_path / "targets.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_targets(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no file of targets"):
        read_targets(tmp_path / "targets.toml")

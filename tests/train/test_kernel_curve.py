"""Training on the fused kernels is training on the references: all three stages, in fp32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt.train.logs import read_log

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TINY = (
    "--num-updates", "3", "--batch-size", "2", "--sample-every", "0", "--device", "cpu",
    "--precision", "fp32", "--model.options", "hidden_size", "24", "depth", "2", "num_heads", "2",
    "--optimizer.name", "rmsprop", "--optimizer.eps", "1e-3", "--optimizer.decay-updates", "0",
    "--snapshot-at",
)  # fmt: skip
KERNELS = (
    "norm_kernels.forward_kernel", "norm_kernels.backward_kernel", "rope_kernels.forward_kernel",
    "rope_kernels.backward_kernel", "fused_rmsprop.rmsprop_kernel",
    "perturbed_batch.perturb_kernel", "sample_shifted_timesteps.timesteps_kernel",
    "query_pooling.scores_kernel", "query_pooling.weighted_sum_kernel",
    "query_pooling.tokens_backward_kernel",
)  # fmt: skip
# Reports at the end what ran: the test would also pass if nothing used the interpreter.
COMMAND = """
import sys
from apt.__main__ import main
code = main(sys.argv[1:])
import triton.runtime.interpreter as interpreter
print("launched", sorted(launched))
sys.exit(code)
"""
COUNT = """
launched = set()
import triton.runtime.interpreter as interpreter
original = interpreter.GridExecutor.__call__
def counted(self, *args, **kwargs):
    file = self.fn.__module__.rpartition(".")[2]  # names alone are not unique
    launched.add(f"{file}.{self.fn.__name__}")
    return original(self, *args, **kwargs)
interpreter.GridExecutor.__call__ = counted
"""


def train(folder: Path, **env: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            COUNT + COMMAND,
            "train",
            "digits_pixels",
            "--run-dir",
            folder,
            *TINY,
        ],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_three_stages_on_kernels_and_on_references(tmp_path: Path) -> None:
    fused = train(tmp_path / "fused", TRITON_INTERPRET="1", APT_KERNEL_BACKEND="triton")
    plain = train(tmp_path / "plain", APT_KERNEL_BACKEND="reference")
    assert "launched []" in plain
    for kernel in KERNELS:
        assert f"'{kernel}'" in fused, (kernel, fused)
    for stage in ("pretrain", "distill", "apt"):
        ours, theirs = (read_log(tmp_path / name / stage) for name in ("fused", "plain"))
        assert [entry["step"] for entry in ours] == [1, 2, 3]
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                if name != "seconds_per_update":
                    # Some begin near zero, as the student begins as the teacher
                    assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-7), (stage, name)

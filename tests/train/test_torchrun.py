"""The command line under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from apt.hub import read_info
from apt.train.logs import read_log

ROOT = Path(__file__).parents[2]
TINY = (
    "--num-updates", "2", "--batch-size", "2", "--sample-every", "2", "--device", "cpu",
    "--model.options", "hidden_size", "24", "depth", "2", "num_heads", "2",
)  # fmt: skip


def test_three_stages_in_a_row_with_two_ranks(tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "apt", "train", "digits", "--run-dir", str(tmp_path / "run"), *TINY]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=tmp_path,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in ("pretrain", "distill", "apt"):
        run_dir = tmp_path / "run" / stage
        assert [entry["step"] for entry in read_log(run_dir)] == [1, 2]
        assert read_info(run_dir / "export").training["updates"] == 2
        shards = (run_dir / "checkpoints" / "step_00000002").glob("*.safetensors")
        assert len({shard.name.split("-model-")[0] for shard in shards}) == 2
    assert read_info(tmp_path / "run" / "apt" / "export").stage == "apt"

"""Two agents of torchrun on one machine, as two nodes: a rank hangs, then a node is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from apt.checkpoints.info import read_info
from apt.train.logs import read_log
from tests.train.test_torchrun import ROOT, TINY
from tests.waiting import wait_until

UPDATES = 5
# Rank 1 hangs in one update for good, and when it reaches the next, it takes its node down.
NODE = """
import os, signal, sys, threading
from pathlib import Path
from apt.methods.flow_matching import FlowMatchingPretraining

original = FlowMatchingPretraining.generator_step

def faulty(self, batches, update):
    if os.environ["RANK"] == "1" and update == 2 and not Path("hung").exists():
        Path("hung").touch()
        threading.Event().wait()
    if os.environ["RANK"] == "1" and update == 3 and not Path("gone").exists():
        Path("gone").touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batches, update)

FlowMatchingPretraining.generator_step = faulty
from apt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def node(folder: Path, name: str, port: int) -> subprocess.Popen[bytes]:
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two-nodes",
        "--rdzv-conf=last_call_timeout=90,join_timeout=1200", "--max-restarts=4",
        "--local-addr=127.0.0.1",
    ]  # fmt: skip
    command = [
        "node.py", "train", "digits_pixels_pretrain", "--run-dir", "run", *TINY,
        "--num-updates", str(UPDATES), "--sample-every", "0", "--checkpoint-every", "1",
        "--keep-checkpoints", "9", "--timeout-minutes", "1",
    ]  # fmt: skip
    with (folder / name).open("wb") as output:
        return subprocess.Popen(
            [*launcher, *command],
            cwd=folder,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def is_open(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_hung_rank_is_named_and_the_run_continues_without_a_lost_node(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = node(tmp_path, "first", port)
    wait_until(partial(is_open, port))  # it is the one that has the store, and must not be lost
    second = node(tmp_path, "second", port)
    assert second.wait(timeout=3600) == -9
    assert first.wait(timeout=3600) == 0, (tmp_path / "first").read_text()[-4000:]
    said = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert "error: rank 1 keeps the others waiting: it is in wait (threading.py:" in said
    assert "of faulty (node.py:" in said and "update 3, generator" in said
    run = tmp_path / "run"
    assert [entry["step"] for entry in read_log(run)] == list(range(1, UPDATES + 1))
    assert read_info(run / "export").training["updates"] == UPDATES
    ranks = [
        len({file.name.split("-model-")[0] for file in path.glob("*.safetensors")})
        for path in sorted((run / "checkpoints").iterdir())
    ]
    assert ranks[:2] == [2, 2] and ranks[-1] == 1  # resumed with fewer nodes

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_main


def heard_by_the_survivor(folder: Path, *faults: str) -> dict[str, str]:
    lost, said = folder / "lost", folder / "said"
    lost.mkdir(), said.mkdir()
    done = run_main("tests.distributed.lost_ranks", lost, list(faults), folder=said)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_a_lost_rank_is_named_with_where_it_was_and_what_the_others_wait_in(tmp_path: Path) -> None:
    heard = heard_by_the_survivor(tmp_path, "hangs", "stopped", "dies")
    hung = heard["hangs"]
    assert "rank 1 keeps the others waiting: it is in wait (" in hung, heard
    assert "at step 2" in hung and "rank 0: in all_reduce, at step 1" in hung
    # By the flight recorder: rank 0 has begun one more.
    begun = [(name, int(n)) for name, n in re.findall(r"(\w+) (\d+) of default_pg", hung)]
    assert len(begun) == 2 and begun[1][1] == begun[0][1] + 1, hung
    for fault in ("stopped", "dies"):
        assert "rank 1 is dead, stopped or out of reach: last seen in " in heard[fault], heard
        assert "at step 2" in heard[fault] and "rank 0: in all_reduce" in heard[fault]


@pytest.mark.multigpu
def test_nccl_writes_down_what_each_rank_did_last(tmp_path: Path) -> None:
    heard_by_the_survivor(tmp_path, "hangs_in_nccl")
    dumps = tmp_path / "lost" / "collectives"
    assert (dumps / "rank_0").stat().st_size
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(dumps)]
    options = ["-p", "rank_", "--allow-incomplete-ranks", "-j"]
    read = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert "all_reduce" in read.stdout + read.stderr

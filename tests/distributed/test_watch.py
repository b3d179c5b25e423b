from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_lost_rank_is_named_with_where_it_was_and_what_the_others_wait_in(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.lost_ranks", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    heard = json.loads(done.stdout)
    hung = heard["hangs"]
    assert "rank 1 keeps the others waiting: it is in wait (" in hung, heard
    assert "at step 2" in hung and "rank 0: in all_reduce, at step 1" in hung
    for fault in ("stopped", "dies"):
        assert "rank 1 is dead, stopped or out of reach: last seen in " in heard[fault], heard
        assert "at step 2" in heard[fault] and "rank 0: in all_reduce" in heard[fault]

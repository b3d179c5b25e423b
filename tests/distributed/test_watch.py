from __future__ import annotations

import json
from pathlib import Path

from tests.processes import run_main


def test_a_lost_rank_is_named_with_where_it_was_and_what_the_others_wait_in(tmp_path: Path) -> None:
    lost, said = tmp_path / "lost", tmp_path / "said"
    lost.mkdir(), said.mkdir()
    done = run_main("tests.distributed.lost_ranks", lost, folder=said)
    heard = json.loads(done.stdout)
    hung = heard["hangs"]
    assert "rank 1 keeps the others waiting: it is in wait (" in hung, heard
    assert "at step 2" in hung and "rank 0: in all_reduce, at step 1" in hung
    for fault in ("stopped", "dies"):
        assert "rank 1 is dead, stopped or out of reach: last seen in " in heard[fault], heard
        assert "at step 2" in heard[fault] and "rank 0: in all_reduce" in heard[fault]

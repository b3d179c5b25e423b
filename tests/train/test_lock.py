from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apt.train.lock import AGE_LIMIT, LOCK_NAME, FolderInUse, RunLock
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from apt.train.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()  # for ever
"""


def change(folder: Path, **content: Any) -> None:
    """Make the lock in `folder` another process's."""
    path = folder / LOCK_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another", **content}))


def grow_old(folder: Path, seconds: float) -> None:
    stat = (folder / LOCK_NAME).stat()
    os.utime(folder / LOCK_NAME, (stat.st_atime, stat.st_mtime - seconds))


def test_a_folder_is_one_runs_and_then_free(tmp_path: Path):
    folder = tmp_path / "new" / "run"
    with RunLock(folder) as lock:
        with (
            pytest.raises(FolderInUse) as refused,
            RunLock(folder),
        ):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert "--take-over" in str(refused.value)
        lock.check()
        assert os.listdir(folder) == [LOCK_NAME]
    assert os.listdir(tmp_path) == []  # nothing was written, so nothing stays
    with RunLock(tmp_path):
        (tmp_path / "log").touch()
    assert os.listdir(tmp_path) == ["log"]


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"process {other.pid} "), RunLock(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_NAME).exists()
    with RunLock(tmp_path) as lock:
        lock.check()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        {"host": "far", "machine": ["another boot"]},
        {"machine": ["another boot"], "pid": 2**22 - 1},  # its number says nothing here
    ],
)
def test_a_lock_of_another_machine_is_judged_by_its_age(tmp_path: Path, content: dict[str, Any]):
    with RunLock(tmp_path):
        change(tmp_path, **content)
        grow_old(tmp_path, AGE_LIMIT / 2)
        with pytest.raises(FolderInUse), RunLock(tmp_path):
            pass
        grow_old(tmp_path, AGE_LIMIT)
        with RunLock(tmp_path) as taken:
            taken.check()


def test_a_process_that_reuses_a_dead_ones_id_is_not_the_owner(tmp_path: Path):
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell when a process was started")
    with RunLock(tmp_path):
        change(tmp_path, started="1")
        with RunLock(tmp_path) as taken:
            taken.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 3}'])
def test_a_damaged_lock_is_a_lock_until_it_is_old(tmp_path: Path, content: str):
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(FolderInUse, match="another process"), RunLock(tmp_path):
        pass
    grow_old(tmp_path, 2 * AGE_LIMIT)
    with RunLock(tmp_path) as taken:
        taken.check()


def test_a_run_that_lost_its_lock_notices_and_leaves_the_new_one(tmp_path: Path):
    with RunLock(tmp_path, heartbeat=0.005) as first:
        assert not first.lost
        with RunLock(tmp_path, take_over=True) as second:
            wait_until(lambda: first.lost)
            with pytest.raises(FolderInUse, match="has taken over"):
                first.check()
            first.__exit__()
            second.check()
            assert (tmp_path / LOCK_NAME).exists()


def test_signs_of_life(tmp_path: Path):
    with RunLock(tmp_path, heartbeat=0.005):
        grow_old(tmp_path, 1000.0)
        old = (tmp_path / LOCK_NAME).stat().st_mtime
        wait_until(lambda: (tmp_path / LOCK_NAME).stat().st_mtime > old + 500)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), RunLock(tmp_path / "file" / "run"):
        pass
    with pytest.raises(FileExistsError), RunLock(tmp_path / "file"):
        pass

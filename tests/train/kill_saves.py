"""Kills processes that save checkpoints, before each change that they make on disk.

test_checkpoint.py runs it. One process that forks, so that torch is imported once for many kills.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import torch

from apt.train import checkpoint
from tests.train.deaths import die_before


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "net": {f"layer{i}": torch.randn(16, 16, generator=generator) for i in range(4)},
        "step": step,
    }


def save_and_prune(root: Path, step: int) -> None:
    """Twice, so that it also replaces its own."""
    for _ in range(2):
        checkpoint.save(root, step, state(step), {"step": step})
        checkpoint.prune(root, keep=2, always={1})


def child(root: Path, step: int, change: int) -> None:
    """Save, and die before the change with this number, counted from 0."""
    numbers = count()
    try:
        die_before(lambda event, path: next(numbers) == change)
        save_and_prune(root, step)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


HALF = 3000  # bytes of a file that is larger


def die_in_the_bytes(root: Path, step: int) -> None:
    """Let the kernel end the process as soon as a file exceeds a number of bytes."""
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))
        save_and_prune(root, step)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def check_death_in_the_bytes(root: Path, last: int) -> None:
    """Assert that a tensor file is partial, and the previous checkpoint is the newest one."""
    pid = os.fork()
    if pid == 0:
        die_in_the_bytes(root, last + 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGXFSZ
    sizes = [file.stat().st_size for file in root.glob(".tmp-*/*.safetensors")]
    assert sizes == [HALF], sizes
    newest = checkpoint.latest(root)
    assert newest is not None and checkpoint.step_of(newest) == last
    save_and_prune(root, last + 1)
    assert not list(root.glob(".tmp-*"))


def main(root: Path) -> None:
    warnings.simplefilter("error")  # `latest` must never have anything to skip
    for step in (1, 2, 3):
        save_and_prune(root, step)
    save_and_prune(root.with_name(f"{root.name}_bytes"), 1)
    check_death_in_the_bytes(root.with_name(f"{root.name}_bytes"), 1)
    step, left = 3, []
    for change in count():
        pid = os.fork()
        if pid == 0:
            child(root, step + 1, change)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        left += [entry.name for entry in root.iterdir() if entry.name[0] == "."]
        left += [entry.name for entry in root.glob("*.old")]
        newest = checkpoint.latest(root)
        assert newest is not None
        found = state(0)
        meta = checkpoint.load(newest, found)
        assert found["step"] == checkpoint.step_of(newest) == meta["step"] in (step, step + 1)
        step = found["step"]
        for name, tensor in state(step)["net"].items():
            assert torch.equal(found["net"][name], tensor), name
        if code == 0:
            break
    kinds = sorted({"old" if name.endswith(".old") else "temporary" for name in left})
    listing = sorted(os.listdir(root))
    print(json.dumps({"kills": change, "left": kinds, "listing": listing, "last": step}))

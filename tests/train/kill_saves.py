"""Kills processes that save checkpoints, at random moments; test_checkpoint.py runs it.

One process that forks, so that torch is imported once for many kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from apt.train import checkpoint

KILLS = 25


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "net": {f"layer{i}": torch.randn(64, 64, generator=generator) for i in range(12)},
        "step": step,
    }


def save_for_ever(root: Path, first: int, ready: int) -> None:
    step = first
    while True:
        checkpoint.save(root, step, state(step), {"step": step})
        if step % 3 == 0:
            checkpoint.save(root, step, state(step), {"step": step})  # replaces its own
        checkpoint.prune(root, keep=2, always={4})
        if step == first:
            os.write(ready, b".")
        step += 1


def main(root: Path) -> None:
    warnings.simplefilter("error")  # `latest` must never have anything to skip
    moments = random.Random(0)
    interrupted, step = 0, 0
    for _ in range(KILLS):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(root, step + 1, writer)
        os.read(reader, 1)
        time.sleep(moments.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        interrupted += any(entry.name.startswith(".tmp") for entry in root.iterdir())
        newest = checkpoint.latest(root)
        assert newest is not None
        found = state(0)
        meta = checkpoint.load(newest, found)
        assert found["step"] == checkpoint.step_of(newest) == meta["step"] > step
        step = found["step"]
        for name, tensor in state(step)["net"].items():
            assert torch.equal(found["net"][name], tensor), name
    checkpoint.save(root, step + 1, state(step + 1), {})
    checkpoint.prune(root, keep=2, always={4})
    print(json.dumps({"interrupted": interrupted, "left": sorted(os.listdir(root)), "last": step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

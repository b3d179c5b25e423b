"""Commands whose work several ranks share, under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.shell import invoke

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def torchrun(ranks: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return subprocess.run(
        [sys.executable, *launcher, "-m", "apt", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3600,
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def test_ranks_generate_what_one_process_does(tmp_path: Path) -> None:
    asked = (
        "generate", "--prompt", "a red seven moving left", "a blue one moving up",
        "--device", "cpu", "--num-steps", "2", "--scale", "1",
    )  # fmt: skip
    alone = invoke(*asked, "--out", tmp_path / "alone.png")
    assert alone.returncode == 0, alone.stderr
    for ranks in (2, 3):  # three ranks and the 4 heads of the digits: rows of one
        done = torchrun(ranks, *asked, "--out", tmp_path / f"{ranks}.png")
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("seed 0") == 2
        for prompt in ("prompt0", "prompt1"):
            found = pixels(tmp_path / f"{ranks}-{prompt}.png")
            expected = pixels(tmp_path / f"alone-{prompt}.png")
            assert np.abs(found - expected).max() <= 1
            assert (found != expected).mean() < 1e-3
    again = torchrun(2, *asked, "--out", tmp_path / "2.png", "--resume")
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout == "2 of 2 files exist already\n"


def test_ranks_encode_the_files_that_one_process_does(tmp_path: Path) -> None:
    made = invoke("data", "digits", tmp_path / "clips", "--num", "130")
    assert made.returncode == 0, made.stderr
    asked = ("data", "encode", tmp_path / "clips")
    options = ("--model", "digits", "--device", "cpu", "--batch-size", "8")
    alone = invoke(*asked, tmp_path / "alone", *options)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(2, *asked, tmp_path / "shared", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == alone.stdout.replace(str(tmp_path / "alone"), str(tmp_path / "shared"))
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len([name for name in files if name.startswith("latents-")]) == 3
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == files
    for name in files:
        found, expected = (tmp_path / kind / name for kind in ("shared", "alone"))
        assert found.read_bytes() == expected.read_bytes(), name


def test_ranks_hold_and_send_what_is_planned_for_copies_of_shards(tmp_path: Path) -> None:
    done = torchrun(
        4, "plan", "digits_apt", "--gpus", "4", "--parallel.replicate", "2", "--compare",
        "--stage.generator", "digits", "--stage.discriminator", "digits-diffusion",
        "--device", "cpu", "--batch-size", "8", "--micro-batch-size", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    memory, sent = (
        [x.split() for x in part.splitlines()[1:]] for part in done.stdout.split("\n\n")
    )
    assert [row[0] for row in memory] == ["discriminator", "generator"]
    for row in memory:
        assert float(row[1]) == pytest.approx(float(row[2]), rel=0.05)
    assert {" ".join(row[:3]) for row in sent} >= {
        "all-gather of 2", "reduce-scatter of 2", "all-reduce of 2",
    }  # fmt: skip
    for *_, planned, counted, sent_by_plan, sent_here in sent:
        assert (planned, sent_by_plan) == (counted, sent_here)

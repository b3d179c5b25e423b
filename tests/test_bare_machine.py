"""A checkout on a machine that lacks the packages of the command line, of media and of the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt.train.logs import read_log
from tests.test_imports import BLOCK

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "accelerate", "av", "diffusers", "huggingface_hub", "liger_kernel", "matplotlib", "peft",
    "pytest_benchmark", "rich", "sentencepiece", "tensorboard", "torchmetrics", "transformers",
    "tyro",
)  # fmt: skip

TRAIN = """
import dataclasses, os
from apt.train.recipes import RECIPES
from apt.train.sequence import move_runs
from apt.train.trainer import run

TINY = {"hidden_size": 24, "depth": 2, "num_heads": 2}
pretrain, *others = RECIPES.get("digits_pixels")()
stages = (
    dataclasses.replace(pretrain, stage=dataclasses.replace(pretrain.stage, num_steps=2)), *others
)
changed = [
    dataclasses.replace(
        config, num_updates=2, batch_size=2, sample_every=2, snapshot_at=(), precision="fp32",
        device="cpu",
        optimizer=dataclasses.replace(config.optimizer, decay_updates=0),
        model=dataclasses.replace(config.model, options=TINY),
        sample_prompts=config.sample_prompts[:1],
    )
    for config in stages
]
root = os.environ["RUNS"]
for config in move_runs([dataclasses.replace(c, run_dir=root) for c in changed], before=stages):
    run(config)
"""

COLLECT = """
import os, sys, pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]))
"""


def python(code: str, *, blocked: tuple[str, ...] = ABSENT, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code, *blocked],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_all_stages_train_and_say_what_they_do_without(tmp_path: Path) -> None:
    said = python(TRAIN, RUNS=str(tmp_path))
    for stage in ("pretrain", "distill", "apt"):
        assert [entry["step"] for entry in read_log(tmp_path / stage)] == [1, 2]
        assert (tmp_path / stage / "samples" / "00000002.png").is_file()
        assert (tmp_path / stage / "export" / "apt.json").is_file()
        assert not (tmp_path / stage / "losses.png").exists()
        assert not (tmp_path / stage / "tensorboard").exists()
    assert said.count("no TensorBoard files (") == said.count("no losses.png (") == 3
    assert "pip install tensorboard" in said and "pip install matplotlib" in said


@pytest.mark.slow
def test_the_gpu_tests_are_collected_as_everywhere() -> None:
    def collected(output: str) -> set[str]:
        return {line for line in output.splitlines() if "::" in line}

    here = collected(python(COLLECT, blocked=()))
    assert len(here) > 100
    assert collected(python(COLLECT)) == here

"""The command line under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.checkpoints.info import read_info
from apt.data.digits import FPS, MovingDigits
from apt.data.write import write_video_folder
from apt.train.logs import read_log

ROOT = Path(__file__).parents[2]
TINY = (
    "--num-updates", "2", "--batch-size", "2", "--sample-every", "2", "--device", "cpu",
    "--optimizer.decay-updates", "0",
    "--model.options", "hidden_size", "24", "depth", "2", "num_heads", "2",
)  # fmt: skip


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# A run in which one thing fails on rank 1.
FAULTY = """
import os, sys
from apt.data.digits import MovingDigits
from apt.errors import DataError
from apt.methods.flow_matching import FlowMatchingPretraining

def fail(owner, name, number, error):
    original, calls = getattr(owner, name), []
    def faulty(*arguments):
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == number:
            raise error
        return original(*arguments)
    setattr(owner, name, faulty)

if sys.argv[1] == "data":
    fail(MovingDigits, "__getitem__", 2, DataError("some.mp4 is broken"))
if sys.argv[1] == "compute":
    fail(FlowMatchingPretraining, "generator_step", 2, MemoryError("no memory on rank 1"))
from apt.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def launch(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *LAUNCHER, *command],
        cwd=folder,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options", "message", "saved"),
    [
        ("", ["--device", "cuda"], "error: device 'cuda' was requested", False),
        ("", ["--run-dir", "script.py"], "error: script.py: File exists", False),
        ("data", [], "error: some.mp4 is broken", True),
        ("compute", [], "error: out of memory: no memory on rank 1", False),
    ],
)
def test_an_error_is_told_once(
    tmp_path: Path, fault: str, options: list[str], message: str, saved: bool
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "script.py").write_text(FAULTY)
    train = [
        "script.py",
        fault,
        "train",
        "digits_pixels_pretrain",
        "--run-dir",
        "run",
        *TINY,
        *options,
    ]
    done = launch(tmp_path, *train)
    assert done.returncode != 0
    assert len([x for x in done.stderr.splitlines() if x.startswith(message)]) == 1, done.stderr
    assert "ChildFailedError" in done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own, of the launch that failed
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir() is saved
    if saved:
        again = launch(tmp_path, "-m", "apt", *train[2:], "--resume")
        assert again.returncode == 0, again.stderr
        assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2]


def test_three_stages_in_a_row_with_two_ranks(tmp_path: Path):
    command = ["-m", "apt", "train", "digits_pixels", "--run-dir", str(tmp_path / "run"), *TINY]
    done = launch(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in ("pretrain", "distill", "apt"):
        run_dir = tmp_path / "run" / stage
        assert [entry["step"] for entry in read_log(run_dir)] == [1, 2]
        for line in (run_dir / "speed.jsonl").read_text().splitlines():
            timing = json.loads(line)
            assert {timing["speed/slowest_rank"], timing["speed/slowest_computing_rank"]} <= {0, 1}
            assert timing["speed/probe_ratio"] >= 1
        assert read_info(run_dir / "export").training["updates"] == 2
        shards = (run_dir / "checkpoints" / "step_00000002").glob("*.safetensors")
        assert len({shard.name.split("-model-")[0] for shard in shards}) == 2
    assert read_info(tmp_path / "run" / "apt" / "export").stage == "apt"


# Objects in place of names, and clips that are held out: an odd number of them for two ranks.
OBJECTS = """
import sys
import torch
import apt.train
from apt.methods import PretrainConfig
from apt.train.config import HeldoutConfig, ModelConfig, TrainConfig
from tests.train.own_classes import Bars, Mixer, MixerConfig, Words, WordsConfig

torch.manual_seed(0)
config = TrainConfig(
    name="objects", run_dir=sys.argv[1], stage=PretrainConfig(), num_updates=2, batch_size=2,
    model=ModelConfig(codec_options={"temporal": 1, "spatial": 2}), sample_every=0, device="cpu",
    heldout=HeldoutConfig(clips=3, every=1),
)
given = {"model": Mixer(MixerConfig()), "text_encoder": Words(WordsConfig()), "dataset": Bars(8)}
apt.train.run(config, **given, resume="auto")
"""


@pytest.mark.slow
def test_objects_and_held_out_clips_on_two_ranks(tmp_path: Path):
    (tmp_path / "objects.py").write_text(OBJECTS)
    done = launch(tmp_path, "objects.py", "two")
    assert done.returncode == 0, done.stderr[-4000:]
    command = [sys.executable, str(tmp_path / "objects.py"), "one"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-4000:]
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert "heldout/generator/loss" in ours
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-3), name


# Any rank but 0 that lists the folder or reads a header of its files ends the run.
BLIND = """
import os, sys
from apt.data import builtin_sources, folder, statistics

def refuse(*arguments, **options):
    raise AssertionError("another rank than 0 reads the folder")

if os.environ["RANK"] != "0":
    for owner, names in ((folder, ("probe", "look_at", "scan_folder")), (statistics, ("look_at",)),
                         (builtin_sources, ("scan_folder",))):
        for name in names:
            setattr(owner, name, refuse)
from apt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_rank_reads_a_folder_and_tells_the_other(tmp_path: Path) -> None:
    write_video_folder(MovingDigits(0), tmp_path / "clips", 6, FPS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blind.py").write_text(BLIND)

    def train(run: str, clips: str) -> subprocess.CompletedProcess[str]:
        asked = ("--run-dir", run, *TINY, "--data.source", "folder", "--data.path", clips)
        return launch(tmp_path, "blind.py", "train", "digits_pixels_pretrain", *asked)

    done = train("run", "clips")
    assert done.returncode == 0, done.stderr[-4000:]
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2]
    nothing = train("no", "empty")
    assert nothing.returncode != 0
    told = [line for line in nothing.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "empty: nothing usable" in told[0]

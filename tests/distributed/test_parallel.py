from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apt.distributed.parallel import Parallel
from apt.errors import ConfigError
from apt.train import checkpoint

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
assert spec is not None and spec.loader is not None
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


@pytest.fixture
def alone() -> Parallel:
    return Parallel.from_environment("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one process (made here) and of two (made by torchrun)."""
    folder = tmp_path_factory.mktemp("ranks")
    run = ranks.Run(Parallel.from_environment("cpu"), seed=0)
    run.train()
    checkpoint.save(folder / "one", 3, run.state(), {"world_size": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def tensors(run) -> dict[str, torch.Tensor]:
    flat = {}
    for part, state in run.state().items():
        if isinstance(state, dict):
            for name, value in state.items():
                nested = value if isinstance(value, dict) else {"": value}
                flat |= {f"{part}/{name}/{k}": v for k, v in nested.items()}
    return flat


def test_two_ranks_train_as_one(folder: Path, alone: Parallel):
    one, two = ranks.Run(alone, seed=1), ranks.Run(alone, seed=2)
    one.load(folder / "one" / "step_00000003")
    assert two.load(folder / "two" / "step_00000003") == {"world_size": 2}
    assert two.step == 3
    expected, found = tensors(one), tensors(two)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_ranks_really_share_the_tensors(folder: Path):
    shards = sorted((folder / "two" / "step_00000003").glob("*.safetensors"))
    assert len(shards) == 2
    sizes = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            sizes.append(list(file.get_slice("net/blocks.0.weight").get_shape()))
    assert sizes == [[4, 7], [3, 7]]


def test_ema_of_shards_equals_ema_of_whole_tensors_bit_for_bit(folder: Path, alone: Parallel):
    expected = ranks.Run(alone, seed=0)
    expected.average_given_weights()
    found = ranks.Run(alone, seed=1)
    found.load(folder / "two_averaged" / "step_00000000")
    for name, value in expected.ema.state_dict().items():
        assert torch.equal(found.ema.state_dict()[name], value), name


def test_one_process_checkpoint_goes_through_two_ranks_unchanged(folder: Path, alone: Parallel):
    expected, found = ranks.Run(alone, seed=1), ranks.Run(alone, seed=2)
    expected.load(folder / "one" / "step_00000003")
    found.load(folder / "one_again" / "step_00000003")
    for name, value in tensors(expected).items():
        assert torch.equal(tensors(found)[name], value), name


def test_ranks_agree(reports: list[dict]):
    for report in reports:
        assert report["world_size"] == 2
        assert report["backend"] == "gloo"
        assert report["sharded"]
        assert report["mean"] == {"b": 0.5, "a": 1.5}
        assert list(report["mean"]) == ["b", "a"]
        assert report["any"] == [True, False]


def test_failure_on_one_rank_is_an_error_on_all(reports: list[dict]):
    for report in reports:
        assert "shard-00002" in report["refused"] and "has 0 bytes" in report["refused"]
        assert "Not a directory" in report["unwritable"]


def test_one_process_is_the_special_case(alone: Parallel):
    assert (alone.rank, alone.world_size, alone.mesh, alone.is_main) == (0, 1, None, True)
    assert alone.mean({"a": torch.tensor(2.0), "b": 1.0}) == {"a": 2.0, "b": 1.0}
    assert alone.any(True) and not alone.any(False)
    net = torch.nn.Linear(2, 2)
    weight = net.weight
    alone.shard(net, [])
    assert net.weight is weight
    alone.barrier()
    alone.close()


def test_devices_that_cannot_be_had_are_refused():
    with pytest.raises(ConfigError, match="'auto', 'cpu', 'cuda'"):
        Parallel.from_environment("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            Parallel.from_environment("cuda")

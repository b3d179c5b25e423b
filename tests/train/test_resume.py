from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from apt.train import checkpoint
from apt.train.logs import LOG_NAME, SPEED_NAME, read_log
from apt.train.manifest import read_manifest
from tests.processes import run_main
from tests.train.small_runs import ACCUMULATED, STAGES, UPDATES


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs that `small_runs.py` makes."""
    root = tmp_path_factory.mktemp("runs")
    run_main("tests.train.small_runs", root, folder=root)
    return root


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text())


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, whole, whatever the number of ranks that wrote it."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def last_checkpoint(run_dir: Path) -> Path:
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == UPDATES
    return found


def assert_runs_equal(found: Path, expected: Path) -> None:
    ours, theirs = last_checkpoint(found), last_checkpoint(expected)
    tensors, wanted = read_tensors(ours), read_tensors(theirs)
    assert tensors.keys() == wanted.keys()
    different = [k for k in wanted if not torch.equal(tensors[k], wanted[k])]
    assert not different
    assert read_manifest(ours)["values"] == read_manifest(theirs)["values"] == {"update": UPDATES}
    assert (found / LOG_NAME).read_bytes() == (expected / LOG_NAME).read_bytes()
    for name in ("transformer.safetensors", "text_encoder.safetensors"):
        model, other = load_file(found / "export" / name), load_file(expected / "export" / name)
        assert all(torch.equal(model[k], other[k]) for k in other) and model.keys() == other.keys()
    sheet = Path("samples") / "00000006.png"
    assert (found / sheet).read_bytes() == (expected / sheet).read_bytes()


def by_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights, averages and moments of a network as one fp64 vector each."""
    parts: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        if not name.endswith("/step"):
            part = "/".join(name.split("/")[:-1][:2])
            parts.setdefault(part, []).append(value.double().flatten())
    return {part: torch.cat(values) for part, values in parts.items()}


def assert_runs_close(found: Path, expected: Path, *, but: Sequence[str] = ()) -> None:
    """Equal to rounding: moments by their size, weights by how far two updates moved them.

    `but` are metrics that may differ.
    """
    ours, theirs, before = (
        read_tensors(folder)
        for folder in (
            last_checkpoint(found),
            last_checkpoint(expected),
            expected / "checkpoints" / f"step_{UPDATES - 2:08d}",
        )
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if k.endswith("/step"))
    a, b, c = by_part(ours), by_part(theirs), by_part(before)
    for part in b:
        scale = b[part] if part.endswith("optimizer") else b[part] - c[part]
        assert (a[part] - b[part]).norm() < 5e-4 * scale.norm(), part
    for entry, other in zip(read_log(found), read_log(expected), strict=True):
        for name in but:
            entry.pop(name, None), other.pop(name, None)
        assert entry == pytest.approx(other, rel=2e-3, abs=1e-6)


def codes(outcomes: list[dict[str, Any]]) -> list[int]:
    return [outcome["code"] for outcome in outcomes]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_trains_everything(root: Path, report: dict[str, Any], stage: str):
    assert codes(report[f"whole/{stage}"]) == [0], report[f"whole/{stage}"]
    run_dir = root / "whole" / stage
    tensors = read_tensors(last_checkpoint(run_dir))
    parts = {"/".join(name.split("/")[:2]) for name in tensors}
    expected = {f"generator/{part}" for part in ("weights", "optimizer", "ema")}
    if stage == "apt":
        expected |= {"discriminator/weights", "discriminator/optimizer"}
    assert parts >= expected
    moments = {k: v for k, v in tensors.items() if k.endswith(("/square_avg", "/exp_avg_sq"))}
    assert {k.split("/")[2] for k in moments} == {
        k.split("/")[2] for k in tensors if k.split("/")[1] == "weights"
    }
    assert all(entry["speed/tokens_per_second"] > 0 for entry in read_log(run_dir, SPEED_NAME))
    assert all(value.count_nonzero() for value in moments.values())
    assert [entry["step"] for entry in read_log(run_dir)] == list(range(1, UPDATES + 1))
    assert (run_dir / "losses.png").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_equals_uninterrupted(root: Path, report: dict[str, Any], stage: str):
    stopped, resumed = report[f"stopped/{stage}"]
    assert stopped["code"] == resumed["code"] == 0, (stopped, resumed)
    assert stopped["lines"] == 2
    assert "SIGTERM: saved after update 2" in stopped["output"]
    assert_runs_equal(root / "stopped" / stage, root / "whole" / stage)


def test_killed_and_resumed_equals_uninterrupted(root: Path, report: dict[str, Any]):
    *kills, last = report["killed/apt"]
    assert set(codes(kills)) == {-9} and last["code"] == 0, report["killed/apt"]
    assert [kill["in_save"] for kill in kills] == [False, True, False, True]
    assert_runs_equal(root / "killed" / "apt", root / "whole" / "apt")


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_to_rounding(root: Path, report: dict[str, Any], stage: str):
    assert codes(report[f"ranks/{stage}"]) == [0, 0], report[f"ranks/{stage}"]
    shards = list(last_checkpoint(root / "ranks" / stage).glob("shard-0000[12]-*"))
    assert len(shards) == 2
    # What is asked of each rank's own samples: the mean of shares is not the share of means.
    of_samples = ["samples/relative_contrast", "samples/relative_diversity"]
    assert_runs_close(root / "ranks" / stage, root / "whole" / stage, but=of_samples)


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_accumulated_gradients_equal_the_large_batch(
    root: Path, report: dict[str, Any], stage: str
):
    assert codes(report[f"accumulated/{stage}"]) == [0], report[f"accumulated/{stage}"]
    assert_runs_close(root / "accumulated" / stage, root / "whole" / stage)


def test_a_full_disk_stops_with_an_error_and_loses_nothing(root: Path, report: dict[str, Any]):
    first, failed, resumed = report["full/apt"]
    assert (first["code"], failed["code"], resumed["code"]) == (0, 2, 0), report["full/apt"]
    assert "CheckpointError" in failed["output"] and "File too large" in failed["output"]
    kept = checkpoint.latest(root / "full" / "after_failure")
    assert kept is not None and checkpoint.step_of(kept) == 2
    assert os.listdir(kept.parent) == [kept.name]
    assert_runs_equal(root / "full" / "apt", root / "whole" / "apt")


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    root: Path, report: dict[str, Any]
):
    outcome = report["nan"]
    assert outcome["code"] == 2, outcome
    assert "TrainingStopped" in outcome["output"] and "NaN or infinite" in outcome["output"]
    found = checkpoint.latest(root / "nan" / "pretrain" / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == outcome["lines"] >= 1
    assert f"the checkpoint of update {outcome['lines']} is kept" in outcome["output"]
    assert all(value.isfinite().all() for value in read_tensors(found).values())


def test_a_collapse_can_stop_the_run_with_its_state_saved(root: Path, report: dict[str, Any]):
    outcome = report["collapse"]
    assert outcome["code"] == 2, outcome
    assert "TrainingStopped: training stopped: update 3" in outcome["output"]
    found = checkpoint.latest(root / "collapse" / "apt" / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == 3


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("batch size", ["ConfigError", "batch_size", "was 4", "is 8"]),
        ("model", ["ConfigError", "model.options.depth (was 3, is 2)"]),
        ("stage", ["ConfigError", "stage.r1.weight (was None"]),
        ("without resume", ["ConfigError", "already holds a run", "--resume"]),
        ("nothing there", ["CheckpointError", "no run to resume"]),
    ],
)
def test_a_run_that_does_not_fit_its_folder(report: dict[str, Any], case: str, messages: list[str]):
    outcome = report["misfits"][case]
    assert outcome["code"] == 2, outcome
    for message in messages:
        assert message in outcome["output"]

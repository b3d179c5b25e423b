"""A training run's folder in place of a model's, everywhere a model is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.checkpoints.info import read_info
from apt.checkpoints.load import (
    describe,
    find_model,
    load_bundle,
    load_codec,
    load_model,
    load_prompt_check,
)
from apt.checkpoints.lora import find_lora
from apt.checkpoints.runs import model_folder
from apt.checkpoints.save import save_bundle
from apt.checkpoints.source import weights_digest
from apt.errors import CheckpointError
from apt.pipeline import OneStepPipeline
from tests.cli.shell import error_line, invoke
from tests.tiny import tiny_bundle

LOADERS: list[Callable[[Path], Any]] = [
    load_bundle, load_model, load_codec, describe, load_prompt_check,
    OneStepPipeline.from_pretrained,
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("model"), tiny_bundle())


def begun(folder: Path, state: str = "unfinished", update: int = 3) -> Path:
    """A run without a model yet."""
    folder.mkdir(parents=True)
    content = {"state": state, "update": update, "num_updates": 8, "reason": ""}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A finished run."""
    folder = begun(tmp_path / "run", "finished", 8)
    shutil.copytree(model, folder / "export")
    return folder


@pytest.mark.parametrize("load", LOADERS)
def test_a_finished_run_is_its_export(load: Callable[[Path], Any], run: Path) -> None:
    load(run)


def test_the_weights_are_those_of_the_export(run: Path) -> None:
    ours, theirs = load_model(run).state_dict(), tiny_bundle().backbone.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert find_model(run)[0].folder == run / "export"


@pytest.mark.parametrize("load", LOADERS)
def test_a_run_without_a_model_says_what_to_do(load: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"no model yet \(it was stopped after 3 of 8"
    ) as told:
        load(folder)
    assert f"train --resume {folder}" in str(told.value)


@pytest.mark.parametrize(
    ("state", "words"),
    [("running", "is running, or was killed"), ("failed", "failed")],
)
def test_it_says_how_the_run_stands(tmp_path: Path, state: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        model_folder(begun(tmp_path / "run", state))


def test_an_unfinished_run_is_its_last_snapshot_and_says_so(model: Path, tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    for update in (2, 10):  # in the order of numbers, not of names
        for weights in ("ema", "raw"):
            shutil.copytree(model, folder / "snapshots" / str(update) / weights)
    (folder / "snapshots" / "11" / "ema").mkdir(parents=True)  # being written
    with pytest.warns(UserWarning, match="not finished .*using its last snapshot.* update 10"):
        assert model_folder(folder) == folder / "snapshots" / "10" / "ema"
    result = invoke("generate", "--model", folder, "--prompt", "a", "--out", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr


def test_a_folder_of_several_runs_names_them(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    begun(root / "apt")
    shutil.copytree(model, begun(root / "distill", "finished") / "export")
    with pytest.raises(CheckpointError, match=r"runs \(apt, distill\); name one .* as .*/distill$"):
        load_bundle(root)


def test_a_folder_that_is_neither_is_told_as_before(tmp_path: Path) -> None:
    assert model_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=r"has no apt\.json"):
        load_bundle(tmp_path)


def test_a_runs_adapters_are_found(run: Path) -> None:
    file = run / "export" / "pytorch_lora_weights.safetensors"
    file.touch()
    assert find_lora(run) == file


def test_push_and_generate_take_runs(run: Path, tmp_path: Path) -> None:
    unfinished = begun(tmp_path / "begun")
    for command in (
        ["generate", "--prompt", "a", "--model", unfinished],
        ["push", unfinished, "me/model"],
        ["export", unfinished, tmp_path / "out"],
        ["bench", "dit", "--model", unfinished, "--floor", "--gpu", "h100"],
        ["data", "check", tmp_path, "--model", unfinished],
    ):
        assert "has no model yet" in error_line(invoke(*command))
    out = tmp_path / "a.png"
    assert invoke("generate", "--prompt", "a", "--model", run, "--out", out).returncode == 0


def test_bench_takes_the_shape_of_the_model_of_a_place_and_its_size(run: Path) -> None:
    estimate = ["bench", "dit", "--floor", "--gpu", "h100", "--model"]
    done = invoke(*estimate, "digits-diffusion")
    assert done.returncode == 0 and "9 frames of" in done.stdout, done.stderr
    small = invoke(*estimate, run)
    assert small.returncode == 0, small.stderr
    shape = read_info(run / "export").model.config
    assert f"hidden_size {shape['hidden_size']}" in small.stdout.splitlines()[0]
    share = [re.search(r"([\d.e-]+) TFLOP", text) for text in (small.stdout, done.stdout)]
    assert share[0] and share[1] and float(share[0][1]) < 0.1 * float(share[1][1])


def test_evaluate_says_that_a_stage_is_not_all_of_them(run: Path) -> None:
    line = error_line(invoke("evaluate", "digits", "--runs", run))
    assert "is the run of one stage; --runs takes the folder" in line


def test_the_digest_is_of_weights_wherever_they_lie(model: Path, run: Path) -> None:
    before = weights_digest(model)
    assert weights_digest(run / "export") == before
    (run / "export" / "apt.json").write_text("{}")
    assert weights_digest(run / "export") == before
    file = run / "export" / "transformer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert weights_digest(run / "export") != before

"""Samples of a model in a folder with their manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from apt.checkpoints.bundle import save_bundle
from apt.errors import InputError
from apt.evaluate.generate import generate_samples
from apt.generate_options import GenerateOptions
from apt.samples import MANIFEST, read_samples
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_bundle(folder, tiny_bundle())
    return str(folder)


def test_an_interrupted_folder_is_made_whole(tmp_path: Path, model: str) -> None:
    prompts, folder = ["a red one", "a blue two"], tmp_path / "samples"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_samples(folder, model, prompts, [0, 5], progress=stop)
    found = read_samples(folder)
    assert len(found.samples) == 3
    times = {sample.path: sample.path.stat().st_mtime_ns for sample in found.samples.values()}
    generate_samples(folder, model, prompts, [0, 5])
    found = read_samples(folder)
    assert set(found.samples) == {(prompt, seed) for prompt in prompts for seed in (0, 5)}
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert found.settings["num_steps"] == 1 and found.settings["cfg_scale"] == 1
    # As in one go.
    generate_samples(tmp_path / "again", model, prompts, [0, 5])
    lines = [
        sorted((tmp_path / name / MANIFEST).read_text().splitlines())
        for name in ("samples", "again")
    ]
    assert lines[0] == lines[1]


def test_other_settings_are_refused(tmp_path: Path, model: str) -> None:
    options = GenerateOptions(frames=1)
    generate_samples(tmp_path, model, ["a"], [0], options=options)
    (sample,) = read_samples(tmp_path).samples.values()
    assert sample.path.suffix == ".png"
    with pytest.raises(InputError, match="made with other settings: num_steps was 1 and is 2"):
        generate_samples(tmp_path, model, ["a"], [0], options=options.replace({"num_steps": 2}))


def test_other_weights_of_the_same_size_are_refused(tmp_path: Path) -> None:
    model = save_bundle(tmp_path / "model", tiny_bundle())
    generate_samples(tmp_path / "samples", str(model), ["a"], [0])
    other = tiny_bundle()
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.neg_()
    save_bundle(tmp_path / "other", other)
    shutil.copytree(tmp_path / "other", model, dirs_exist_ok=True)
    with pytest.raises(InputError, match="made with other settings: model_content"):
        generate_samples(tmp_path / "samples", str(model), ["a"], [0, 1])

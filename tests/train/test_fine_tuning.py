"""Pre-training that starts from a model's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import apt.train
from apt.checkpoints.info import SampleInfo, SamplingInfo, read_info
from apt.checkpoints.save import save_bundle
from apt.errors import ConfigError
from apt.methods import PretrainConfig
from apt.train.config import DataConfig, LoRAConfig, TrainConfig
from apt.train.config_file import plain
from apt.train.resolve import resolve
from apt.train.resume import check_resumable
from tests.tiny import tiny_bundle

SAMPLING = SamplingInfo(num_steps=3, cfg_scale=1.5, timestep_shift=2.0, sampler="euler")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("start") / "model", bundle())


def bundle(stage: str = "diffusion") -> Any:
    return tiny_bundle(stage, SAMPLING)


def config(run_dir: Path, start: Path | str = "", **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "name": "more",
        "run_dir": str(run_dir),
        "stage": PretrainConfig(start=str(start)),
        "num_updates": 1,
        "batch_size": 2,
        "sample_every": 1,
        "sample_prompts": ("a red seven moving left",),
        "device": "cpu",
    }
    return TrainConfig(**{**options, **changes})


def test_it_begins_with_the_models_weights_and_keeps_what_it_is(
    start: Path, tmp_path: Path
) -> None:
    # An average that never moves is what the run began with.
    run = apt.train.run(config(tmp_path / "run", start, ema_decay=1.0))
    for name in ("transformer.safetensors", "text_encoder.safetensors"):
        before, after = load_file(start / name), load_file(run / "export" / name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    was, is_now = read_info(start), read_info(run / "export")
    for name in ("sample", "sampling", "stage"):
        assert getattr(is_now, name) == getattr(was, name)
    for name in ("model", "text_encoder", "codec"):
        assert getattr(is_now, name).config == getattr(was, name).config
    assert is_now.training["started_from"] == {"recipe": "none"}
    assert not is_now.training["config"]["ema_warmup"]
    assert (run / "samples" / "00000001.png").is_file()


def test_all_of_it_goes_on_training_also_as_an_object(start: Path, tmp_path: Path) -> None:
    runs = [
        apt.train.run(config(tmp_path / "named", start, ema_decay=0.0, sample_every=0)),
        apt.train.run(
            config(tmp_path / "given", ema_decay=0.0, sample_every=0), bundles={"start": bundle()}
        ),
    ]
    for name in ("transformer.safetensors", "text_encoder.safetensors"):
        before = load_file(start / name)
        named, given = (load_file(run / "export" / name) for run in runs)
        assert any(not torch.equal(before[key], named[key]) for key in before)
        assert all(torch.equal(named[key], given[key]) for key in before)
    with pytest.raises(ConfigError, match=r"as bundles=.'start'"):
        model = tiny_bundle().backbone
        apt.train.run(config(tmp_path / "x"), model=model, bundles={"start": bundle()})


def test_with_adapters_nothing_else_trains(start: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = LoRAConfig(rank=2)
    run = apt.train.run(config(tmp_path / "run", start, lora=lora, ema_decay=0.0, sample_every=0))
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()
    name = "text_encoder.safetensors"
    before, after = load_file(start / name), load_file(run / "export" / name)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_size_and_rate_are_the_models() -> None:
    size = SampleInfo(frames=5, height=48, width=64, fps=12)
    data = DataConfig(source="folder", path="videos")
    start = dataclasses.replace(bundle().info, sample=size)
    resolved = resolve(config(Path("x"), "model", data=data), start)
    assert resolved.data.clip == size
    assert resolved.ema_warmup is False


def test_what_cannot_be_is_told_before_anything_is_trained(start: Path, tmp_path: Path) -> None:
    both = PretrainConfig(start=str(start), codec="digits-codec")
    with pytest.raises(ConfigError, match="has its own codec"):
        config(tmp_path, stage=both)
    with pytest.raises(ConfigError, match=r"name a model with --stage\.start"):
        config(tmp_path, lora=LoRAConfig(rank=2))
    with pytest.raises(
        ConfigError, match="start from the diffusion model that it was distilled from"
    ):
        apt.train.run(config(tmp_path / "run"), bundles={"start": bundle("apt")})


def test_runs_from_before_there_was_a_start_go_on(tmp_path: Path) -> None:
    now = dataclasses.replace(config(tmp_path), ema_warmup=False)
    before = plain(now)
    del before["stage"]["start"]
    meta = {"config": before, "models": {"codec": ""}}
    assert check_resumable(now, meta, tmp_path / "step_00000001", 1) == []

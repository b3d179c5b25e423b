"""Pipelines of diffusers, and the peers' settings on tiny pipelines of the same classes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apt.errors import CheckpointError, InputError
from apt.evaluate.choice import parse_model
from apt.evaluate.models import load_model
from apt.evaluate.peers import PEERS, Peer, WeightsFile
from apt.evaluate.pipelines import load_peer
from apt.generate_options import GenerateOptions
from tests.evaluate.tiny_pipelines import save_pipelines, tiny_unet

KEY = ("a red seven", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    found = save_pipelines(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_file(tiny_unet().state_dict(), folder / "unet.safetensors")
    return found | {"unet": folder / "unet.safetensors"}


def local(name: str, folders: Mapping[str, Path]) -> Peer:
    """A peer whose files are the tiny ones."""
    peer = PEERS[name]
    family = name.split("-")[0].replace("sd3.5", "sd3")
    unet = peer.unet and WeightsFile(str(folders["unet"].parent), folders["unet"].name)
    return dataclasses.replace(peer, repo=str(folders[family]), unet=unet, side=16)


TIMESTEPS = {"sdxl-dmd2": 399, "sdxl-hyper": 800, "sdxl-nitro": 249, "sdxl-lightning": 999}
"""At which the UNet is asked in its one step."""


@pytest.mark.parametrize("name", sorted(PEERS))
def test_every_peer_runs_with_its_cards_settings(name: str, folders: Mapping[str, Path]) -> None:
    peer = local(name, folders)
    model = load_peer(peer, GenerateOptions(), device="cpu", dtype="float32")
    asked: list[float] = []
    if name in TIMESTEPS:
        model._pipeline.unet.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(float(args[1])), with_kwargs=True
        )
    (frames,) = model.stream([KEY])
    assert frames.shape == (1, 16, 16, 3) and frames.dtype == torch.uint8 and model.frames == 1
    assert frames.float().std() > 0
    assert asked == ([TIMESTEPS[name]] if name in TIMESTEPS else [])
    assert model.settings["num_steps"] == peer.num_steps
    assert model.settings["cfg_scale"] == peer.guidance_scale
    assert model.settings["licence"] == peer.licence
    assert model.settings["scheduler"] == (peer.scheduler or _own(name))
    assert ("unet" in model.settings) == (peer.unet is not None)


def _own(name: str) -> str:
    return "EulerDiscreteScheduler" if "sdxl" in name else "FlowMatchEulerDiscreteScheduler"


def test_seeds_steps_and_guidance_are_the_users(folders: Mapping[str, Path]) -> None:
    place = f"diffusers:{folders['sdxl']},height=16,width=16"
    model = load_model(parse_model(f"{place},num_steps=2"), device="cpu")
    first, second, again = model.stream([KEY, ("a red seven", 4), KEY])
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert model.settings["num_steps"] == 2 and model.settings["cfg_scale"] == 5.0
    other = load_model(parse_model(f"{place},num_steps=3,cfg_scale=0"), device="cpu")
    (changed,) = other.stream([KEY])
    assert not torch.equal(changed, first)
    assert other.settings["call"]["guidance_scale"] == 0


def test_what_does_not_fit_is_one_line(folders: Mapping[str, Path], tmp_path: Path) -> None:
    place = f"diffusers:{folders['sdxl']}"
    for option in ("frames=9", "sampler=euler"):
        with pytest.raises(InputError, match=r"takes no option .* it takes num_steps, cfg_scale"):
            load_model(parse_model(f"{place},{option}"), device="cpu")
    model = load_model(parse_model(f"{place},num_steps=1,height=15,width=16"), device="cpu")
    with pytest.raises(InputError, match="divisible by 8"):
        list(model.stream([KEY]))
    with pytest.raises(CheckpointError, match="not a diffusers pipeline"):
        load_model(parse_model("diffusers:digits"))
    with pytest.raises(InputError, match=r"published as a pickle .* unet=FILE"):
        load_peer(PEERS["sdxl-dmd2"], GenerateOptions())
    hyper = local("sdxl-hyper", folders)
    with pytest.raises(InputError, match="leave num_steps out"):
        load_peer(hyper, GenerateOptions(num_steps=4))
    with pytest.raises(InputError, match="no UNet of its own"):
        load_peer(local("sdxl", folders), GenerateOptions(), unet=folders["unet"])
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="does not fit the pipeline's UNet"):
        load_peer(hyper, GenerateOptions(), unet=other, device="cpu")


def test_a_pipeline_that_names_code_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(folders["sdxl"], hostile)
    config = hostile / "unet" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"auto_map": {"AutoModel": "mine.Model"}}))
    (hostile / "unet" / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError, match=r"names code.*auto_map"):
        load_model(parse_model(f"diffusers:{hostile}"))
    config.write_text(json.dumps(document))
    index = hostile / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["mine", "Model"]}))
    with pytest.raises(CheckpointError, match="names code"):
        load_model(parse_model(f"diffusers:{hostile}"))

"""Exports: exact round trips, and stock diffusers with our result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

import apt
from apt.checkpoints.export import Format, export_model
from apt.checkpoints.info import SamplingInfo, read_description, read_info, write_info
from apt.checkpoints.load import load_bundle
from apt.checkpoints.save import save_bundle
from apt.errors import CheckpointError, InputError
from apt.flow import sampling_timesteps
from apt.methods.apt import generate
from apt.pipeline import OneStepPipeline
from tests.checkpoints.test_load import assert_same, state, stored
from tests.cli.shell import error_line, invoke
from tests.hub.tiny_pipelines import PROMPT, sd3_folder, wan_folder
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("wan") / "pipeline", two_experts=True)


@pytest.fixture(scope="module")
def trained(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step model that was trained from the pipeline, as a run exports it."""
    bundle = load_bundle(wan)
    bundle.info = dataclasses.replace(
        bundle.info,
        stage="apt",
        sampling=SamplingInfo(),
        sample=dataclasses.replace(bundle.info.sample, frames=5, height=16, width=16),
        training={"recipe": "test"},
    )
    with torch.no_grad():
        for value in state(bundle.backbone).values():
            value.mul_(0.9)
    folder = tmp_path_factory.mktemp("trained") / "export"
    return save_bundle(folder, bundle, external_text_encoder=True)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "diffusers"
    return export_model(trained, folder, format="diffusers", max_shard_size="40KB")


def test_the_weights_come_back_bit_for_bit(trained: Path, exported: Path) -> None:
    assert len(list((exported / "transformer").glob("*.safetensors"))) > 1
    assert_same(stored(exported / "transformer"), state(load_bundle(trained).backbone))
    assert_same(state(load_bundle(exported).backbone), state(load_bundle(trained).backbone))


def test_it_is_a_pipeline_of_one_expert_with_the_base_s_parts(wan: Path, exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    assert not (exported / "transformer_2").exists()
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for part in ("text_encoder", "tokenizer", "vae"):
        for file in (wan / part).iterdir():
            assert (exported / part / file.name).read_bytes() == file.read_bytes()


def test_it_remembers_how_it_was_trained_and_is_sampled(exported: Path) -> None:
    info = load_bundle(exported).info
    assert info.stage == "apt" and info.sampling.num_steps == 1
    assert info.training == {"recipe": "test"}
    assert info.codec.config["repo"] == info.text_encoder.config["repo"] == str(exported)
    # Nobody else has the folder that it was exported from.
    assert read_info(exported).codec.config["repo"] == "."


@pytest.mark.parametrize("format", ["apt", "diffusers"])
def test_no_folder_of_this_machine_leaves_it(
    trained: Path, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format
) -> None:
    info = read_info(trained)
    start = {"source": str(wan), "license": "Apache-2.0"}
    config = {
        "run_dir": "runs/mine",
        "negative_prompt": "fade in/out",
        "sample_prompts": ["/home/me/prompt", "a cat"],
        "data": {"source": "latents", "path": "videos"},
        "stage": {
            "generator": "runs/wan/distill/export",
            "discriminator": "owner/name",
            # Of a method that this package does not know.
            "masks": "C:\\me\\masks",
            "cache": "cache",
            "guide": "runs/guide",
        },
    }
    record = {
        "config": config,
        "folders": ["run_dir", "data.path", "stage.cache"],
        "models": ["stage.generator", "stage.discriminator", "stage.guide"],
        "started_from": start,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "guide").mkdir(parents=True)
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    write_info(source, dataclasses.replace(info, training=record))
    kept = read_info(export_model(source, tmp_path / "out", format=format)).training
    assert kept["started_from"] == {"source": "", "license": "Apache-2.0"}
    assert kept["config"] == {
        "run_dir": "",
        "negative_prompt": "fade in/out",
        "sample_prompts": ["", "a cat"],
        "data": {"source": "latents", "path": ""},
        "stage": {
            "generator": "",
            "discriminator": "owner/name",
            "masks": "",
            "cache": "",
            "guide": "",
        },
    }


def test_second_copies_of_weights_stay_behind(trained: Path, wan: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(wan, base)
    (copied,) = (base / "vae").glob("*.safetensors")
    shutil.copy(copied, copied.with_suffix(".fp16.safetensors"))
    out = export_model(trained, tmp_path / "out", format="diffusers", base=str(base))
    assert [file.name for file in (out / "vae").glob("*.safetensors")] == [copied.name]


def test_stock_diffusers_makes_what_ours_makes(exported: Path) -> None:
    from diffusers import WanPipeline

    torch.manual_seed(3)
    z = torch.randn(1, 16, 2, 2, 2)
    peer = WanPipeline.from_pretrained(exported)
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        prompt=PROMPT,
        latents=z,
        num_frames=5,
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=1,
        output_type="latent",
    ).frames
    bundle = load_bundle(exported)
    # The stock pipeline runs its text encoder in fp32 here, ours in bf16 unless told otherwise.
    text = apt.create_text_encoder(
        "umt5", **{**bundle.info.text_encoder.config, "dtype": "float32"}
    )
    with torch.no_grad():
        ours = generate(bundle.backbone, z, apt.Condition(text([PROMPT])))
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_stock_diffusers_shifts_timesteps_as_the_model_does(trained: Path, tmp_path: Path) -> None:
    """A diffusion model, which takes many steps, is exported too."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = shutil.copytree(trained, tmp_path / "model")
    sampling = SamplingInfo(num_steps=25, cfg_scale=5.0, timestep_shift=5.0, sampler="euler")
    write_info(model, dataclasses.replace(read_info(model), stage="diffusion", sampling=sampling))
    out = export_model(model, tmp_path / "out", format="diffusers")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas, sampling_timesteps(4, shift=5.0))


def test_our_pipeline_generates_from_the_export(exported: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(exported, device="cpu")
    video = pipeline(PROMPT, seed=1)
    assert video.shape == (1, 5, 16, 16, 3)
    assert torch.equal(
        video, OneStepPipeline.from_pretrained(exported, device="cpu")(PROMPT, seed=1)
    )


def test_comfyui_s_file_is_the_authors_layout(trained: Path, tmp_path: Path) -> None:
    file = export_model(trained, tmp_path / "out" / "wan.safetensors", format="comfyui")
    tensors = load_file(file)
    assert all(key.startswith("model.diffusion_model.") for key in tensors)
    backbone = load_bundle(trained).backbone
    assert_same(convert_wan_transformer_to_diffusers(dict(tensors)), state(backbone))
    again = apt.load_model(file, architecture="wan2.1_t2v_1.3b", options=vars(backbone.config))
    assert_same(state(again), state(backbone))


def test_sd3_goes_to_diffusers_and_comfyui_and_back(tmp_path: Path) -> None:
    source = sd3_folder(tmp_path / "sd3")
    backbone = load_bundle(source).backbone
    out = export_model(source, tmp_path / "out", format="diffusers")
    assert_same(state(load_bundle(out).backbone), state(backbone))
    file = export_model(out, tmp_path / "one.safetensors", format="comfyui")
    again = apt.load_model(file, architecture="sd3.5_medium", options=vars(backbone.config))
    assert_same(state(again), state(backbone))


def test_types_and_exporting_again(trained: Path, tmp_path: Path) -> None:
    out = export_model(trained, tmp_path, format="diffusers", max_shard_size="10KB")
    many = len(list((out / "transformer").iterdir()))
    export_model(trained, out, format="diffusers", dtype=torch.bfloat16)
    assert len(list((out / "transformer").iterdir())) == 2 < many, "no shard is left over"
    assert {t.dtype for t in stored(out / "transformer").values()} == {torch.bfloat16}
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"


def test_the_command_line(trained: Path, wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("export", trained, out, "--format", "diffusers", "--base", str(wan))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    assert (out / "model_index.json").is_file()
    file = tmp_path / "wan.safetensors"
    result = invoke("export", trained, file, "--format", "comfyui", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    result = invoke("export", out, tmp_path / "ours")
    assert result.returncode == 0, result.stderr
    assert read_info(tmp_path / "ours").stage == "apt"


def test_a_built_in_model_goes_by_its_name(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    result = invoke("export", "digits", out)
    assert result.returncode == 0, result.stderr
    assert read_description(out).stage == "apt"
    assert (out / "codec.safetensors").is_file()  # which the built-in models share


def test_what_cannot_be_exported_says_why(trained: Path, wan: Path, tmp_path: Path) -> None:
    own = save_bundle(tmp_path / "own", tiny_bundle())
    with pytest.raises(CheckpointError, match="does not belong to a public family"):
        export_model(own, tmp_path / "out", format="diffusers")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        export_model(trained, tmp_path / "out", format="comfyui")
    with pytest.raises(CheckpointError, match="is not a pipeline to take"):
        export_model(trained, tmp_path / "out", format="diffusers", base=str(own))
    with pytest.raises(CheckpointError, match="expected a WanPipeline"):
        base = str(sd3_folder(tmp_path / "sd3"))
        export_model(trained, tmp_path / "out", format="diffusers", base=base)
    with pytest.raises(InputError, match="itself"):
        export_model(wan, wan, format="diffusers")
    line = error_line(invoke("export", tmp_path / "none", tmp_path / "out"))
    assert "there is no folder" in line
    (tmp_path / "in the way").write_text("")
    line = error_line(
        invoke("export", trained, tmp_path / "in the way" / "out", "--format", "diffusers")
    )
    assert "is a file; name a folder" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-shard-size", "abc"], "max_shard_size must be a size"),
        (["--max-shard-size", "0GB"], "max_shard_size must be a size"),
        (["--max-shard-size=-5GB"], "max_shard_size must be a size"),
        (["--update", "3"], "choose among the snapshots of a run"),
        (["--weights", "raw"], "choose among the snapshots of a run"),
        (["--base", "digits"], "base is only for the format diffusers"),
    ],
)
def test_options_that_would_be_ignored_or_fail_late(
    arguments: list[str], message: str, trained: Path, tmp_path: Path
) -> None:
    assert message in error_line(invoke("export", trained, tmp_path / "out", *arguments))
    assert not list(tmp_path.iterdir())


def test_places_that_no_export_fits_into(trained: Path, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for arguments, message in (
        ([tmp_path / "file"], "is a file; name a folder"),
        ([tmp_path / "file", "--format", "diffusers"], "is a file; name a folder"),
        ([tmp_path / "folder.safetensors", "--format", "comfyui"], "it is a folder"),
        ([tmp_path / "file" / "x.safetensors", "--format", "comfyui"], "is a file; name a folder"),
        ([wan], "is a diffusers pipeline, in which files of the format apt would be"),
        ([trained], "is the model itself"),
    ):
        assert message in error_line(invoke("export", trained, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "no-such-folder", "me/x"], "there is no folder 'no-such-folder'"),
        (["push", "README.md", "me/x"], "there is no folder 'README.md'"),
        (["push", "docs", "bad name"], "'bad name' is not a name on the Hub"),
        (["push", "docs", "me/x@main"], "a branch with --revision"),
        (["pull", "me/x", "--local-dir", "README.md"], "'README.md' is a file; name a folder"),
        (["pull", "me/x", "--local-dir", "README.md/x"], "is a file; name a folder"),
    ],
)
def test_places_for_the_hub(arguments: list[str], message: str) -> None:
    assert message in error_line(invoke(*arguments))

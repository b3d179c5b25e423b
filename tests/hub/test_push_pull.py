"""Models are pushed to the local Hub and pulled, in fresh processes, as by a user."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import apt
from apt.checkpoints.export import export_model
from apt.checkpoints.info import (
    CodecInfo,
    ModelInfo,
    SampleInfo,
    SamplingInfo,
    read_info,
    write_info,
)
from apt.checkpoints.load import component_info, load_bundle
from apt.checkpoints.save import save_bundle, save_codec
from apt.hub.card import make_card
from apt.models import MODELS, create_codec
from tests.cli.shell import error_line, invoke
from tests.hub.processes import QUICK, run_cli, run_python
from tests.hub.server import STRANGER, TOKEN, HubServer
from tests.hub.tiny_pipelines import PROMPT, wan_folder
from tests.tiny import tiny_bundle
from tests.train.own_classes import MixerConfig


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("wan") / "pipeline", two_experts=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("own") / "model", tiny_bundle())


def training() -> dict[str, object]:
    """A record as `apt.train` leaves it, two stages after a public model."""
    base = {"source": "Wan-AI/Some-Wan", "revision": "a" * 40, "license": "Apache-2.0"}
    distilled = {"recipe": "distil", "updates": 500, "started_from": base}
    return {
        "recipe": "apt_video",
        "updates": 300,
        "seed": 1,
        "batch_size": 64,
        "weights": "ema",
        "config": {"data": {"source": "folder", "path": "/home/somebody/secret"}},
        "figures": {"FVD": 12.5},
        "started_from": distilled,
    }


def test_push_and_generate_elsewhere(hub: HubServer, own: Path, tmp_path: Path) -> None:
    result = run_cli(
        hub, tmp_path / "a", "push", own, "me/digits", "--private", "--license", "mit", token=TOKEN
    )
    assert result.returncode == 0, result.stderr
    sha = hub.repos["me/digits"].sha(1)
    assert result.stdout.strip() == f"{hub.endpoint}/me/digits/commit/{sha}"
    assert hub.repos["me/digits"].private
    files = hub.repos["me/digits"].files
    for path in own.iterdir():
        assert files[path.name] == path.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "diffusion-apt"

    out = tmp_path / "video.png"
    arguments = ("generate", "--model", "me/digits", "--prompt", "a red seven", "--out", out)
    refused = run_cli(hub, tmp_path / "b", *arguments)
    assert "private" in error_line(refused) and "HF_TOKEN" in error_line(refused)
    result = run_cli(hub, tmp_path / "b", *arguments, token=TOKEN)
    assert result.returncode == 0, result.stderr
    assert out.is_file() and not hub.leaks


def test_a_codec_alone_goes_the_same_way(hub: HubServer, tmp_path: Path) -> None:
    codec = create_codec("digits_ae", channels=2, widths=(4,), latents_mean=(0.5, -1.0),
                         latents_std=(2.0, 3.0))  # fmt: skip
    record = {
        "recipe": "digits_codec",
        "updates": 5,
        "config": {"run_dir": "/home/somebody/secret", "data": {"source": "digits"}},
    }
    info = CodecInfo(
        codec=component_info("digits_ae", codec),
        sample=SampleInfo(frames=9, height=32, width=32, fps=8.0),
        training=record,
        summary="a video autoencoder, whose latents a diffusion model works in",
    )
    folder = save_codec(tmp_path / "codec", codec, info)
    result = run_cli(hub, tmp_path / "a", "push", folder, "me/codec", token=TOKEN)
    assert result.returncode == 0, result.stderr
    files = hub.repos["me/codec"].files
    assert files["codec.safetensors"] == (folder / "codec.safetensors").read_bytes()
    assert b"secret" not in files["apt.json"]
    card = files["README.md"].decode()
    assert "A video autoencoder" in card and "one-step" not in card
    assert 'load_codec("me/codec")' in card and "Built-in moving digits" in card
    code = (
        "import apt; c = apt.load_codec('me/codec'); "
        "print(c.config.latents_std, sum(p.sum().item() for p in c.parameters()))"
    )
    result = run_python(hub, tmp_path / "b", code)
    total = sum(parameter.sum().item() for parameter in codec.parameters())
    assert result.stdout.strip() == f"(2.0, 3.0) {total}", result.stderr


@pytest.mark.slow
def test_an_autoencoder_of_diffusers_by_its_id(hub: HubServer, tmp_path: Path) -> None:
    from tests.models.test_wan_pipeline import tiny_vae

    tiny_vae(16).save_pretrained(tmp_path / "vae")
    sha = hub.add("owner/vae", tmp_path / "vae")
    code = """
import apt
from apt.checkpoints.load import describe
print(describe("owner/vae").codec.config["revision"], apt.load_codec("owner/vae").channels)
"""
    result = run_python(hub, tmp_path / "home", code)
    assert result.stdout.strip() == f"{sha} 16", result.stderr


def test_pushing_again_sends_only_what_changed(hub: HubServer, own: Path, tmp_path: Path) -> None:
    def push() -> int:
        before = len(hub.requests("PUT /storage"))
        result = run_cli(hub, tmp_path, "push", own, "me/digits", token=TOKEN)
        assert result.returncode == 0, result.stderr
        return len(hub.requests("PUT /storage")) - before

    info = read_info(own)
    assert push() == 2
    commits = len(hub.repos["me/digits"].commits)
    assert push() == 0
    assert len(hub.repos["me/digits"].commits) == commits
    repo = hub.repos["me/digits"]
    hub.commit(repo, "main", {**repo.files, "old-00002-of-00002.safetensors": b"x", "my.png": b"y"})
    assert push() == 0
    assert "old-00002-of-00002.safetensors" not in repo.files, "a loader could take it"
    assert "my.png" in repo.files

    local = {"config": {"data": {"path": "/home/somebody/secret"}}}
    write_info(own, dataclasses.replace(info, training={**info.training, **local}))
    try:
        assert push() == 0
    finally:
        write_info(own, info)
    assert b"secret" not in repo.files["apt.json"]
    assert b'"path": ""' in repo.files["apt.json"]


def test_a_branch_is_made(hub: HubServer, own: Path, tmp_path: Path) -> None:
    result = run_cli(hub, tmp_path, "push", own, "me/digits", "--revision", "try", token=TOKEN)
    assert result.returncode == 0, result.stderr
    repo = hub.repos["me/digits"]
    assert "apt.json" in repo.commits[repo.branches["try"]] and "apt.json" not in repo.files


def test_uploads_that_fail_are_tried_again(hub: HubServer, own: Path, tmp_path: Path) -> None:
    hub.faults.cuts = 1
    result = run_cli(hub, tmp_path, "push", own, "me/digits", token=TOKEN)
    assert result.returncode == 0, result.stderr
    assert load_file(own / "transformer.safetensors")
    assert "transformer.safetensors" in hub.repos["me/digits"].files


def test_who_may_not_push_is_told(hub: HubServer, own: Path, tmp_path: Path) -> None:
    line = error_line(run_cli(hub, tmp_path, "push", own, "me/digits"))
    assert "needs a token with write access; log in with `hf auth login`, or set HF_TOKEN" in line
    line = error_line(run_cli(hub, tmp_path, "push", own, "me/digits", token=STRANGER))
    assert "the Hub refuses (403)" in line
    line = error_line(run_cli(hub, tmp_path, "push", own, "not an id", token=TOKEN))
    assert "is not a name on the Hub" in line
    line = error_line(
        run_cli(hub, tmp_path, "push", own, "me/digits", token=TOKEN, HF_HUB_OFFLINE="1")
    )
    assert "HF_HUB_OFFLINE is set" in line
    assert not hub.repos


def test_what_others_could_not_load_is_not_pushed(wan: Path, own: Path, tmp_path: Path) -> None:
    line = error_line(invoke("push", tmp_path, "me/x"))
    assert "has no apt.json" in line
    local = save_bundle(tmp_path / "l", load_bundle(wan), external_text_encoder=True)
    line = error_line(invoke("push", local, "me/x"))
    assert "which others do not have" in line and "--format diffusers" in line
    for file in own.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "transformer.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    assert "is truncated" in error_line(invoke("push", tmp_path, "me/x"))


def test_pull_a_pipeline_and_use_it(hub: HubServer, wan: Path, tmp_path: Path) -> None:
    sha = hub.add("owner/wan", wan)
    result = run_cli(hub, tmp_path / "home", "pull", "owner/wan")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.name == sha
    assert not list(folder.glob("transformer_2/*.safetensors")), "one step does not need it"
    assert len(list(folder.glob("transformer/*.safetensors"))) > 1

    # By its id, without a connection, and pinned to the commit.
    code = """
import sys, apt
bundle = apt.load_bundle("owner/wan")
print(bundle.info.codec.config["repo"], bundle.info.codec.config["revision"])
print(apt.OneStepPipeline(bundle)(sys.argv[1], num_steps=1, frames=5, height=16, width=16).shape)
"""
    result = run_python(hub, tmp_path / "home", code, PROMPT, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == f"owner/wan {sha}"

    here = tmp_path / "here"
    result = run_cli(
        hub, tmp_path / "home", "pull", f"owner/wan@{sha}", "--local-dir", here, "--everything"
    )
    assert result.returncode == 0, result.stderr
    assert list(here.glob("transformer_2/*.safetensors"))
    assert (here / "model_index.json").read_bytes() == (wan / "model_index.json").read_bytes()


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_branch_that_moves_meanwhile_gives_one_commit(
    hub: HubServer, own: Path, tmp_path: Path, place: str
) -> None:
    files = {path.name: path.read_bytes() for path in own.iterdir()}
    commits = [{**files, f"{number}/config.json": b"{}"} for number in range(9)]
    hub.add("owner/model", commits[0])
    hub.faults.moves = commits[1:]
    local_dir = () if place == "cache" else ("--local-dir", tmp_path / "here")
    result = run_cli(hub, tmp_path / "home", "pull", "owner/model", *local_dir)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    got = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }
    assert got in commits and len(hub.faults.moves) < len(commits) - 1


def test_by_its_id_only_the_transformer_comes(hub: HubServer, wan: Path, tmp_path: Path) -> None:
    hub.add("owner/wan", wan)
    code = "import apt; print(type(apt.load_model('owner/wan')).__name__)"
    result = run_python(hub, tmp_path, code)
    assert result.stdout.strip() == "Wan", result.stderr
    assert hub.requests("/transformer/diffusion")
    assert not hub.requests("/vae/diffusion") and not hub.requests("/text_encoder/model")


def test_the_whole_way_of_an_export(hub: HubServer, wan: Path, tmp_path: Path) -> None:
    """Pull, train (here: scale), export, push; a fresh process generates from the pushed id."""
    bundle = load_bundle(wan)
    bundle.info = dataclasses.replace(
        bundle.info,
        stage="apt",
        sampling=SamplingInfo(),
        sample=dataclasses.replace(bundle.info.sample, frames=5, height=16, width=16),
        training=training(),
    )
    save_bundle(tmp_path / "run", bundle, external_text_encoder=True)
    export_model(tmp_path / "run", tmp_path / "out", format="diffusers")
    result = run_cli(hub, tmp_path / "a", "push", tmp_path / "out", "me/one-step", token=TOKEN)
    assert result.returncode == 0, result.stderr
    card = ModelCard(hub.repos["me/one-step"].files["README.md"].decode())
    assert b"secret" not in hub.repos["me/one-step"].files["apt.json"]
    assert card.data.base_model == "Wan-AI/Some-Wan" and card.data.license == "apache-2.0"

    generate = """
import sys, torch, apt
pipeline = apt.OneStepPipeline.from_pretrained("me/one-step", device="cpu")
assert pipeline.stage == "apt"
torch.save(pipeline(sys.argv[1], seed=2), sys.argv[2])
"""
    result = run_python(hub, tmp_path / "b", generate, PROMPT, tmp_path / "video.pt")
    assert result.returncode == 0, result.stderr
    expected = apt.OneStepPipeline.from_pretrained(tmp_path / "out", device="cpu")(PROMPT, seed=2)
    assert torch.equal(torch.load(tmp_path / "video.pt"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pull", "owner/none"), "no such model, or it is private"),
        (("pull", "owner/model", "--revision", "none"), "has no revision 'none'"),
        (("pull", "owner/model@a", "--revision", "b"), "both name a revision"),
        (("pull", "wan2.1_t2v_1.3"), "did you mean 'wan2.1_t2v_1.3b'"),
        (("pull", "mmdit_small"), "no weights are published"),
        (("pull", "digits"), "'digits' is here already"),
        (("pull", "."), "'.' is here already"),
        (("pull", "owner/pickles"), "other formats are never read"),
        (("pull", "sd3.5_medium"), "accept the licence at"),
        (("generate", "--model", "owner/pickles", "--prompt", "x"), "has no apt.json"),
        (("generate", "--model", "owner/broken", "--prompt", "x"), "is truncated"),
    ],
)
def test_errors_are_one_line(
    hub: HubServer, own: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    hub.add("owner/model", own)
    hub.add("owner/pickles", {"model.bin": b"\x80\x04.", "x.json": b"{}"})
    hub.add("stabilityai/stable-diffusion-3.5-medium", {"model_index.json": b"{}"}, gated=True)
    whole = {path.name: path.read_bytes() for path in own.iterdir()}
    whole["transformer.safetensors"] = whole["transformer.safetensors"][:-9]
    hub.add("owner/broken", whole)
    assert message in error_line(run_cli(hub, tmp_path, *arguments))


def test_published_weights_by_name(hub: HubServer, wan: Path, tmp_path: Path) -> None:
    hub.add("Wan-AI/Wan2.2-T2V-A14B-Diffusers", wan)
    code = (
        QUICK
        + """
import apt, dataclasses, json
from apt.checkpoints.source import locate
from apt.models import FAMILIES
repo = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
config = json.loads((locate(repo).folder / "transformer" / "config.json").read_text())
options = vars(FAMILIES.create("wan").from_diffusers(config))
for name in ("wan2.2_t2v_a14b", "wan2.2_t2v_a14b.low_noise"):
    model = apt.create_model(name, pretrained=True, **options)
    print(float(next(model.parameters()).double().sum()))
"""
    )
    code += """
from apt.checkpoints.load import describe_model, load_model
for name in ("wan2.2_t2v_a14b", "wan2.2_t2v_a14b.low_noise", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"):
    backbone, info = load_model(name), describe_model(name)
    value = float(next(backbone.parameters()).double().sum())
    print(value, info.model.architecture, info.sample.height)
"""
    result = run_python(hub, tmp_path, code)
    assert result.returncode == 0, result.stderr
    high, low, *lines = (line.split() for line in result.stdout.splitlines())
    assert high != low
    assert [line[:1] for line in lines] == [high, low, high]
    assert {(line[1], line[2]) for line in lines} == {("wan2.2_t2v_a14b", "720")}
    result = run_cli(hub, tmp_path, "pull", "wan2.2_t2v_a14b")
    assert result.returncode == 0, result.stderr


def info(own: Path, **changes: object) -> ModelInfo:
    return dataclasses.replace(load_bundle(own).info, **changes)  # type: ignore[arg-type]


def test_the_card_carries_the_record(own: Path, tmp_path: Path) -> None:
    text = make_card(info(own, training=training()), "me/model", own)
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert data.base_model == "Wan-AI/Some-Wan"
    assert data.pipeline_tag == "text-to-video"
    assert "one-step" in data.tags
    assert text.index("| distil | 500 |") < text.index("| apt_video | 300 | 64 | 1 | ema |")
    assert "| FVD | 12.5 |" in text
    assert 'from_pretrained("me/model")' in text
    assert "secret" not in text, "paths of the machine are nobody's business"
    assert "from diffusers import" not in text
    (tmp_path / "model_index.json").write_text("{}")
    text = make_card(info(own, training=training()), "me/model", tmp_path)
    assert ModelCard(text).data.library_name == "diffusers"
    assert "num_inference_steps=1" in text and "num_frames=9" in text
    assert "Videos of 9 frames at 8 fps, 32x32" in text
    own_rates = dataclasses.replace(info(own).sample, fps=0.0)
    assert "Videos of 9 frames, 32x32" in make_card(info(own, sample=own_rates), "me/model", own)


def test_the_card_names_the_module_of_somebodys_own_parts(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "do not belong to the package" not in make_card(info(own), "me/model", own)
    known = info(own)
    ours = dataclasses.replace(known.model, architecture="my_mixer")
    handed_over = dataclasses.replace(known.text_encoder, architecture="their_code.words.Words")
    monkeypatch.setitem(MODELS._builders, "my_mixer", MixerConfig)
    text = make_card(info(own, model=ours, text_encoder=handed_over), "me/model", own)
    assert "import tests.train.own_classes\nimport their_code.words\n" in text
    assert "generate --import tests.train.own_classes ..." in text


def test_a_licence_that_the_hub_has_no_name_for(own: Path) -> None:
    record = {"source": "a/b", "license": "stabilityai-ai-community"}
    data = ModelCard(make_card(info(own, training=record), "me/model", own)).data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "stabilityai-ai-community"
    assert data["license_link"].endswith("/a/b")
    text = make_card(info(own, training=record), "me/model", own)
    assert "stabilityai-ai-community, carried over from a/b." in text
    text = make_card(info(own, training=record), "me/model", own, license="my-licence")
    data = ModelCard(text).data.to_dict()
    assert data["license_name"] == "my-licence" and "license_link" not in data
    assert "my-licence." in text and "carried over" not in text
    data = ModelCard(make_card(info(own), "me/model", own)).data.to_dict()
    assert "license" not in data and "base_model" not in data


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.slow
def test_a_disk_that_is_really_full(hub: HubServer, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False)
    if mount.returncode:
        pytest.skip("this machine mounts nothing")
    try:
        save_file({"x": torch.zeros(10**6)}, tmp_path / "x.safetensors")
        hub.add("owner/model", {"x.safetensors": (tmp_path / "x.safetensors").read_bytes()})
        line = error_line(run_cli(hub, tmp_path, "pull", "owner/model", "--local-dir", disk))
        assert "the disk is full (No space left on device)" in line
        assert not list(disk.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", disk], check=True)

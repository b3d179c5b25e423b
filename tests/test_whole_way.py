"""From a public checkpoint and a folder of files to a one-step model that others load.

Every step is a command in a fresh process, against a Hub on loopback that has tiny random weights
under the real names. At the end, stock diffusers runs the pushed model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.checkpoints.info import read_info
from apt.rng import Draw, sample_noise
from apt.train.logs import read_log
from tests.data.media import noise, write_image, write_video
from tests.hub.processes import QUICK, Result, run_cli, run_python
from tests.hub.server import TOKEN, HubServer
from tests.hub.tiny_pipelines import sd3_folder, wan_folder
from tests.models.test_text_transformers import PROMPTS

WAN, SD35 = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "stabilityai/stable-diffusion-3.5-medium"
PROMPT = PROMPTS[0]
SMALL = ("--num-updates", "2", "--batch-size", "2", "--device", "cpu", "--data.num-workers", "0")
SIZE = ("--height", "32", "--width", "32", "--no-native-ratio")

# What stock diffusers makes of a repository in one step from given noise, in fp32 throughout.
STOCK = """
import sys, torch, diffusers, numpy as np
repo, noise, out, frames = sys.argv[1:]
pipe = diffusers.DiffusionPipeline.from_pretrained(repo, torch_dtype=torch.float32)
size = {"num_frames": int(frames)} if int(frames) > 1 else {}
made = pipe(
    PROMPT, latents=torch.load(noise), height=32, width=32, num_inference_steps=1,
    guidance_scale=1.0, output_type="np", **size,
)
np.save(out, made.frames[0] if int(frames) > 1 else made.images)
"""
# The same from ours: text encoders of public models are bf16 unless told otherwise.
OURS = """
import sys, dataclasses, numpy as np, torch
from apt.models import create_text_encoder
from apt.checkpoints.load import load_bundle
from apt.pipeline import OneStepPipeline
repo, out, frames = sys.argv[1:]
bundle = load_bundle(repo)
part = bundle.info.text_encoder
bundle.text_encoder = create_text_encoder(part.architecture, **{**part.config, "dtype": "float32"})
pixels = OneStepPipeline(bundle).sample_pixels(
    PROMPT, seed=5, frames=int(frames), height=32, width=32
)
np.save(out, ((pixels[0] + 1) / 2).permute(1, 2, 3, 0).numpy())
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class User:
    """Somebody at a terminal: commands run in fresh processes, in one folder, with one cache."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub = hub
        self.folder = folder

    def run(self, *args: str | Path, **env: str) -> Result:
        result = run_cli(self.hub, self.folder / "home", *args, token=TOKEN, **env)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    def python(self, code: str, *args: str | Path) -> None:
        code = QUICK + f"PROMPT = {PROMPT!r}\n" + code
        result = run_python(self.hub, self.folder / "home", code, *args, token=TOKEN)
        assert result.returncode == 0, result.stderr[-3000:]


def media(folder: Path, *, videos: bool) -> Path:
    """Real files: .mp4 with a caption beside each, or images with a table of captions."""
    for number, caption in enumerate(PROMPTS[:2]):
        if videos:
            write_video(folder / f"{number}.mp4", noise(9, 32, 32, number), 8)
            (folder / f"{number}.txt").write_text(caption)
        write_image(folder / f"still{number}.png", noise(1, 32, 32, number)[0])
    rows = [f"still{number}.png,{caption}" for number, caption in enumerate(PROMPTS[:2])]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]) + "\n")
    return folder


def agree(
    user: User, repo: str, latent_shape: tuple[int, ...], frames: int, tmp_path: Path
) -> None:
    """Our pipeline and the stock one make the same pictures from the same noise."""
    z = sample_noise(1, latent_shape, Draw(5, stream="generate"))
    torch.save(z if frames > 1 else z[:, :, 0], tmp_path / "noise.pt")
    user.python(STOCK, repo, tmp_path / "noise.pt", tmp_path / "stock.npy", str(frames))
    user.python(OURS, repo, tmp_path / "ours.npy", str(frames))
    stock, ours = np.load(tmp_path / "stock.npy"), np.load(tmp_path / "ours.npy")
    assert stock.shape == ours.shape == (frames, 32, 32, 3)
    assert ours.std() > 0.01, "a flat picture would agree with anything"
    np.testing.assert_allclose(ours, stock, atol=1e-3)


def test_wan_from_videos(hub: HubServer, tmp_path: Path) -> None:
    hub.add(WAN, wan_folder(tmp_path / "published"))
    user = User(hub, tmp_path)
    videos, cache, runs = (
        media(tmp_path / "videos", videos=True),
        tmp_path / "cache",
        tmp_path / "runs",
    )

    user.run("pull", "wan2.1_t2v_1.3b")
    user.run("data", "check", videos)
    user.run(
        "data", "encode", videos, cache, "--model", "wan2.1_t2v_1.3b",
        "--frames", "9", "--fps", "8", *SIZE,
    )  # fmt: skip
    data = ("--data.path", cache)
    for recipe, stage, source in (
        ("wan_distill", "distill", ()),
        ("apt_image_wan", "image", ("--stage.generator", runs / "distill" / "export")),
        ("apt_video_wan", "video", ("--stage.generator", runs / "image" / "export")),
    ):
        user.run("train", recipe, *SMALL, *data, *source, "--run-dir", runs / stage,
                 "--snapshot-at")  # fmt: skip
        assert [entry["step"] for entry in read_log(runs / stage)] == [1, 2]
    info = read_info(runs / "video" / "export")
    assert (info.stage, info.sample.frames, info.sample.fps) == ("apt", 9, 8.0)

    user.run("export", runs / "video", tmp_path / "out", "--format", "diffusers")
    user.run("push", tmp_path / "out", "me/wan-one-step")
    card = hub.repos["me/wan-one-step"].files["README.md"].decode()
    assert f"base_model: {WAN}" in card and "apache-2.0" in card.lower()

    other = User(hub, tmp_path / "elsewhere")
    video = tmp_path / "video.mp4"
    other.run("generate", "--model", "me/wan-one-step", "--prompt", PROMPT, "--out", video)
    assert video.stat().st_size > 0
    agree(other, "me/wan-one-step", (16, 3, 4, 4), 9, tmp_path)


def test_sd35_from_images(hub: HubServer, tmp_path: Path) -> None:
    hub.add(SD35, sd3_folder(tmp_path / "published"))
    user = User(hub, tmp_path)
    images, cache, runs = (
        media(tmp_path / "images", videos=False),
        tmp_path / "cache",
        tmp_path / "runs",
    )

    user.run("data", "encode", images, cache, "--model", "sd3.5_medium", *SIZE)
    data = ("--data.path", cache)
    user.run("train", "sd35_distill", *SMALL, *data, "--run-dir", runs / "distill")
    user.run("train", "apt_image_sd35", *SMALL, *data, "--run-dir", runs / "image",
             "--stage.generator", runs / "distill" / "export", "--snapshot-at")  # fmt: skip
    user.run("export", runs / "image", tmp_path / "out", "--format", "diffusers")
    user.run("push", tmp_path / "out", "me/sd35-one-step", "--private")

    other = User(hub, tmp_path / "elsewhere")
    picture = tmp_path / "picture.png"
    other.run("generate", "--model", "me/sd35-one-step", "--prompt", PROMPT, "--out", picture)
    assert picture.stat().st_size > 0
    agree(other, "me/sd35-one-step", (16, 1, 8, 8), 1, tmp_path)

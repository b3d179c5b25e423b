"""The recipe for a user's own folder, from files to a video, with networks of a few thousand
weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from apt.checkpoints.info import SampleInfo, read_description, read_info
from apt.data.decode import probe
from apt.errors import InputError
from apt.methods import AutoencoderConfig, DistillConfig, PretrainConfig
from apt.models import CODECS, MODELS, create_codec, create_model
from apt.models.codec_diffusers import DiffusersCodecConfig
from apt.train.config import TrainConfig
from apt.train.recipes import RECIPES
from tests.cli.shell import error_line, invoke
from tests.data.media import noise, numbered, write_image, write_video

FAST = (
    "--num-updates", "2", "--batch-size", "2", "--device", "cpu", "--sample-every", "2",
    "--optimizer.decay-updates", "0", "--snapshot-at",
)  # fmt: skip
TINY = (
    "--model.options", "hidden_size", "24", "depth", "2", "num_heads", "2",
    "--model.codec-options", "channels", "4", "encoder_blocks", "1", "decoder_blocks", "1",
)  # fmt: skip


def stages(**options: str) -> list[TrainConfig]:
    return list(RECIPES.create("own", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and tall videos of two rates, and an image."""
    root = tmp_path_factory.mktemp("own") / "clips"
    (root / "more").mkdir(parents=True)
    files = [
        write_video(root / "a b.mp4", numbered(12, 32, 48), 8),
        write_video(root / "c.mp4", numbered(12, 32, 48), 8),
        write_video(root / "more" / "d.mkv", numbered(20, 32, 48), 16),
        write_video(root / "tall.mp4", numbered(12, 48, 32), 8),
        write_image(root / "still.png", noise(1, 40, 60)[0]),
    ]
    for file in files:
        file.with_suffix(".txt").write_text(f"ein {file.stem}, schön", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def trained(clips: Path) -> Path:
    """All four stages in a row."""
    run_dir = clips.parent / "run"
    options = ("--codec", "digits_ae", "--data.path", clips, "--run-dir", run_dir)
    result = invoke("train", "own", *options, *FAST, *TINY)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"own_{stage}: {run_dir / stage / 'export'}"
        for stage in ("codec", "pretrain", "distill", "apt")
    ]
    (clips.parent / "said.txt").write_text(result.stderr)
    return run_dir


def test_every_stage_has_the_size_of_the_folder_and_says_so(trained: Path) -> None:
    size = SampleInfo(frames=9, height=32, width=48, fps=8.0)
    for stage in ("codec", "pretrain", "distill", "apt"):
        assert read_description(trained / stage / "export").sample == size
        written = json.loads((trained / stage / "config.json").read_text())["data"]
        assert (written["frames"], written["height"], written["width"]) == (9, 32, 48)
        assert written["fps"] == 8.0 and written["size_multiple"] == 8
    said = (trained.parent / "said.txt").read_text().splitlines()
    assert [line for line in said if line.startswith("  size: ")] == [
        "  size: 9 frames of 32x48 at 8 fps, which most of 4 videos and 1 image can provide",
        "  size: 9 frames of 32x48 at 8 fps, taken from the codec that it starts from",
        *["  size: 9 frames of 32x48 at 8 fps, taken from the model that it starts from"] * 2,
    ]


def test_prompts_and_guidance_go_from_stage_to_stage(trained: Path) -> None:
    configs = {
        stage: json.loads((trained / stage / "config.json").read_text())
        for stage in ("codec", "pretrain", "distill", "apt")
    }
    captions = [f"ein {stem}, schön" for stem in ("a b", "c", "d", "still", "tall")]
    shown = {stage: config["sample_prompts"] for stage, config in configs.items()}
    assert shown == {"codec": [], "pretrain": captions, "distill": captions, "apt": captions}
    before, loss = configs["pretrain"]["stage"], configs["distill"]["stage"]["loss"]
    assert loss == {
        "num_timesteps": before["num_steps"],
        "cfg_scale": before["cfg_scale"],
        "timestep_shift": before["sampling_shift"],
    }
    info = read_info(trained / "apt" / "export")
    assert info.model.config["in_channels"] == info.codec.config["channels"] == 4
    assert len(info.codec.config["latents_mean"]) == 4


def test_it_generates_without_another_option(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    result = invoke(
        "generate",
        "--model",
        trained / "apt" / "export",
        "--prompt",
        "ein c",
        "--out",
        out,
        "--scale",
        "1",
    )
    assert result.returncode == 0, result.stderr
    made = probe(out)
    assert (made.frames, made.height, made.width, made.fps) == (9, 32, 48, 8)


def test_a_run_goes_on_although_files_were_added(trained: Path, clips: Path) -> None:
    moved = trained.parent / "again"
    shutil.copytree(trained / "pretrain", moved)
    more = trained.parent / "more"
    shutil.copytree(clips, more)
    for i in range(9):
        write_video(more / f"new{i}.mp4", numbered(40, 64, 64), 24)
        (more / f"new{i}.txt").write_text("new", encoding="utf-8")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"num_updates": 3}))
    result = invoke("train", "--resume", moved, "--data.path", clips)
    assert result.returncode == 0, result.stderr
    assert "  size:" not in result.stderr
    assert "differ in files" in invoke("train", "--resume", moved, "--data.path", more).stderr
    # The recipe, which leaves the size open, goes on too.
    options = ("--data.path", clips, "--run-dir", moved, *FAST[2:], *TINY)
    codec = ("--codec", trained / "codec" / "export")
    again = invoke("train", "own_pretrain", *codec, *options, "--num-updates", "4", "--resume")
    assert again.returncode == 0, again.stderr


def test_what_is_printed_can_be_read_back(clips: Path, tmp_path: Path) -> None:
    printed = invoke("train", "own", "--size", "mini", "--data.path", clips, "--print-config")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "own.json").write_text(printed.stdout)
    again = invoke("train", "--config", tmp_path / "own.json", "--print-config")
    assert again.stdout == printed.stdout
    configs = json.loads(printed.stdout)
    assert configs[1]["model"]["name"] == "mmdit_mini"
    assert configs[0]["data"]["frames"] is None and configs[0]["data"]["max_frames"] == 33


def test_a_folder_of_images_makes_images(clips: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        write_image(images / f"{i}.png", noise(1, 40, 64, i)[0])
    options = ("--codec", "digits_ae", "--data.path", images, "--run-dir", tmp_path / "run")
    result = invoke("train", "own_codec", *options, *FAST, *TINY)  # which needs no captions
    assert result.returncode == 0, result.stderr
    assert read_description(tmp_path / "run" / "export").sample == SampleInfo(
        frames=1, height=40, width=64, fps=0.0
    )
    for i in range(3):
        (images / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    codec = ("--codec", tmp_path / "run" / "export", "--data.path", images)
    made = invoke("train", "own_pretrain", *codec, "--run-dir", tmp_path / "model", *FAST, *TINY)
    assert made.returncode == 0, made.stderr
    model = ("--model", tmp_path / "model" / "export", "--prompt", "picture 1", "--num-steps", "1")
    drawn = invoke("generate", *model, "--out", tmp_path / "x.png")
    assert drawn.returncode == 0, drawn.stderr
    for file in images.glob("*.txt"):
        file.unlink()
    # The row would need them, and says so before anything is trained.
    line = error_line(invoke("train", "own", *options[:-1], tmp_path / "row", *FAST, *TINY))
    assert "nothing usable" in line and "0.txt is missing" in line
    assert not (tmp_path / "row").exists()


def test_errors_are_one_line_each(clips: Path, tmp_path: Path) -> None:
    def said(*options: str | Path) -> str:
        return error_line(invoke("train", "own", "--run-dir", tmp_path / "run", *options))

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no such folder" in said("--data.path", tmp_path / "nowhere")
    assert "nothing usable" in said("--data.path", empty)
    assert "--data.path is empty" in said()
    (empty / "a.mp4").write_bytes(b"not a video")
    (empty / "a.txt").write_text("a")
    assert "1 file that cannot be read" in said("--data.path", empty)
    write_video(empty / "a.mp4", numbered(3, 32, 32), 8)
    assert "fewer than 5 frames at 8 fps" in said("--data.path", empty)
    assert "unknown model 'mmdit_x'" in said("--data.path", clips, "--model.name", "mmdit_x")


def test_its_own_options_are_explained_and_checked() -> None:
    text = invoke("train", "own", "--help").stdout
    assert "--size: size of the model: tiny (4 M parameters" in text and "--codec: video_ae" in text
    assert "(default: tiny)\n  --codec" in text
    wrong = invoke("train", "own", "--size", "huge")
    assert wrong.returncode == 2 and "'huge'" in wrong.stderr and "'mini'" in wrong.stderr


def test_an_option_of_one_stage_is_not_one_of_the_row() -> None:
    result = invoke("train", "own", "--stage.cfg-scale", "3")
    line = error_line(result)
    assert line.startswith("no such option: --stage.cfg-scale 3;")
    assert "that was own_codec, one of 4 stages" in line
    assert line.endswith("own_codec, own_pretrain, own_distill, own_apt")


def test_a_stage_whose_start_is_not_there_names_the_option(clips: Path, tmp_path: Path) -> None:
    asked = ("train", "own_distill", "--data.path", clips, "--run-dir", tmp_path / "run")
    line = error_line(invoke(*asked, "--stage.teacher", tmp_path / "none"))
    assert line.startswith("cannot start from --stage.teacher: there is no model")


def test_the_stages_hang_together() -> None:
    codec, pretrain, distill, apt = stages()
    assert [config.name for config in (codec, pretrain, distill, apt)] == [
        "own_codec", "own_pretrain", "own_distill", "own_apt",
    ]  # fmt: skip
    assert isinstance(codec.stage, AutoencoderConfig)
    assert isinstance(pretrain.stage, PretrainConfig)
    assert isinstance(distill.stage, DistillConfig)
    assert pretrain.stage.codec == f"{codec.run_dir}/export"
    assert distill.stage.teacher == f"{pretrain.run_dir}/export"
    assert apt.stage.generator == f"{distill.run_dir}/export"  # type: ignore[attr-defined]
    assert apt.stage.discriminator == f"{pretrain.run_dir}/export"  # type: ignore[attr-defined]
    for config in (codec, pretrain, distill, apt):
        data = config.data
        assert {data.frames, data.height, data.width, data.fps, data.size_multiple} == {None}
        assert config.sample_prompts is None and config.negative_prompt is None


def test_a_factor_shortens_every_stage_alike() -> None:
    whole = stages()
    short = list(RECIPES.create("own", updates_factor=0.1))  # type: ignore[arg-type]
    for before, after in zip(whole, short, strict=True):
        assert after.num_updates == before.num_updates / 10
        assert after.optimizer.decay_updates == before.optimizer.decay_updates / 10
        assert after.optimizer.warmup_updates <= after.num_updates / 2
        assert max(after.snapshot_at, default=0) <= after.num_updates
        # The same share of the exported average is the weights that the run starts from.
        left = [config.ema_decay**config.num_updates for config in (before, after)]
        assert left[0] == pytest.approx(left[1])
    assert list(RECIPES.create("own", updates_factor=1.0)) == whole  # type: ignore[arg-type]
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="updates_factor must be"):
            RECIPES.create("own_apt", updates_factor=wrong)


@pytest.mark.parametrize("size", ["tiny", "mini", "small"])
def test_sizes_fit_their_codec_text_encoder_and_largest_clips(size: str) -> None:
    codec, pretrain, *_ = stages(size=size)
    model = pretrain.model
    config = MODELS.get(model.name)()
    latents = create_codec(codec.model.codec)
    assert config.in_channels == latents.channels
    side = int(codec.data.max_pixels**0.5)
    frames = codec.data.max_frames
    assert config.token_grid(latents.latent_shape(frames, side, side))
    if size != "small":
        built = create_model(model.name, **model.options)
        text = RECIPES.create("own_pretrain", size=size).model  # type: ignore[union-attr]
        assert built.config.text_dim == 128 and text.text_encoder == "bytes"


def test_a_codec_that_is_ready_needs_no_stage() -> None:
    for name in CODECS.names():
        if isinstance(CODECS.get(name)(), DiffusersCodecConfig):
            first, *rest = stages(codec=name)
            assert first.model.codec == name and len(rest) == 2
            assert isinstance(first.stage, PretrainConfig) and not first.stage.codec
    first, *_ = stages(codec="some/folder")
    assert isinstance(first.stage, PretrainConfig) and first.stage.codec == "some/folder"
    with pytest.raises(InputError, match="size"):
        RECIPES.create("own", size="huge")

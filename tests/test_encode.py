"""Encoding a folder once, and training on the result without VAE or text encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.checkpoints.info import ModelInfo, SampleInfo, read_info
from apt.checkpoints.load import ModelBundle, component_info, load_bundle
from apt.checkpoints.save import save_bundle
from apt.data.dataset import Sample
from apt.data.folder import VideoFolder
from apt.data.latents import CLIPS_PER_SHARD, LatentFolder, read_cache_info
from apt.data.tar import write_tar
from apt.encode import encode_clips, open_cache, plan_cache
from apt.errors import ConfigError, InputError
from apt.losses import Consistency
from apt.methods.consistency import DistillConfig
from apt.models import create_codec, create_model, create_text_encoder
from apt.models.cached import CachedCodec, CachedTextEncoder
from apt.train.cache_parts import cached_codec, cached_text_encoder
from apt.train.config import DataConfig, OptimizerConfig, TrainConfig
from apt.train.logs import read_log
from apt.train.trainer import run
from tests.cli.shell import error_line, invoke
from tests.data.media import noise, truncate, write_image, write_video
from tests.models.test_codec_diffusers import tiny_wan
from tests.models.test_text_transformers import WIDTH, t5_model
from tests.models.tiny_tokenizers import unigram_tokenizer

CAPTIONS = ["a red seven moving left", "a blue four", "a green one moving up"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips, and a model on a public VAE and text encoder."""
    root = tmp_path_factory.mktemp("encode")
    for number, caption in enumerate(CAPTIONS):
        # Just as long as a clip, which then has one start
        write_video(root / "videos" / f"v{number}.mp4", noise(9, 16, 32, number), 8)
        (root / "videos" / f"v{number}.txt").write_text(caption)
    write_image(root / "videos" / "still.png", noise(1, 16, 32)[0])
    (root / "videos" / "still.txt").write_text("a still")
    torch.manual_seed(0)
    unigram_tokenizer(CAPTIONS).save_pretrained(root / "peer" / "tokenizer")
    t5_model("UMT5").save_pretrained(root / "peer" / "text_encoder")
    tiny_wan().save_pretrained(root / "peer" / "vae")
    make_model(root / "model", root / "peer")
    return root


def make_model(folder: Path, peer: Path, **vae: Any) -> ModelBundle:
    codec = create_codec("wan_vae", repo=str(peer), **vae)
    text = create_text_encoder(
        "umt5", repo=str(peer), dtype="float32", max_length=40
    )  # fmt: skip
    backbone = create_model("mmdit_small", hidden_size=24, depth=2, num_heads=2, text_dim=WIDTH)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = ModelInfo(
        stage="diffusion",
        model=component_info("mmdit_small", backbone),
        text_encoder=component_info("umt5", text),
        codec=component_info("wan_vae", codec),
        sample=SampleInfo(frames=9, height=16, width=32, fps=8.0),
    )
    bundle = ModelBundle(backbone, text, codec, info)
    save_bundle(folder, bundle, external_text_encoder=True)
    return bundle


def encode(root: Path, out: Path, *options: str) -> str:
    size = ("--no-native-ratio", *options)
    result = invoke("data", "encode", root / "videos", out, "--model", root / "model", *size)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def cache(root: Path) -> Path:
    encode(root, root / "cache", "--prompts", "blurry")
    return root / "cache"


def test_latents_are_those_of_the_codec(root: Path, cache: Path) -> None:
    folder = LatentFolder(cache)
    bundle = load_bundle(root / "model")
    videos = VideoFolder(root / "videos", buckets=[(9, 16, 32), (1, 16, 32)], fps=8)
    expected = {
        videos.caption(i): bundle.codec.encode(videos[i].pixels[None])[0]
        for i in range(len(videos))
    }
    assert len(folder) == len(expected) == 4
    for index in range(4):
        sample = folder[index]
        torch.testing.assert_close(sample.latents, expected[sample.caption])


def test_shards_of_videos_become_shards_of_the_same_latents(
    root: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    files = sorted((root / "videos").iterdir())
    write_tar(tmp_path / "videos" / "a.tar", {path.name: path.read_bytes() for path in files})
    out = tmp_path / "cache"
    options = ("--source", "webdataset", "--shards", "tar", "--no-native-ratio")
    done = invoke("data", "encode", tmp_path / "videos", out, "--model", root / "model", *options)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.glob("latents-*")) == ["latents-00000.tar"]
    one, other = LatentFolder(cache), LatentFolder(out)
    assert len(one) == len(other)
    for index in range(len(one)):
        assert one[index].caption == other[index].caption
        assert torch.equal(one[index].latents, other[index].latents)


def test_what_a_data_set_gives_beside_captions_is_stored(root: Path, tmp_path: Path) -> None:
    class WithFirstFrame(VideoFolder):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return dataclasses.replace(sample, extra={"first_frame": sample.pixels[:, :1]})

    videos = WithFirstFrame(root / "videos", buckets=[(9, 16, 32), (1, 16, 32)], fps=8)
    codec = create_codec("patchify", temporal=1, spatial=8)
    part = component_info("patchify", codec)
    info, _ = plan_cache(videos, part, codec, None, size=(9, 16, 32), fps=8.0)
    open_cache(tmp_path, info)
    encode_clips(tmp_path, info, videos, codec, batch_size=2, progress=lambda done, total: None)
    stored = {
        sample.caption: sample for sample in map(LatentFolder(tmp_path).__getitem__, range(4))
    }
    for index in range(len(videos)):
        found = stored[videos.caption(index)]
        assert torch.equal(found.latents, codec.encode(videos[index].pixels[None])[0])
        assert torch.equal(found.extra["first_frame"], videos[index].pixels[:, :1])


def test_texts_are_those_of_the_encoder_in_any_batch(root: Path, cache: Path) -> None:
    bundle = load_bundle(root / "model")
    folder = LatentFolder(cache)
    assert set(folder.texts) == {*CAPTIONS, "a still", "", "blurry"}
    cached = cached_text_encoder(cache, bundle.info.text_encoder)
    for prompts in (CAPTIONS, ["blurry"], ["", "a still", ""]):
        ours, theirs = cached(prompts), bundle.text_encoder(prompts)
        torch.testing.assert_close(ours.tokens, theirs.tokens)
        assert (ours.mask is None) == (theirs.mask is None)
        assert ours.mask is None or torch.equal(ours.mask, theirs.mask)


def test_a_prompt_that_was_not_stored_is_named(root: Path, cache: Path) -> None:
    cached = cached_text_encoder(cache, read_info(root / "model").text_encoder)
    with pytest.raises(InputError, match=r"'something else'.*--prompts"):
        cached(["blurry", "something else"])


def distill(root: Path, name: str, data: DataConfig, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        name="distill",
        run_dir=str(root / name),
        stage=DistillConfig(teacher=str(root / "model"), loss=Consistency(num_timesteps=4)),
        data=data,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        num_updates=3,
        batch_size=2,
        sample_every=3,
        sample_prompts=("blurry", "a still"),
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def test_training_on_the_cache_is_training_on_the_videos_without_the_peers(
    root: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    videos = DataConfig(
        source="folder", path=str(root / "videos"), height=16, width=32, native_ratio=False
    )  # fmt: skip
    run(distill(root, "from_videos", videos))
    assert (root / "from_videos" / "samples").is_dir()
    away = root / "peer_away"
    (root / "peer").rename(away)
    try:
        run(distill(root, "from_cache", DataConfig(source="latents", path=str(cache))))
    finally:
        away.rename(root / "peer")
    assert "no sample sheets" in capfd.readouterr().err
    assert not (root / "from_cache" / "samples").exists()
    one, other = (read_log(root / name) for name in ("from_videos", "from_cache"))
    assert [entry["step"] for entry in other] == [1, 2, 3]
    for a, b in zip(one, other, strict=True):
        assert b["generator/loss"] == pytest.approx(a["generator/loss"], rel=1e-4)
        assert b["generator/grad_norm"] == pytest.approx(a["generator/grad_norm"], rel=1e-3)
    assert "samples/diversity" in other[-1]
    before, after = (read_info(root / n / "export") for n in ("from_videos", "from_cache"))
    assert after.codec == before.codec and after.text_encoder == before.text_encoder
    assert after.sample == SampleInfo(frames=9, height=16, width=32, fps=8.0)
    load_bundle(root / "from_cache" / "export")  # whole, now that the peers are back


def test_an_interruption_loses_one_shard_at_most(root: Path, tmp_path: Path) -> None:
    from apt.data.folder import VideoFolder
    from apt.encode import encode_clips, open_cache, plan_cache

    bundle = load_bundle(root / "model")
    videos = VideoFolder(root / "videos", buckets=[(1, 16, 16)])
    plan, _ = plan_cache(
        videos, bundle.info.codec, bundle.codec, None, size=(1, 16, 16), fps=0.0, clips_per_item=40
    )
    assert plan.num_clips == 160 > 2 * CLIPS_PER_SHARD

    def go(out: Path, progress: Callable[[int, int], None], **ranks: int) -> None:
        open_cache(out, plan)
        encode_clips(out, plan, videos, bundle.codec, batch_size=16, progress=progress, **ranks)

    def interrupt(done: int, total: int) -> None:
        if done > CLIPS_PER_SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", interrupt)
    (first,) = tmp_path.glob("out/latents-*")
    kept = first.stat().st_mtime_ns
    with pytest.raises(Exception, match="incomplete"):
        LatentFolder(tmp_path / "out")
    go(tmp_path / "out", lambda done, total: None)
    assert first.stat().st_mtime_ns == kept

    go(tmp_path / "shared", lambda done, total: None, rank=1, world_size=2)
    assert len(list(tmp_path.glob("shared/latents-*"))) == 1
    go(tmp_path / "shared", lambda done, total: None, rank=0, world_size=2)
    one, two = LatentFolder(tmp_path / "out"), LatentFolder(tmp_path / "shared")
    assert len(one) == len(two) == 160
    assert one.fingerprint == two.fingerprint
    assert all(torch.equal(one[i].latents, two[i].latents) for i in range(0, 160, 13))


def test_more_prompts_are_added_to_a_cache_that_is_there(root: Path, tmp_path: Path) -> None:
    encode(root, tmp_path / "cache")
    stamp = (tmp_path / "cache" / "latents-00000.safetensors").stat().st_mtime_ns
    encode(root, tmp_path / "cache", "--prompts", "ugly", "worse")
    assert {"ugly", "worse", ""} <= set(LatentFolder(tmp_path / "cache").texts)
    encode(root, tmp_path / "cache")  # fewer again: nothing is taken away
    assert "ugly" in LatentFolder(tmp_path / "cache").texts
    assert (tmp_path / "cache" / "latents-00000.safetensors").stat().st_mtime_ns == stamp


def test_a_cache_of_other_options_or_other_files_is_left_alone(root: Path, tmp_path: Path) -> None:
    encode(root, tmp_path / "cache")
    before = read_cache_info(tmp_path / "cache")
    arguments = ("data", "encode", root / "videos", tmp_path / "cache", "--model", root / "model")
    line = error_line(invoke(*arguments, "--no-native-ratio", "--dtype", "bfloat16"))
    assert "dtype" in line and "another folder" in line
    assert read_cache_info(tmp_path / "cache") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    line = error_line(
        invoke("data", "encode", root / "videos", tmp_path / "mine", "--model", root / "model")
    )
    assert "neither empty nor a latent cache" in line


def test_clips_that_no_model_of_them_could_make_are_not_encoded(root: Path, tmp_path: Path) -> None:
    arguments = ("data", "encode", root / "videos", tmp_path / "out", "--model", root / "model")
    for option, value in (("--height", "33"), ("--width", "3"), ("--frames", "8")):
        line = error_line(invoke(*arguments, option, value))
        assert f"; set {option} " in line and f"got {value}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--clips-per-item"])
def test_batches_of_nothing_write_nothing(root: Path, tmp_path: Path, option: str) -> None:
    arguments = ("data", "encode", root / "videos", tmp_path / "out", "--model", root / "model")
    assert f"{option} must be at least 1, got 0" in error_line(invoke(*arguments, option, "0"))
    assert not (tmp_path / "out").exists()


def test_broken_files_are_reported_and_left_out(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "videos", tmp_path / "videos")
    write_video(tmp_path / "videos" / "bad.mp4", noise(9, 16, 32, 9), 8, faststart=True, gop=3)
    (tmp_path / "videos" / "bad.txt").write_text("a broken one")
    truncate(tmp_path / "videos" / "bad.mp4", 0.5)
    result = invoke("data", "encode", tmp_path / "videos", tmp_path / "out", "--model",
                    root / "model")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "bad.mp4" in result.stdout and "unreadable" in result.stdout
    folder = LatentFolder(tmp_path / "out")
    assert sorted(folder[i].caption for i in range(len(folder))) == sorted([*CAPTIONS, "a still"])
    strict = invoke("data", "encode", tmp_path / "videos", tmp_path / "strict", "--model",
                    root / "model", "--strict")  # fmt: skip
    assert strict.returncode == 2 and "bad.mp4" in strict.stderr.splitlines()[-1]


def test_captions_that_are_too_long_are_left_out_or_cut(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "videos", tmp_path / "videos")
    long = f"{CAPTIONS[0]} {'and a blue four ' * 30}"
    (tmp_path / "videos" / "v0.txt").write_text(long)
    arguments = ("data", "encode", tmp_path / "videos")
    options = ("--model", root / "model", "--no-native-ratio")
    result = invoke(*arguments, tmp_path / "skipped", *options)
    assert result.returncode == 0, result.stderr
    assert "long caption: 1" in result.stdout and "v0.mp4" in result.stdout
    skipped = LatentFolder(tmp_path / "skipped")
    assert sorted(skipped[i].caption for i in range(len(skipped))) == sorted(
        [*CAPTIONS[1:], "a still"]
    )
    result = invoke(*arguments, tmp_path / "cut", *options, "--long-captions", "cut")
    assert result.returncode == 0 and "1 caption cut" in result.stdout
    cut = LatentFolder(tmp_path / "cut")
    (caption,) = {cut[i].caption for i in range(len(cut))} - {*CAPTIONS, "a still"}
    assert long.startswith(caption) and caption.startswith(CAPTIONS[0]) and caption in cut.texts
    line = error_line(invoke(*arguments, tmp_path / "no", *options, "--long-captions", "error"))
    assert line.startswith("v0.mp4: long caption") and not (tmp_path / "no").exists()
    line = error_line(invoke(*arguments, tmp_path / "no", *options, "--prompts", long))
    assert "at most 40 fit" in line and not (tmp_path / "no").exists()


def test_a_cache_that_does_not_fit_the_model_is_refused(root: Path, cache: Path) -> None:
    info = read_info(root / "model")
    other = dataclasses.replace(
        info.codec, config={**info.codec.config, "latents_mean": (1.0,) * 16}
    )
    with pytest.raises(ConfigError, match=r"a codec with other options.*latents_mean.*data encode"):
        cached_codec(cache, other)
    text = dataclasses.replace(info.text_encoder, architecture="t5")
    with pytest.raises(ConfigError, match=r"text encoder 'umt5'.*'t5'"):
        cached_text_encoder(cache, text)
    half = dataclasses.replace(info.codec, config={**info.codec.config, "dtype": "bfloat16"})
    assert cached_codec(cache, half).channels == 16  # computed in another type: the same codec


def test_a_model_with_an_encoder_of_its_own_needs_no_stored_texts(tmp_path: Path) -> None:
    from apt.data.digits import FPS, MovingDigits
    from apt.data.write import write_video_folder
    from tests.tiny import tiny_bundle

    save_bundle(tmp_path / "model", tiny_bundle("diffusion"))
    write_video_folder(MovingDigits(0), tmp_path / "videos", 3, FPS)
    encode(tmp_path, tmp_path / "cache", "--images", "none")
    assert read_cache_info(tmp_path / "cache").text_encoder is None
    run(distill(tmp_path, "run", DataConfig(source="latents", path=str(tmp_path / "cache"))))
    assert len(read_log(tmp_path / "run")) == 3
    with pytest.raises(ConfigError, match="no text embeddings"):
        cached_text_encoder(tmp_path / "cache", read_info(tmp_path / "model").text_encoder)


def test_stand_ins_refuse_what_they_cannot_do() -> None:
    codec = CachedCodec(None, channels=2, temporal_compression=4, spatial_compression=8)
    assert codec.latent_shape(9, 16, 32) == (3, 2, 4)
    for refused in (codec.encode, codec.decode):
        with pytest.raises(InputError, match="uses cached latents"):
            refused(torch.zeros(1))
    assert CachedTextEncoder(None, {}).embedding_dim == 0


def test_the_plan_is_json(root: Path, cache: Path) -> None:
    document = json.loads((cache / "latents.json").read_text())
    assert document["codec"]["config"]["repo"] == str(root / "peer")

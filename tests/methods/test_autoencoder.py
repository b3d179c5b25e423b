from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.fft import dctn

from apt.checkpoints.info import CODEC_FILE, CodecInfo, read_description
from apt.checkpoints.load import load_bundle, load_codec
from apt.data.dataset import Batch
from apt.data.digits import MovingDigits
from apt.data.write import write_video_folder
from apt.errors import ConfigError, InputError
from apt.methods.autoencoder import (
    AutoencoderConfig,
    AutoencoderTraining,
    gradient_error,
    pixel_error,
    whitened_error,
)
from apt.methods.base import MicroBatch
from apt.metrics.detail import patch_frequencies
from apt.models.codec_causal import CausalCodec
from apt.train.config import DataConfig, LoRAConfig, ModelConfig, TrainConfig
from apt.train.host import MicroBatches, RunHost
from apt.train.logs import read_log
from apt.train.recipes import RECIPES
from apt.train.sequence import is_finished
from apt.train.trainer import make_stage, run
from tests.cli.shell import error_line, invoke
from tests.train.tiny_methods import single

OPTIONS: dict[str, Any] = {"widths": (6, 8), "channels": 4, "decoder_blocks": 1}
SMALL_MODEL = {
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 16,
    "pooled_dim": 16,
}
SMALL_TEXT = {"width": 16, "depth": 1, "num_heads": 2, "alphabet": "ascii"}


def config(run_dir: Path, **changes: Any) -> TrainConfig:
    """The recipe with a tiny codec."""
    recipe = RECIPES.get("digits_codec")()
    assert isinstance(recipe, TrainConfig)
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": ModelConfig(codec="digits_ae", codec_options=OPTIONS),
        "optimizer": dataclasses.replace(
            recipe.optimizer, warmup_updates=0, decay_updates=0, learning_rate=5e-3
        ),
        "num_updates": 4,
        "batch_size": 2,
        "ema_decay": 0.9,
        "checkpoint_every": 2,
        "sample_every": 2,
        "precision": "fp32",
        "device": "cpu",
    }
    return dataclasses.replace(recipe, **{**base, **changes})


def later(name: str, run_dir: Path, codec: str, **changes: Any) -> TrainConfig:
    """Pre-training of a small model in the latents of a codec."""
    recipe = RECIPES.get(name)()
    assert isinstance(recipe, TrainConfig)
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "stage": dataclasses.replace(recipe.stage, codec=codec, num_steps=2),
        "model": dataclasses.replace(
            recipe.model, options=SMALL_MODEL, text_encoder_options=SMALL_TEXT
        ),
        "optimizer": dataclasses.replace(recipe.optimizer, warmup_updates=0, decay_updates=0),
        "num_updates": 2,
        "batch_size": 2,
        "sample_every": 0,
        "precision": "fp32",
        "device": "cpu",
    }
    return dataclasses.replace(recipe, **{**base, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates that nothing interrupted."""
    return run(config(tmp_path_factory.mktemp("codec") / "whole"))


def stage(**changes: Any) -> AutoencoderTraining:
    made = config(Path("unused"), **changes)
    begun = made.stage.begin(RunHost(made, single()))
    assert isinstance(begun, AutoencoderTraining)
    return begun


def batches(sizes: Sequence[int], *shape: int) -> list[MicroBatch]:
    x = torch.rand(sum(sizes), 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts, offset = [], 0
    for size in sizes:
        parts.append(MicroBatch(x[offset : offset + size], ["a clip"] * size, offset))
        offset += size
    return parts


# --- the objective ---------------------------------------------------------------------------


def test_errors_of_pixels_and_of_their_differences() -> None:
    pixels, output = torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2)
    output[..., 0, 0] = 1  # a still corner: a quarter of the pixels
    assert pixel_error(pixels, output).item() == 0.25
    # Half of the pairs along height and along width have it, none along time.
    assert gradient_error(pixels, output).item() == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert gradient_error(pixels, output + 0.7).item() == pytest.approx(1 / 3), "no constants"
    assert gradient_error(pixels[:, :, :1], output[:, :, :1]).item() == pytest.approx(0.5)
    assert gradient_error(torch.zeros(1, 3, 1, 1, 1), torch.ones(1, 3, 1, 1, 1)).item() == 0


def test_patch_frequencies_are_the_dct() -> None:
    clip = torch.rand(1, 3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    found = patch_frequencies(clip)
    expected = [
        dctn(clip[0, :, t, y : y + 8].numpy(), norm="ortho").reshape(3, 64)[:, 1:].reshape(-1)
        for t in range(2)
        for y in (0, 8)
    ]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-5)
    assert patch_frequencies(clip + 0.3).allclose(found, atol=1e-5), "no constants"


def test_weak_frequencies_weigh_as_much_as_strong_ones() -> None:
    pixels = torch.zeros(1, 3, 1, 8, 8)
    power = torch.linspace(0.01, 4, 189)
    scale = (power + 0.05**2).sqrt()
    basis = torch.autograd.functional.jacobian(patch_frequencies, pixels).reshape(189, 3, 1, 8, 8)
    for k in (0, 70, 188):  # one frequency wrong by its own strength
        error = whitened_error(pixels, pixels + scale[k] * basis[k], power)
        assert error.item() == pytest.approx(1 / 189, rel=1e-4)
    small = torch.zeros(1, 3, 1, 8, 4)
    assert whitened_error(small, small + 1, power).item() == 0


# --- an update -------------------------------------------------------------------------------


def test_nothing_depends_on_how_a_batch_is_cut() -> None:
    together, cut = stage(), stage()
    for update in range(2):
        one = together.update(batches([4], 5, 12, 16), update)
        other = cut.update(batches([2, 2], 5, 12, 16), update)
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other[name]))
    for name, values in together.statistics.items():
        torch.testing.assert_close(values, cut.statistics[name])
    ours, theirs = (s.generator.module.state_dict() for s in (together, cut))
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_raw_latents() -> None:
    trained = stage(optimizer=dataclasses.replace(config(Path("x")).optimizer, learning_rate=1e-12))
    for update in range(3):
        trained.update(batches([3], 5, 8, 8), update)
    module = trained.generator.module
    assert isinstance(module, CausalCodec)
    raw = module.encoder(batches([3], 5, 8, 8)[0].x).transpose(0, 1).flatten(1)
    codec = trained.measured(module.state_dict())
    torch.testing.assert_close(torch.tensor(codec.config.latents_mean), raw.mean(1))
    torch.testing.assert_close(torch.tensor(codec.config.latents_std), raw.std(1, correction=0))
    latents = codec.encode(batches([3], 5, 8, 8)[0].x)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        latents.std((0, 2, 3, 4), correction=0), torch.ones(4), atol=1e-4, rtol=0
    )


def test_every_weight_trains_and_the_error_falls() -> None:
    optimizer = dataclasses.replace(config(Path("x")).optimizer, learning_rate=2e-2)
    trained = stage(optimizer=optimizer)
    x = torch.stack([MovingDigits()[index].pixels[:, :5, 8:24, 8:24] for index in range(4)])
    clips = [MicroBatch(x, ["a digit"] * 4, 0)]
    first = trained.update(clips, 0)
    for update in range(1, 20):
        last = trained.update(clips, update)
    assert float(last["codec/pixels"]) < 0.8 * float(first["codec/pixels"])
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in trained.generator.module.parameters()
    )


def test_noise_reaches_the_decoder_alone() -> None:
    quiet, noisy = (
        stage(stage=AutoencoderConfig(latent_noise=0.0)),
        stage(stage=AutoencoderConfig(latent_noise=5.0)),
    )
    one, other = (s.update(batches([4], 5, 8, 8), 0) for s in (quiet, noisy))
    assert float(one["codec/latents"]) == float(other["codec/latents"])
    assert float(one["codec/pixels"]) != float(other["codec/pixels"])


# --- a run -----------------------------------------------------------------------------------


def test_a_run_leaves_a_codec(whole: Path) -> None:
    info = read_description(whole / "export")
    assert isinstance(info, CodecInfo)
    assert info.training["recipe"] == "digits_codec" and info.training["updates"] == 4
    assert is_finished(config(whole))
    codec = load_codec(whole / "export")
    assert isinstance(codec, CausalCodec) and len(codec.config.latents_std) == codec.channels == 4
    names = {"codec/pixels", "codec/gradients", "codec/frequencies", "codec/latents"}
    entries = read_log(whole)
    assert all(names <= entry.keys() for entry in entries) and len(entries) == 4
    assert (whole / "samples" / "00000002.png").is_file()


def test_a_resumed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    run(config(tmp_path / "cut", num_updates=3))
    run(config(tmp_path / "cut"), resume=True)
    for name in ("log.jsonl", f"export/{CODEC_FILE}", "samples/00000004.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (read_description(root / "export") for root in (tmp_path / "cut", whole))
    assert ours.codec == theirs.codec


def test_a_model_is_trained_in_its_latents(whole: Path, tmp_path: Path) -> None:
    codec = load_codec(whole / "export")
    assert isinstance(codec, CausalCodec)
    made = run(
        later(
            "digits_pretrain",
            tmp_path / "pretrain",
            str(whole / "export"),
            sample_every=2,
            sample_prompts=("a red seven moving left",),
        )
    )
    assert (made / "samples" / "00000002.png").is_file()
    bundle = load_bundle(made / "export")
    assert bundle.info.codec.weights == CODEC_FILE
    clip = MovingDigits(setting="free")[0].pixels[None]
    assert torch.equal(bundle.codec.encode(clip), codec.encode(clip))
    stored, original = (load_file(f / "export" / CODEC_FILE) for f in (made, whole))
    assert all(torch.equal(stored[name], original[name]) for name in original)


def test_latents_in_the_precision_of_the_run_are_nearly_those_in_fp32(whole: Path) -> None:
    clips = torch.stack([MovingDigits(setting="free")[index].pixels for index in range(2)])
    batch = Batch(clips, ["a red seven moving left"] * 2, offset=0, batch_index=0)

    def latents(precision: Literal["fp32", "bf16"]) -> torch.Tensor:
        made = later("digits_pretrain", Path("unused"), str(whole / "export"), precision=precision)
        (micro_batch,) = MicroBatches(make_stage(made, single()), lambda: batch, 1)
        return micro_batch.x

    exact, rounded = latents("fp32"), latents("bf16")
    assert torch.equal(exact, load_codec(whole / "export").encode(clips))
    assert rounded.dtype == exact.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.015


def test_on_a_cache_it_is_the_same_training(whole: Path, tmp_path: Path) -> None:
    write_video_folder(MovingDigits(setting="free"), tmp_path / "clips", 3, 8)
    made = invoke(
        "data", "encode", tmp_path / "clips", tmp_path / "cache", "--model", whole / "export",
        "--images", "none",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    folder = DataConfig(source="folder", path=str(tmp_path / "clips"), images="none")
    cache = DataConfig(source="latents", path=str(tmp_path / "cache"))
    for name, data in (("folder", folder), ("cache", cache)):
        run(later("digits_pretrain", tmp_path / name, str(whole / "export"), data=data))
    one, other = (read_log(tmp_path / name) for name in ("folder", "cache"))
    assert [e["generator/loss"] for e in one] == pytest.approx(
        [e["generator/loss"] for e in other], rel=1e-4
    )
    for name in ("folder", "cache"):
        assert (tmp_path / name / "export" / CODEC_FILE).is_file()

    # Latents of a codec with the same shape and other weights are not this codec's.
    changed = run(config(tmp_path / "other", num_updates=1, seed=1))
    with pytest.raises(
        ConfigError, match=r"was made by a codec with other options .*latents_mean \(cache: "
    ):
        run(later("digits_pretrain", tmp_path / "x", str(changed / "export"), data=cache))


# --- what cannot work ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(Path("x"), lora=LoRAConfig(rank=4)), "a codec has no adapters"),
        (
            lambda: config(Path("x"), data=DataConfig(source="latents", path="x")),
            "this stage trains on pixels",
        ),
        (
            lambda: config(Path("x"), stage=AutoencoderConfig(latent_noise=-1.0)),
            r"stage\.latent_noise",
        ),
        (
            lambda: config(Path("x"), stage=AutoencoderConfig(statistics_decay=1.0)),
            r"stage\.statistics_decay",
        ),
    ],
)
def test_configurations_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_codec_that_has_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'patchify' cannot be trained; .* digits_ae or video_ae"
    ):
        run(config(tmp_path, model=ModelConfig(codec="patchify")))


def test_models_that_do_not_fit_a_codec(whole: Path, tmp_path: Path) -> None:
    codec = str(whole / "export")
    write_video_folder(MovingDigits(), tmp_path / "clips", 1, 8)
    clips = DataConfig(
        source="folder", path=str(tmp_path / "clips"), height=30, native_ratio=False, images="none"
    )
    named = ModelConfig(options={"in_channels": 768})
    for given, changes, message in (
        ("", {"model": ModelConfig(codec="digits_ae")}, "'digits_ae' is not trained yet"),
        (codec, {"model": named}, "takes 768 channels, but codec 'digits_ae' has 4"),
        (codec, {"data": clips}, r"height must be a multiple of 8, .* set --data.height 24 or 32"),
        (str(tmp_path / "nowhere"), {}, "there is no model"),
    ):
        with pytest.raises(InputError, match=message):
            run(later("digits_pretrain", tmp_path / "x", given, **changes))


def test_a_clip_too_short_is_one_line(tmp_path: Path) -> None:
    write_video_folder(MovingDigits(), tmp_path / "clips", 1, 8)
    result = invoke(
        "train", "digits_codec", "--run-dir", tmp_path / "run", "--data.source", "folder",
        "--data.path", tmp_path / "clips", "--data.frames", "17",
    )  # fmt: skip
    line = error_line(result)
    assert "too short" in line and "9 frames at 8 fps, but the shortest bucket has 17" in line


def test_a_codec_where_a_model_is_meant(whole: Path, tmp_path: Path) -> None:
    result = invoke(
        "generate", "--model", whole / "export", "--prompt", "a red seven", "--out", "x.mp4"
    )
    assert "is a latent codec, not a whole model" in error_line(result)

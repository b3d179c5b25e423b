from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apt.checkpoints.bundle import ModelBundle, component_info, save_bundle
from apt.checkpoints.info import ModelInfo, SampleInfo, SamplingInfo
from apt.data.digits import HELDOUT_LABELS, TRAIN_LABELS, MovingDigits
from apt.errors import CheckpointError, ConfigError
from apt.evaluate import ClassifierConfig, EvaluateConfig, evaluate_digits
from apt.evaluate.clips import (
    caption_set,
    generate,
    real_for_captions,
    real_reference,
)
from apt.evaluate.digits_classifier import real_clips
from apt.evaluate.methods import APT, MAIN_METHODS, ablation_methods
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.pixels import to_uint8

TINY_CLASSIFIER = ClassifierConfig(width=4, features=8, steps=1, batch_size=4, test_clips=8)


def save_tiny_model(folder: Path, stage: str, seed: int, updates: int = 200) -> None:
    """A random model with the digits' real codec and sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_model(
            "mmdit_digits",
            hidden_size=32,
            depth=1,
            num_heads=1,
            num_dual_blocks=1,
            text_dim=16,
            pooled_dim=16,
        )
        text_encoder = create_text_encoder("bytes", width=16, depth=1, num_heads=1)
        # The output layer starts at zero, where every random model is the same.
        for parameter in backbone.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    codec = create_codec("patchify")
    info = ModelInfo(
        stage=stage,
        model=component_info("mmdit_digits", backbone),
        text_encoder=component_info("bytes", text_encoder),
        codec=component_info("patchify", codec),
        sample=SampleInfo(frames=9, height=32, width=32, fps=8),
        sampling=SamplingInfo(num_steps=1, cfg_scale=2.0),
        training={"updates": updates},
    )
    save_bundle(folder, ModelBundle(backbone, text_encoder, codec, info))


def write_log(run: Path, losses: list[float]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": i, "discriminator/loss": x, "generator/loss": 0.7})
        for i, x in enumerate(losses, start=1)
    ]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    save_tiny_model(root / "pretrain" / "export", "diffusion", seed=0)
    save_tiny_model(root / "distill" / "export", "consistency", seed=1)
    save_tiny_model(root / "apt" / "export", "apt", seed=2)
    save_tiny_model(root / "ablations" / "no_r1" / "export", "apt", seed=3, updates=100)
    for weights in ("ema", "raw"):
        save_tiny_model(root / "apt" / "snapshots" / "50" / weights, "apt", seed=4)
    save_tiny_model(root / "apt" / "snapshots" / "100" / "ema", "apt", seed=5)
    write_log(root / "apt", [1.386 - 0.01 * i for i in range(40)])
    write_log(root / "ablations" / "no_r1", [1.386 * 0.8**i for i in range(40)])
    return root


def tiny_config(runs: Path, out: Path, **options: object) -> EvaluateConfig:
    defaults: dict[str, object] = {
        "runs": runs,
        "out": out,
        "seeds": (0, 1),
        "num_samples": 8,
        "num_reference": 16,
        "snapshot_samples": 8,
        "classifier": TINY_CLASSIFIER,
        "methods": (
            "diffusion_1",
            "consistency_1",
            "apt_1",
            "ablation_no_r1",
            "ablation_small_batch",
        ),
    }
    return EvaluateConfig(**(defaults | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate_digits(tiny_config(runs, tmp_path_factory.mktemp("results")))


def test_report_shows_what_was_run_and_what_was_not(report: Path) -> None:
    text = report.read_text()
    assert "APT, 1 step | 200 | 1 |" in text
    assert "no regulariser | 100 | 1 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| small batch"))
    assert "not run" in row
    assert "27.9 / 119.6 = 0.23 and 27.9 / 26.9 = 1.04" in text
    assert "34.6 / 164.6 = 0.21 and 34.6 / 30.6 = 1.13" in text
    assert " nan" not in text
    # 25 steps with CFG was left out, so its ratio cannot be judged.
    bar = next(x for x in text.splitlines() if x.startswith("| Fréchet") and "diffusion" in x)
    assert bar.endswith("not run |")
    # The raw weights of update 100 were not kept.
    assert next(x for x in text.splitlines() if x.startswith("| 100 |")).count("not run") == 3


def test_every_picture_of_the_report_is_there_and_is_none_too_many(report: Path) -> None:
    text = report.read_text()
    shown = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert shown == {path.name for path in report.parent.glob("*.png")}
    assert len(shown) == 5 + 5  # plots and comparison; sheets of real clips and four methods
    for name in shown:
        pixels = np.asarray(Image.open(report.parent / name).convert("L"))
        assert pixels.std() > 5


def test_raw_figures_give_the_table(report: Path) -> None:
    data = json.loads((report.parent / "digits.json").read_text())
    apt = next(m for m in data["methods"] if m["name"] == "apt_1")
    assert len(apt["measurements"]) == 2
    values = [m["frechet"] for m in apt["measurements"]]
    mean, std = np.mean(values), np.std(values, ddof=1)
    decimals = max(0, min(4, 1 - math.floor(math.log10(std))))
    row = next(x for x in report.read_text().splitlines() if x.startswith("| APT, 1 step"))
    assert f"| {mean:.{decimals}f} ± {std:.{decimals}f} |" in row
    assert data["curves"]["no_r1"]["losses"][-1] < 0.05
    assert {p["update"] for p in data["progress"]} == {0, 50, 100}
    real = data["real"][0]["measurements"][0]
    assert (real["within"], real["across"]) == (1.0, 1.0)


def test_bars_are_judged(report: Path) -> None:
    rows = [x.split(" | ") for x in report.read_text().splitlines() if x.startswith("| ")]
    verdicts = {row[0]: row[-1].rstrip(" |") for row in rows if len(row) == 5}
    assert verdicts["| caption accuracy, one-step APT"] == "**miss**"  # weights are random
    assert verdicts["| D's loss at the end, with the regulariser"] == "pass"
    assert verdicts["| D's loss at the end, without it"] == "pass"


def test_the_same_again_gives_the_same_figures(report: Path, runs: Path, tmp_path: Path) -> None:
    methods = ("apt_1", "consistency_1")
    again = evaluate_digits(tiny_config(runs, tmp_path, methods=methods))
    first, second = (
        {m["name"]: m for m in json.loads((x.parent / "digits.json").read_text())["methods"]}
        for x in (report, again)
    )
    assert second == {name: first[name] for name in methods}


def test_samples_of_many_steps_are_kept_and_belong_to_their_weights(
    runs: Path, tmp_path: Path
) -> None:
    method = next(m for m in MAIN_METHODS if m.name == "diffusion_25")
    folder = tmp_path / "model"
    save_tiny_model(folder, "diffusion", seed=0)
    captions = caption_set(0, 4, 2)
    done: list[int] = []

    def sample() -> torch.Tensor:
        return generate(
            method,
            folder,
            captions,
            batch_size=8,
            precision="fp32",
            cache=tmp_path / "c",
            advance=done.append,
        )

    first = sample()
    assert first.shape == (len(captions.labels), 3, 9, 32, 32)
    assert len(list((tmp_path / "c").iterdir())) == 1
    assert torch.equal(sample(), first)
    assert done == [25 * len(first)] * 2
    save_tiny_model(folder, "diffusion", seed=1)
    assert not torch.equal(sample(), first)
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_batch_size_does_not_change_the_noise(runs: Path, tmp_path: Path) -> None:
    captions = caption_set(3, 4, 2)
    folder = APT.folder(runs)
    clips = [
        generate(
            APT,
            folder,
            captions,
            batch_size=n,
            precision="fp32",
            cache=tmp_path,
            advance=lambda _: None,
        )
        for n in (3, 8)
    ]
    torch.testing.assert_close(clips[0], clips[1], rtol=0, atol=2.1 / 255)
    assert not list(tmp_path.iterdir())  # one step is not worth keeping


def test_captions_are_grouped_and_split() -> None:
    captions = caption_set(5, 512, 4)
    assert len(captions.trained) == 512
    assert len(set(captions.trained)) == 128
    assert set(captions.trained) <= set(TRAIN_LABELS)
    assert set(captions.heldout) == set(HELDOUT_LABELS)
    assert all(len(set(captions.trained[i : i + 4])) == 1 for i in range(0, 512, 4))
    assert captions == caption_set(5, 512, 4) != caption_set(6, 512, 4)


def test_real_clips_of_a_caption_differ() -> None:
    captions = caption_set(0, 4, 2)
    clips = real_for_captions(captions, "test")
    assert len(clips) == len(captions.labels)
    assert len({clip.numpy().tobytes() for clip in clips}) == len(clips)
    assert not torch.equal(clips, real_for_captions(captions, "train"))


def test_real_clips_are_what_their_videos_in_8_bits_would_be() -> None:
    """As generated ones: or sharp details below a rounding would count as a difference."""
    captions = caption_set(0, 4, 2)
    for clips in (
        real_reference(3),
        real_for_captions(captions, "test"),
        real_for_captions(captions, "train"),
    ):
        frames = to_uint8(clips)  # the pipeline's own rounding
        assert frames.unique().numel() > 50
        assert torch.equal(frames.float() / 127.5 - 1, clips)
    dataset = MovingDigits(5, "test")
    rounded = real_clips(dataset, range(3))[0]  # the classifier is trained on these too
    exact = torch.stack([dataset[i].pixels for i in range(3)])
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.5001 / 127.5)
    assert torch.equal(rounded, to_uint8(exact).float() / 127.5 - 1)


def test_a_missing_main_run_is_an_error_that_says_which(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pretrain.*train"):
        evaluate_digits(tiny_config(tmp_path, tmp_path / "out", methods=()))
    assert not (tmp_path / "out").exists()


def test_unknown_method(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt_1"):
        evaluate_digits(tiny_config(runs, tmp_path, methods=("apt_3",)))


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"num_samples": 17},
        {"num_samples": 4 * 217},
        {"samples_per_caption": 1},
        {"snapshot_samples": 2},
        {"num_reference": 1},
        {"batch_size": 0},
    ],
)
def test_config_that_cannot_work(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        tiny_config(Path("runs"), Path("out"), **options)


def test_ablations_meet_a_snapshot_of_equal_length(runs: Path, tmp_path: Path) -> None:
    first, *rest = ablation_methods(runs)
    assert first.folder(runs) == runs / "apt" / "snapshots" / "100" / "ema"
    assert [m.name for m in rest if m.was_run(runs)] == ["ablation_no_r1"]
    (tmp_path / "ablations" / "new_idea").mkdir(parents=True)
    assert [m.label for m in ablation_methods(tmp_path)][-1] == "new idea"


def test_real_clips_are_of_the_setting_that_is_judged() -> None:
    captions = caption_set(1, 4, 2, "free")
    clips = real_for_captions(captions, "test")
    plain = real_for_captions(caption_set(1, 4, 2), "test")
    assert clips.shape == plain.shape and not torch.equal(clips, plain)
    assert captions.labels == caption_set(1, 4, 2).labels
    dataset = MovingDigits(700_000, "test", setting="free")
    assert torch.equal(real_reference(2, "free"), real_clips(dataset, range(2))[0])

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apt.checkpoints.info import ModelInfo, SampleInfo, SamplingInfo, read_info, write_info
from apt.checkpoints.load import ModelBundle, component_info
from apt.checkpoints.save import save_bundle
from apt.data.digits import HELDOUT_LABELS, TRAIN_LABELS, MovingDigits
from apt.errors import CheckpointError, ConfigError, DataError
from apt.evaluate.digits import ClassifierConfig, EvaluateConfig, evaluate_digits
from apt.evaluate.digits.bars import read_causes
from apt.evaluate.digits.classifier import real_clips
from apt.evaluate.digits.clips import (
    caption_set,
    read_digits,
    real_for_captions,
    real_reference,
)
from apt.evaluate.digits.measure import FIGURES, Measurement
from apt.evaluate.digits.methods import CONSISTENCY
from apt.evaluate.digits.runs import DISCRIMINATOR_LOSS, INPUT_GRADIENT
from apt.evaluate.digits.trials import Sampling, Trials
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.pipeline import OneStepPipeline
from apt.pixels import to_uint8
from apt.rng import generator_for
from apt.samples import read_samples

TINY_CLASSIFIER = ClassifierConfig(width=4, features=8, steps=1, batch_size=4, test_clips=8)


def save_tiny_model(folder: Path, stage: str, seed: int, updates: int = 200) -> None:
    """A random model that works in pixels, with the digits' sizes."""
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
        json.dumps({"step": i, DISCRIMINATOR_LOSS: x, INPUT_GRADIENT: 1 / x, "generator/loss": 0.7})
        for i, x in enumerate(losses, start=1)
    ]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")


def save_run(root: Path, seed: int) -> None:
    save_tiny_model(root / "pretrain" / "export", "diffusion", seed=seed)
    save_tiny_model(root / "distill" / "export", "consistency", seed=seed + 1)
    save_tiny_model(root / "apt" / "export", "apt", seed=seed + 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two training runs; the first also has what was trained only once."""
    root, second = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("second")
    save_run(root, 0)
    save_run(second, 10)
    save_tiny_model(root / "distill" / "snapshots" / "40" / "ema", "consistency", seed=1)
    for weights in ("ema", "raw"):
        save_tiny_model(root / "apt" / "snapshots" / "50" / weights, "apt", seed=4)
    save_tiny_model(root / "apt" / "snapshots" / "100" / "ema", "apt", seed=5)
    for name, seed in (("long", 6), ("no_r1", 7)):
        ablation = root / "ablations" / name
        save_tiny_model(ablation / "export", "apt", seed=seed, updates=200)
        for update in (100, 200):
            save_tiny_model(ablation / "snapshots" / str(update) / "ema", "apt", seed=seed + update)
    save_tiny_model(root / "ablations" / "one_head" / "export", "apt", seed=8, updates=100)
    write_log(root / "apt", [1.386 - 0.01 * i for i in range(40)])
    write_log(root / "ablations" / "long", [1.386 - 0.001 * i for i in range(40)])
    write_log(root / "ablations" / "no_r1", [1.386 * 0.8**i for i in range(40)])
    # A kill truncated the last line.
    lines = [f'{{"step": {step}, "speed/seconds_per_update": 20.0}}\n' for step in (1, 2, 3)]
    (root / "distill" / "speed.jsonl").write_text("".join(lines) + '{"step": 4, "spe')
    return root, second


def tiny_config(out: Path, *runs: Path, **options: Any) -> EvaluateConfig:
    defaults: dict[str, Any] = {
        "runs": runs,
        "out": out,
        "seeds": (1, 2),
        "num_samples": 4,
        "num_reference": 16,
        "snapshot_samples": 4,
        "classifier": TINY_CLASSIFIER,
        "methods": ("codec", "diffusion_1", "consistency_1", "apt_1"),
    }
    return EvaluateConfig(**(defaults | options))


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    (out / "digits_causes.json").write_text(json.dumps({"accuracy": "weights are random"}))
    page = evaluate_digits(tiny_config(out, *runs, methods=()))
    assert page is not None
    return page


def rows_of(report: Path) -> dict[str, list[str]]:
    """The last row of each name, without the name."""
    lines = [line for line in report.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_report_shows_what_was_run_and_names_what_was_not(report: Path) -> None:
    text = report.read_text()
    assert "| APT, 1 step | 200 | 1 |" in text
    assert "2 training runs with different seeds" in text
    assert "Not trained: APT as the paper writes it, 1 step." in text
    assert "Not run: approximated R1 alone" in text and "D of half the depth" in text
    assert "27.9 / 119.6 = 0.23 and 27.9 / 26.9 = 1.04" in text
    assert "34.6 / 164.6 = 0.21 and 34.6 / 30.6 = 1.13" in text
    assert " nan" not in text
    assert not any("" in row for row in list(rows_of(report).values())[1:] if len(row) > 1), "empty"


def test_ablations_meet_the_whole_method_at_equal_length(report: Path) -> None:
    rows = rows_of(report)
    assert {rows[name][0] for name in ("the whole method", "no regulariser")} == {"200"}
    assert rows["one head, on the last block"][-2:-1] == ["worse (Fig. 7)"]
    assert "Fréchet" in rows["one head, on the last block"][-1]


def test_times_count_repeated_updates_once(report: Path) -> None:
    assert "| 1 | distill | 3 | 1.0 |" in report.read_text()


def test_the_report_has_exactly_the_pictures_that_it_shows(report: Path) -> None:
    text = report.read_text()
    shown = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    there = {str(path.relative_to(report.parent)) for path in report.parent.rglob("*.png")}
    assert shown == there
    # Plots and comparison; sheets of real clips and six methods; layers and ways.
    assert len(shown) == 6 + 7 + 3
    for name in shown:
        pixels = np.asarray(Image.open(report.parent / name).convert("L"))
        assert pixels.std() > 5


def test_raw_figures_give_the_table(report: Path) -> None:
    data = json.loads((report.parent / "digits.json").read_text())
    apt = next(m for m in data["methods"] if m["name"] == "apt_1")
    trials = {f"run {run}, seed {seed}" for run in (1, 2) for seed in (1, 2)}
    assert apt["measurements"].keys() == trials
    values = [m["frechet"] for m in apt["measurements"].values()]
    mean, std = np.mean(values), np.std(values, ddof=1)
    decimals = max(0, min(4, 1 - math.floor(math.log10(std))))
    row = next(x for x in report.read_text().splitlines() if x.startswith("| APT, 1 step"))
    assert f"| {mean:.{decimals}f} ± {std:.{decimals}f} |" in row
    assert data["curves"]["ablations/no_r1"][DISCRIMINATOR_LOSS]["values"][-1] < 0.05
    apt_snapshots = {s["update"] for s in data["snapshots"] if s["run"] == "apt"}
    assert apt_snapshots == {0, 50, 100}
    real = data["real"][0]["measurements"]["run 1, seed 1"]
    assert (real["within"], real["across"]) == (1.0, 1.0)
    assert set(real["opinions"]) == {"whole frames", "blurred"}
    # A lossless codec returns exactly the same clips.
    codec = next(m for m in data["methods"] if m["name"] == "codec")
    back = codec["measurements"]["run 2, seed 1"]
    assert [back[name] for name in FIGURES] == pytest.approx([real[name] for name in FIGURES])


def test_the_page_is_rendered_from_what_was_saved(report: Path, tmp_path: Path) -> None:
    for file in report.parent.glob("*.*"):
        if "samples" in file.name or "comparison" in file.name or file.suffix == ".json":
            shutil.copy(file, tmp_path)
    shutil.copytree(report.parent / "digits_inside", tmp_path / "digits_inside")
    again = evaluate_digits(EvaluateConfig(out=tmp_path, render=True))
    assert again is not None
    names = sorted(file.name for file in report.parent.glob("*.*"))
    assert sorted(file.name for file in tmp_path.glob("*.*")) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (report.parent / name).read_bytes(), name
    assert again.name == report.name
    (tmp_path / "digits_comparison.png").unlink()
    with pytest.raises(DataError, match="no pictures of samples"):
        evaluate_digits(EvaluateConfig(out=tmp_path, render=True))
    (tmp_path / "digits.json").write_text('{"runs": 1, "more": 2}')
    with pytest.raises(DataError, match="measure again"):
        evaluate_digits(EvaluateConfig(out=tmp_path, render=True))


def test_the_html_page_needs_no_other_file(report: Path) -> None:
    text = report.with_suffix(".html").read_text()
    pictures = re.findall(r'src="([^"]{,40})', text)
    assert len(pictures) == len(list(report.parent.rglob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert "http" not in re.sub(r'src="[^"]*"', "", text)


def test_bars_are_judged_and_causes_told(report: Path) -> None:
    rows = rows_of(report)
    assert rows["caption accuracy, one-step APT"][-1] == "**missed**: weights are random"
    gone = "without minus with the regulariser, past the peak: D's loss"
    assert rows[gone][-1] == "pass" and rows[gone][-2].startswith("-1.3")
    assert sum("cause not known yet" in str(row) for row in rows.values()) > 0
    assert len([name for name in rows if name.startswith("Fréchet distance, one-step APT")]) == 4


def test_the_same_again_gives_the_same_figures_and_one_run_is_enough(
    report: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    methods = ("apt_1", "consistency_1")
    again = evaluate_digits(tiny_config(tmp_path, runs[0], methods=methods))
    assert again is not None
    first, second = (
        {m["name"]: m for m in json.loads((x.parent / "digits.json").read_text())["methods"]}
        for x in (report, again)
    )
    for name in methods:
        found = second[name]["measurements"]
        assert found == {key: first[name]["measurements"][key] for key in found}
        assert len(found) == 2
    text = again.read_text()
    assert "one training run, so the spread covers captions, noise and real clips" in text
    assert "Not run (`diffusion-apt train digits_ablations`)" in text and " nan" not in text


def test_samples_are_kept_and_belong_to_their_weights(tmp_path: Path) -> None:
    model = tmp_path / "distill" / "export"
    save_tiny_model(model, "consistency", seed=0)
    config = tiny_config(tmp_path / "out", tmp_path, seeds=(1,), independent_judges=False)
    sampling = Sampling(method=CONSISTENCY, folder=model, run=1)

    def measured() -> tuple[list[Path], dict[str, Measurement]]:
        trials = Trials.prepare(config, None, lambda _: nullcontext(lambda done, total: None))
        trials.make(sampling)
        return sorted((config.kept / "samples").iterdir()), trials.measure(sampling)

    (folder,), figures = measured()
    keys = caption_set(1, 4, 2).keys
    found = read_samples(folder)
    assert set(found.samples) == set(keys)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.mkv")}
    assert measured() == ([folder], figures)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    damaged = found.samples[keys[3]].path
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    assert measured() == ([folder], figures)
    # All samples of this tiny model were one batch, which is made again as a whole.
    assert damaged.read_bytes() == whole
    assert all(path.stat().st_mtime_ns > time for path, time in times.items())
    save_tiny_model(model, "consistency", seed=9)
    folders, others = measured()
    assert len(folders) == 2 and others != figures


def test_samples_are_what_the_model_makes_to_the_last_bit(runs: tuple[Path, Path]) -> None:
    """Those of the first report, with the noise of the trial."""
    captions = caption_set(2, 4, 2)
    pipeline = OneStepPipeline.from_pretrained(
        runs[1] / "apt" / "export", dtype=torch.bfloat16, device="cpu"
    )
    seeds = [seed for _, seed in captions.keys]
    assert seeds[5] == generator_for("evaluation noise", 2, 5).initial_seed()
    expected = pipeline([label.caption for label in captions.labels], seed=seeds, batch_size=32)
    place = str(runs[1] / "apt" / "export")
    (folder,) = [
        found
        for found in map(read_samples, (runs[0] / "evaluation" / "samples").glob("apt_1-*"))
        if found.settings["model"] == place
    ]
    made = [read_digits(folder.samples[key].path, "near") for key in captions.keys]
    assert torch.equal(to_uint8(torch.stack(made)).permute(0, 2, 3, 4, 1), expected)


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
    """Like generated ones; otherwise details finer than rounding would count as a difference."""
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
        evaluate_digits(tiny_config(tmp_path / "out", tmp_path, methods=()))
    assert not (tmp_path / "out").exists()


def test_unknown_method(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt_1"):
        evaluate_digits(tiny_config(tmp_path, runs[0], methods=("apt_3",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": SampleInfo(frames=17, height=64, width=64, fps=8)}, "makes 17 frames of 64x64"),
        ({"data": {"source": "folder"}}, "was trained on the data source 'folder'"),
        ({"data": {"source": "digits", "setting": "centred"}}, "--classifier.setting centred"),
    ],
)
def test_runs_of_other_data(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_run(tmp_path, 0)
    folder = tmp_path / "distill" / "export"
    info = read_info(folder)
    data = changes.pop("data", {"source": "digits", "setting": "near"})
    write_info(folder, dataclasses.replace(info, training={"config": {"data": data}}, **changes))
    with pytest.raises(CheckpointError, match=message):
        evaluate_digits(tiny_config(tmp_path / "out", tmp_path))


def test_invalid_causes_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for text in ("[1]", "{", '{"accuracy": 1}'):
        (tmp_path / "digits_causes.json").write_text(text)
        with pytest.raises(DataError, match="does not hold causes"):
            read_causes(tmp_path / "digits_causes.json")


@pytest.mark.parametrize(
    "options",
    [
        {"runs": ()},
        {"runs": (Path("a"), Path("b/../a"))},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"seeds": (-1,)},
        {"num_samples": 17},
        {"num_samples": 4 * 217},
        {"samples_per_caption": 1},
        {"snapshot_samples": 2},
        {"num_reference": 1},
        {"batch_size": 0},
    ],
)
def test_config_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tiny_config(Path("out"), Path("runs"), **options)


def test_real_clips_are_of_the_setting_that_is_judged() -> None:
    captions = caption_set(1, 4, 2, "centred")
    clips = real_for_captions(captions, "test")
    plain = real_for_captions(caption_set(1, 4, 2), "test")
    assert clips.shape == plain.shape and not torch.equal(clips, plain)
    assert captions.labels == caption_set(1, 4, 2).labels
    dataset = MovingDigits(700_000, "test", setting="centred")
    assert torch.equal(real_reference(2, "centred"), real_clips(dataset, range(2))[0])

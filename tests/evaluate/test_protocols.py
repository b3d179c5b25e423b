"""The protocols on tiny models and made files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from apt.checkpoints.save import save_bundle
from apt.data.decode import probe
from apt.errors import ConfigError, DataError, InputError
from apt.evaluate.choice import ModelChoice, parse_model
from apt.evaluate.coco import read_coco_captions
from apt.evaluate.digits import ClassifierConfig, load_classifier
from apt.evaluate.digits.clips import caption_set, real_for_captions, real_reference
from apt.evaluate.digits.measure import Judge, Measurement, pixel_diversity
from apt.evaluate.features import FEATURES, Features
from apt.evaluate.harness import evaluate
from apt.evaluate.image_measures import Fid, PatchFid
from apt.evaluate.measured import Measured
from apt.evaluate.protocol import Request
from apt.evaluate.protocols import Clips, Coco, Digits, Prompts, VBench, Video
from apt.evaluate.vbench_run import DIMENSIONS
from apt.evaluate.video_measures import FrechetVideo, measure_movement, of_frames
from apt.media import write_media, write_mp4
from apt.pixels import to_frames
from apt.samples import Sample, read_samples
from tests.tiny import tiny_bundle

TINY_CLASSIFIER = ClassifierConfig(width=4, features=8, steps=1, batch_size=4, test_clips=8)


@FEATURES.register("tiny")
def tiny_features(device: str = "cpu") -> Features:
    """Mean colours of the quarters of a picture."""

    def network(pictures: torch.Tensor) -> torch.Tensor:
        small = adaptive_avg_pool2d(pictures.float().permute(0, 3, 1, 2), 2)
        return small.flatten(1)

    return Features("tiny", network, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelChoice:
    return parse_model(str(save_bundle(tmp_path_factory.mktemp("model") / "tiny", tiny_bundle())))


def test_digits_in_files_have_the_figures_of_the_clips(model: ModelChoice, tmp_path: Path) -> None:
    config = Digits(captions=3, num_reference=16, seeds=(2, 5), classifier=TINY_CLASSIFIER)
    protocol = config.build(Request(tmp_path, (model,)))
    assert protocol.lossless
    captions = caption_set(5, 6, 2)
    clips = real_for_captions(captions, "train")
    keys = protocol.keys(5)
    assert [prompt for prompt, _ in keys] == [label.caption for label in captions.labels]
    assert not {seed for _, seed in keys} & {seed for _, seed in protocol.keys(2)}
    samples = []
    for (prompt, seed), frames in zip(keys, to_frames(clips), strict=True):
        path = write_media(tmp_path / f"{seed}.mkv", frames, fps=8, scale=1)
        samples.append(Sample(path=path, prompt=prompt, seed=seed, sha256=""))
    (measure,) = protocol.measures
    found = measure(samples)
    assert found.keys() > protocol.figures.keys()
    classifier, _ = load_classifier(TINY_CLASSIFIER, tmp_path / "judge")
    judge = Judge(classifier, real_reference(16))
    real = pixel_diversity(real_for_captions(captions, "test"), captions)
    assert Measurement.of_flat(found) == judge.measure(clips, captions, real)
    other = write_media(tmp_path / "other.mkv", frames, fps=8, scale=2)
    with pytest.raises(DataError, match="is 64x64; the near digits are 32x32"):
        measure([dataclasses.replace(sample, path=other) for sample in samples])


def test_digits_numbers_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to make clips of height 64, and the judge reads 32"):
        Digits().build(Request(tmp_path, (parse_model("digits,height=64"),)))
    for options in ({"seeds": ()}, {"captions": 1}, {"captions": 500}, {"samples_per_caption": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Digits(**options)


def moving_square(number: int, frames: int = 12, size: int = 40) -> np.ndarray:
    """A bright square that moves to the right, another one for each number."""
    video = np.full((frames, size, size, 3), 30 + 10 * number, np.uint8)
    for t in range(frames):
        video[t, 8 + 4 * number : 20 + 4 * number, 2 * t : 2 * t + 12] = 200 - 20 * number
    return video


def test_clips_of_an_own_folder_end_to_end(model: ModelChoice, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for number in range(3):
        write_mp4(videos / f"{number}.mp4", moving_square(number), fps=8, scale=1)
    rows = [f"{number}.mp4,a square {number // 2}\n" for number in range(3)]
    (videos / "metadata.csv").write_text("file_name,caption\n" + "".join(rows))
    config = Clips(videos=videos, features="tiny", samples_per_prompt=1, frames=5)
    page = evaluate(config, [model], tmp_path / "out", device="cpu")
    assert page is not None
    data = json.loads(page.with_suffix(".json").read_text())
    (found,) = data["models"]
    figures = found["figures"]["seed 0"]
    assert (
        list(data["figures"])[:2] == ["frechet", "patch"]
        and figures.keys() == data["figures"].keys()
    )
    real = sorted((tmp_path / "out" / "real").rglob("*.mkv"))
    assert len(real) == 3
    info = probe(real[0])
    assert (info.frames, info.fps) == (5, 8)
    # What is there is what was cut, of the size of the samples, which keep every pixel.
    made = read_samples(page.parent / "samples" / "tiny").samples
    samples = [sample.path for sample in made.values()]
    assert len(samples) == 3
    assert (probe(samples[0]).height, probe(samples[0]).frames) == (info.height, 5)
    features = of_frames(tiny_features())
    assert figures["frechet"] == pytest.approx(FrechetVideo(real, features)(samples))
    moved = measure_movement(real)
    assert data["baselines"]["real"]["motion"] == pytest.approx(moved.motion) and moved.motion > 0
    assert data["baselines"]["real"]["frozen"] == 0
    # The codec of the tiny model loses nothing.
    codec = data["baselines"]["through the codec"]
    assert codec["motion"] == data["baselines"]["real"]["motion"]
    assert codec["patch"] == pytest.approx(0, abs=1e-6) and codec["frechet"] < figures["frechet"]
    assert page.read_text().count("| real |") == 1
    html = page.with_suffix(".html").read_text()
    assert html.count("data:video/mp4") == 6  # three prompts, a sample and a clip of each
    several = dataclasses.replace(config, samples_per_prompt=2)
    *_, diversity = several.build(Request(tmp_path / "out", (model,))).measures
    found = diversity(list(made.values()))
    assert found["within"] > 0 and found["across"] > 0
    with pytest.raises(InputError, match=r"give --frames, --height"):
        config.build(Request(tmp_path, (parse_model("sdxl"),)))


def test_prompts_hold_further_models_against_the_first(model: ModelChoice, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red one\n")
    config = Prompts(prompts=tmp_path / "prompts.txt", fidelity=("psnr", "ssim"))
    (measure,) = config.build(Request(tmp_path, (model,))).pair_measures
    samples = []
    for number in range(2):
        path = write_mp4(tmp_path / f"{number}.mp4", moving_square(number), fps=8, scale=1)
        samples.append(Sample(path=path, prompt="a red one", seed=number, sha256=""))
    equal = measure(samples, samples)
    assert equal == {"psnr": math.inf, "ssim": pytest.approx(1.0)}
    found = measure(samples[:1], samples[1:])
    assert 5 < found["psnr"] < 30 and found["ssim"] < 0.95
    path = write_mp4(tmp_path / "large.mp4", moving_square(0), fps=8, scale=2)
    large = dataclasses.replace(samples[0], path=path)
    with pytest.raises(InputError, match=r"0.mp4 and .*large.mp4: frames of shapes"):
        measure([large], samples[:1])


def test_videos_without_a_reference_or_a_network(model: ModelChoice, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red one\na blue two\n")
    config = Video(prompts=tmp_path / "prompts.txt", features="none", samples_per_prompt=1)
    protocol = config.build(Request(tmp_path, (model,)))
    assert set(protocol.figures) == {
        "sharpness", "flicker", "frame_change", "motion", "frozen"
    }  # fmt: skip
    protocol.prepare()
    with pytest.raises(DataError, match="0 videos"):
        dataclasses.replace(config, reference=tmp_path).build(Request(tmp_path, (model,)))


def test_vbench_reads_what_it_left_once_it_has_run(model: ModelChoice, tmp_path: Path) -> None:
    source = tmp_path / "info.json"
    source.write_text(json.dumps([{"prompt_en": "a bird", "dimension": ["color"]}]))
    protocol = VBench(source=source).build(Request(tmp_path, (model,)))
    (measure,) = protocol.measures
    samples = []
    for prompt, seed in protocol.keys(0):
        path = tmp_path / "samples" / "mine" / f"{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(seed))
        samples.append(Sample(path=path, prompt=prompt, seed=seed, sha256=str(seed)))
    measured = Measured(tmp_path, [])
    assert measured.get(0, [samples], lambda: measure(samples)) == {}
    (videos,) = (tmp_path / "vbench" / "mine").glob("*/videos")
    assert sorted(path.name for path in videos.iterdir()) == [f"a bird-{n}.mp4" for n in range(5)]
    results = videos.parent / "results"
    results.mkdir()
    for number, name in enumerate(DIMENSIONS):
        content = json.dumps({name: [0.5 + number / 100, []]})
        (results / f"{name}_eval_results.json").write_text(content)
    found = measured.get(0, [samples], lambda: measure(samples))
    assert found.keys() == protocol.figures.keys()
    assert found["aesthetic_quality"] == 0.54
    assert found["total"] == pytest.approx((4 * found["quality"] + found["semantic"]) / 5)


def test_coco_end_to_end(model: ModelChoice, tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(moving_square(number, 1)[0]).save(folder / "val2014" / f"{number}.jpg")
    captions = [{"image_id": n % 4, "caption": f"a square {n // 2}"} for n in range(6)]
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)],
        "annotations": captions,
    }
    (folder / "captions_val2014.json").write_text(json.dumps(document))
    config = Coco(folder=folder, captions=6, features="tiny", fdr=("tiny",), clip="none")
    page = evaluate(config, [model], tmp_path / "out", device="cpu")
    assert page is not None
    data = json.loads(page.with_suffix(".json").read_text())
    figures = data["models"][0]["figures"]["seed 0"]
    # Some captions come twice, each with noise of its own.
    found = read_samples(page.parent / "samples" / "tiny").samples
    assert [seed for _, seed in found] == list(range(6))
    files = [sample.path for sample in found.values()]
    assert all(file.suffix == ".png" for file in files)
    reference = read_coco_captions(folder, 6).reference
    assert figures["fid"] == pytest.approx(Fid(reference, tiny_features())(files))
    assert figures["pfid"] == pytest.approx(PatchFid(reference, tiny_features())(files))
    assert figures["fdr"] == figures["fdr_tiny"] > 0
    with pytest.raises(InputError, match="unknown features 'tinny'"):
        dataclasses.replace(config, features="tinny").build(Request(tmp_path, (model,)))

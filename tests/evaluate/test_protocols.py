"""The protocols on tiny models and made files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from apt.checkpoints.bundle import save_bundle
from apt.errors import ConfigError
from apt.evaluate.choice import ModelChoice, parse_model
from apt.evaluate.digits import ClassifierConfig, load_classifier
from apt.evaluate.digits.clips import caption_set, real_for_captions, real_reference
from apt.evaluate.digits.measure import Judge, pixel_diversity
from apt.evaluate.protocol import SEED_STRIDE, Request
from apt.evaluate.protocols import Digits
from apt.media import write_mp4
from apt.pixels import to_frames
from apt.samples import Sample
from tests.tiny import tiny_bundle

TINY_CLASSIFIER = ClassifierConfig(width=4, features=8, steps=1, batch_size=4, test_clips=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelChoice:
    return parse_model(str(save_bundle(tmp_path_factory.mktemp("model") / "tiny", tiny_bundle())))


def test_digits_in_files_have_the_figures_of_the_clips(model: ModelChoice, tmp_path: Path) -> None:
    config = Digits(captions=3, num_reference=16, seeds=(2,), classifier=TINY_CLASSIFIER)
    protocol = config.build(Request(tmp_path, (model,)))
    captions = dataclasses.replace(caption_set(0, 6, 2), seed=2)
    clips = real_for_captions(captions, "train")
    keys = protocol.keys(2)
    assert [prompt for prompt, _ in keys] == [label.caption for label in captions.labels]
    assert keys[0][1] == 2 * SEED_STRIDE
    samples = []
    for (prompt, seed), frames in zip(keys, to_frames(clips), strict=True):
        path = write_mp4(tmp_path / f"{seed}.mp4", frames, fps=8)
        samples.append(Sample(path=path, prompt=prompt, seed=seed, sha256=""))
    (measure,) = protocol.measures
    found = measure(samples)
    assert found.keys() == protocol.figures.keys()
    classifier, _ = load_classifier(TINY_CLASSIFIER, tmp_path / "judge")
    judge = Judge(classifier, real_reference(16))
    real = pixel_diversity(real_for_captions(captions, "test"), captions)
    expected = judge.measure(clips, captions, real)
    for name, value in found.items():
        # H.264 is lossy: by a level or two of 255.
        assert value == pytest.approx(expected.figure(name), rel=0.05, abs=0.02), name


def test_digits_numbers_are_checked() -> None:
    for options in ({"captions": 1}, {"captions": 500}, {"samples_per_caption": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Digits(**options)

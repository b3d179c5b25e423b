from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apt.data.digits import Label, MovingDigits
from apt.errors import CheckpointError, ConfigError, InputError
from apt.evaluate.digits.classifier import (
    ClassifierConfig,
    DigitsClassifier,
    Judgement,
    judge,
    label_words,
    load_classifier,
    real_clips,
    train_classifier,
)

TINY = ClassifierConfig(width=4, features=8, steps=3, batch_size=8, test_clips=16)


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = train_classifier(TINY)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    second, other = train_classifier(TINY), train_classifier(replace(TINY, seed=1))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.heads[0].weight, other.heads[0].weight)


def test_shapes_and_batch_independence() -> None:
    classifier = DigitsClassifier(TINY).eval()
    clips, labels = real_clips(MovingDigits(0, "test"), range(5))
    judgement = judge(classifier, clips)
    assert judgement.features.shape == (5, 8)
    assert judgement.words.shape == (5, 3)
    torch.testing.assert_close(judge(classifier, clips[2:3]).features, judgement.features[2:3])
    assert [logits.shape[1] for logits in classifier(clips)] == [10, 6, 4]
    with pytest.raises(InputError, match="3, 9, 32, 32"):
        classifier(clips[:, :, :5])
    with pytest.raises(InputError, match="4 labels"):
        judgement.accuracy(labels[:4])


def test_accuracy_counts_clips_with_all_three_right() -> None:
    said = [Label("zero", "red", "left"), Label("nine", "white", "down")] * 2
    assert label_words(said)[:2].tolist() == [[0, 0, 0], [9, 5, 3]]
    wanted = [
        said[0],
        Label("nine", "red", "down"),
        Label("one", "red", "left"),
        Label("nine", "red", "up"),
    ]
    found = Judgement(torch.zeros(4, 8), label_words(said)).accuracy(wanted)
    assert (found.digit, found.colour, found.direction, found.all) == (0.75, 0.5, 0.75, 0.25)


def test_cache_gives_back_the_same_classifier(tmp_path: Path) -> None:
    trained, figures = load_classifier(TINY, tmp_path)
    assert set(figures) == {"train", "test", "heldout"}
    assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        next(trained.parameters()).zero_()  # what is in memory is not what is loaded
    loaded, again = load_classifier(TINY, tmp_path)
    assert again == figures
    assert next(loaded.parameters()).abs().sum() > 0
    load_classifier(replace(TINY, steps=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.glob("*.json"):
        file.write_text("[")
    with pytest.raises(CheckpointError, match="delete it"):
        load_classifier(TINY, tmp_path)


def test_rejects_a_config_without_steps() -> None:
    with pytest.raises(ConfigError, match="steps"):
        ClassifierConfig(steps=0)


@pytest.mark.slow
def test_the_default_classifier_reads_held_out_handwriting(tmp_path: Path) -> None:
    _, figures = load_classifier(ClassifierConfig(), tmp_path)
    assert figures["test"].all >= 0.97
    assert figures["heldout"].all >= 0.95


def test_another_setting_of_the_digits_is_another_classifier(tmp_path: Path) -> None:
    for setting in ("centred", "free", "centred"):
        load_classifier(replace(TINY, setting=setting), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2

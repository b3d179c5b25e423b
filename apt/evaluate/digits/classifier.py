"""The judge of the digits evaluation: a small classifier trained only on real clips.

It reads digit, colour and direction from a clip to check its caption. Its last hidden layer is the
feature space of the Fréchet distance. It is never trained on generated clips, nor on the
handwriting of the evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.checkpoints.weights import load_weights, save_weights
from apt.data.digits import (
    ALL_LABELS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    Label,
    MovingDigits,
    Setting,
    Split,
    clip_size,
)
from apt.errors import CheckpointError, ConfigError, InputError
from apt.evaluate.digits.networks import NETWORKS, seen
from apt.pixels import to_uint8
from apt.rng import generator_for

_SMOOTHING = {"adamw": 0.0, "sgd": 0.1}
_WORDS = (tuple(DIGITS), tuple(COLOURS), tuple(DIRECTIONS))
_EVAL_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the classifier is built and trained; equal configs give equal classifiers.

    Attributes:
        network: "glimpse" or "frames" (`apt.evaluate.digits.networks`).
        blur: standard deviation of the Gaussian that blurs its input, in pixels at 32x32; 0 is
            none.
        optimizer: "adamw", or "sgd" with momentum.
        setting: of the moving digits to judge.
    """

    network: Literal["glimpse", "frames"] = "glimpse"
    blur: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    width: int = 24
    features: int = 64
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    seed: int = 0
    test_clips: int = 2048
    setting: Setting = "near"

    def __post_init__(self) -> None:
        if self.blur < 0:
            raise ConfigError(f"classifier.blur is {self.blur}; it must not be negative.")
        for field in ("width", "features", "steps", "batch_size", "test_clips"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"classifier.{field} is {getattr(self, field)}; it must be at least 1."
                )


@dataclass(frozen=True)
class Accuracy:
    """Share of clips with the right digit, colour, direction, and all three."""

    digit: float
    colour: float
    direction: float
    all: float


class DigitsClassifier(nn.Module):
    """A network on clips as the config shows them (`seen`), with a head for each word of a caption.

    Input: pixels (N, 3, T, H, W) in [-1, 1], of the setting's size.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.network = NETWORKS[config.network](config.width, config.features)
        self.heads = nn.ModuleList(nn.Linear(config.features, len(words)) for words in _WORDS)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the last hidden layer (N, features)."""
        frames, side, _ = clip_size(self.config.setting)
        if pixels.shape[1:] != (3, frames, side, side):
            raise InputError(
                f"clips have shape {tuple(pixels.shape)}; the digits classifier takes "
                f"(N, 3, {frames}, {side}, {side})."
            )
        features: Tensor = self.network(seen(pixels, self.config.blur))
        return features

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the logits of digit (N, 10), colour (N, 6) and direction (N, 4)."""
        features = self.features(pixels)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Judgement:
    """The classifier's output for clips: features (N, D) and class numbers of the words (N, 3)."""

    features: Tensor
    words: Tensor

    def accuracy(self, labels: list[Label]) -> Accuracy:
        """Compare with the captions that the clips were made for."""
        if len(labels) != len(self.words):
            raise InputError(f"{len(labels)} labels do not match {len(self.words)} clips.")
        right = self.words == label_words(labels)
        digit, colour, direction = right.double().mean(dim=0).tolist()
        return Accuracy(digit, colour, direction, right.all(dim=1).double().mean().item())


@torch.no_grad()
def judge(classifier: DigitsClassifier, clips: Tensor) -> Judgement:
    """Classify clips (N, 3, T, H, W) in [-1, 1]."""
    classifier.eval()
    features, words = [], []
    for chunk in clips.split(_EVAL_BATCH):
        hidden = classifier.features(chunk)
        features.append(hidden)
        words.append(torch.stack([head(hidden).argmax(1) for head in classifier.heads], dim=1))
    return Judgement(torch.cat(features), torch.cat(words))


def label_words(labels: list[Label]) -> Tensor:
    """Return the class numbers (N, 3) int64 of digit, colour and direction."""
    return torch.tensor(
        [
            [words.index(word) for words, word in zip(_WORDS, dataclasses.astuple(x), strict=True)]
            for x in labels
        ]
    )


def real_clips(dataset: MovingDigits, indices: Iterable[int]) -> tuple[Tensor, list[Label]]:
    """Return moving digits, rounded to 8 bits like generated videos, and their labels."""
    numbers = list(indices)
    pixels = torch.stack([dataset[i].pixels for i in numbers])
    return to_uint8(pixels).float() / 127.5 - 1, [dataset.labels(i) for i in numbers]


def train_classifier(config: ClassifierConfig) -> DigitsClassifier:
    """Train on real clips of the training handwriting; equal configs give equal results."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(config.seed, "digits classifier").initial_seed())
        classifier = DigitsClassifier(config)
    optimizer = _optimizer(classifier, config)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.steps + 1, pct_start=0.15
    )
    # All captions, including those held out from the generators: a judge that never saw "a red
    # zero moving left" would learn that it does not exist.
    dataset = MovingDigits(config.seed, "train", labels=ALL_LABELS, setting=config.setting)
    classifier.train()
    for step in range(config.steps):
        first = step * config.batch_size
        clips, labels = real_clips(dataset, range(first, first + config.batch_size))
        losses = [
            F.cross_entropy(logits, target, label_smoothing=_SMOOTHING[config.optimizer])
            for logits, target in zip(classifier(clips), label_words(labels).T, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def _optimizer(classifier: DigitsClassifier, config: ClassifierConfig) -> torch.optim.Optimizer:
    parameters, decay = classifier.parameters(), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.learning_rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
    return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=decay)


def load_classifier(
    config: ClassifierConfig, cache: Path
) -> tuple[DigitsClassifier, dict[str, Accuracy]]:
    """Load the trained classifier of a config from ``cache``, or train it and store it there.

    The file's name is a hash of the config, the network's shapes and the data, so changing any of
    them trains a new classifier.

    Returns the classifier and its accuracy on real clips, by split: "train" (other clips of the
    training handwriting), "test" (held-out handwriting) and "heldout" (held-out captions too).
    Raises ``CheckpointError`` if a cached file is damaged.
    """
    weights = cache / f"classifier-{_fingerprint(config)}.safetensors"
    figures = weights.with_suffix(".json")
    if weights.is_file() and figures.is_file():
        classifier = DigitsClassifier(config).eval()
        load_weights(weights, classifier)
        try:
            stored = json.loads(figures.read_text(encoding="utf-8"))
            return classifier, {split: Accuracy(**values) for split, values in stored.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{str(figures)!r} is damaged ({error}); delete it to train the classifier again."
            ) from error
    classifier = train_classifier(config)
    accuracies = {
        split: _real_accuracy(classifier, split, config) for split in ("train", "test", "heldout")
    }
    cache.mkdir(parents=True, exist_ok=True)
    save_weights(weights, classifier, None)
    document = {split: dataclasses.asdict(accuracy) for split, accuracy in accuracies.items()}
    figures.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return classifier, accuracies


def _real_accuracy(
    classifier: DigitsClassifier, split: Split, config: ClassifierConfig
) -> Accuracy:
    # Not the seed of training, so that "train" has new clips of the known handwriting.
    dataset = MovingDigits(config.seed + 1, split, setting=config.setting)
    clips, labels = real_clips(dataset, range(config.test_clips))
    return judge(classifier, clips).accuracy(labels)


def _fingerprint(config: ClassifierConfig) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in DigitsClassifier(config).state_dict().items()}
    digest.update(repr(shapes).encode())
    for split in get_args(Split):
        dataset = MovingDigits(config.seed, split, setting=config.setting)
        digest.update(dataset.fingerprint.encode())
    return digest.hexdigest()[:16]

"""The judge of the digits evaluation: a small classifier trained on real clips alone.

It reads digit, colour and direction off a clip, so a caption can be checked, and its last hidden
layer is the feature space of the Fréchet distance. It never sees a generated clip, nor the
handwriting that evaluation is made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.checkpoints.weights import load_weights, save_weights
from apt.data.digits import (
    ALL_LABELS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    FRAMES,
    SIZE,
    Label,
    MovingDigits,
    Setting,
    Split,
)
from apt.errors import CheckpointError, ConfigError, InputError
from apt.pixels import to_uint8
from apt.rng import generator_for

_WORDS = (tuple(DIGITS), tuple(COLOURS), tuple(DIRECTIONS))
_FRAME_STRIDE = 4
_GLIMPSE = 20
_COARSE = 4
_EVAL_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the classifier is built and trained; equal configs give equal classifiers.

    `setting` is that of the moving digits which are judged.
    """

    width: int = 24
    features: int = 64
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    seed: int = 0
    test_clips: int = 2048
    setting: Setting = "centred"

    def __post_init__(self) -> None:
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
    """A CNN looks closely at what moves, a small network at the whole clip in low resolution.

    The digit is what moves, so in some frames the 20x20 square with the most motion is cut out and
    read; where the squares lie, and how the rest moves, the low resolution tells. That learns from
    a tenth of the clips that a network on whole frames needs.

    Input: pixels (N, 3, 9, 32, 32) in [-1, 1].
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        w = config.width
        self.look = nn.Sequential(
            _convolution(6, w),
            _convolution(w, 2 * w, stride=2),
            _convolution(2 * w, 3 * w),
            _convolution(3 * w, 4 * w, stride=2),
            nn.Flatten(),
            nn.Linear(4 * w * (_GLIMPSE // 4) ** 2, 4 * w, bias=False),
            nn.BatchNorm1d(4 * w),
            nn.ReLU(),
        )
        self.place = nn.Linear(6 * (SIZE // _COARSE) ** 2, w)
        self.join = nn.Sequential(
            nn.Linear(4 * w + FRAMES * w, 2 * config.features),
            nn.ReLU(),
            nn.Linear(2 * config.features, config.features),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(config.features, len(words)) for words in _WORDS)

    def features(self, pixels: Tensor) -> Tensor:
        """The last hidden layer (N, features)."""
        if pixels.shape[1:] != (3, FRAMES, SIZE, SIZE):
            raise InputError(
                f"clips have shape {tuple(pixels.shape)}; the digits classifier takes "
                f"(N, 3, {FRAMES}, {SIZE}, {SIZE})."
            )
        # The background keeps still, so what moves stands out against the median over time.
        motion = pixels - pixels.median(dim=2, keepdim=True).values
        both = torch.cat([pixels, motion], dim=1).transpose(1, 2)
        squares = _glimpses(both[:, ::_FRAME_STRIDE])
        what = self.look(squares.flatten(0, 1)).unflatten(0, squares.shape[:2]).mean(dim=1)
        coarse = F.avg_pool2d(both.flatten(0, 1), _COARSE).unflatten(0, both.shape[:2])
        where = self.place(coarse.flatten(2)).flatten(1)
        features: Tensor = self.join(torch.cat([what, where], dim=1))
        return features

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Logits of digit (N, 10), colour (N, 6) and direction (N, 4)."""
        features = self.features(pixels)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Judgement:
    """What the classifier made of clips: features (N, D) and word numbers (N, 3)."""

    features: Tensor
    words: Tensor

    def accuracy(self, labels: list[Label]) -> Accuracy:
        """Agreement with the captions that the clips were made for."""
        if len(labels) != len(self.words):
            raise InputError(f"{len(labels)} labels do not fit {len(self.words)} clips.")
        right = self.words == label_words(labels)
        digit, colour, direction = right.double().mean(dim=0).tolist()
        return Accuracy(digit, colour, direction, right.all(dim=1).double().mean().item())


@torch.no_grad()
def judge(classifier: DigitsClassifier, clips: Tensor) -> Judgement:
    """Classify clips (N, 3, 9, 32, 32) in [-1, 1]."""
    classifier.eval()
    features, words = [], []
    for chunk in clips.split(_EVAL_BATCH):
        hidden = classifier.features(chunk)
        features.append(hidden)
        words.append(torch.stack([head(hidden).argmax(1) for head in classifier.heads], dim=1))
    return Judgement(torch.cat(features), torch.cat(words))


def label_words(labels: list[Label]) -> Tensor:
    """Class numbers (N, 3) int64 of digit, colour and direction."""
    return torch.tensor(
        [
            [words.index(word) for words, word in zip(_WORDS, dataclasses.astuple(x), strict=True)]
            for x in labels
        ]
    )


def real_clips(dataset: MovingDigits, indices: Iterable[int]) -> tuple[Tensor, list[Label]]:
    """Clips of the moving digits, rounded to 8 bits as generated videos are, and their labels."""
    numbers = list(indices)
    pixels = torch.stack([dataset[i].pixels for i in numbers])
    return to_uint8(pixels).float() / 127.5 - 1, [dataset.labels(i) for i in numbers]


def train_classifier(config: ClassifierConfig) -> DigitsClassifier:
    """Train on real clips of the training handwriting; deterministic for a config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(config.seed, "digits classifier").initial_seed())
        classifier = DigitsClassifier(config)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.steps + 1, pct_start=0.15
    )
    # All captions, also those held out from the generators: a judge that had never met "a red
    # zero moving left" would have learned that there is none.
    dataset = MovingDigits(config.seed, "train", labels=ALL_LABELS, setting=config.setting)
    classifier.train()
    for step in range(config.steps):
        first = step * config.batch_size
        clips, labels = real_clips(dataset, range(first, first + config.batch_size))
        losses = [
            F.cross_entropy(logits, target)
            for logits, target in zip(classifier(clips), label_words(labels).T, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def load_classifier(
    config: ClassifierConfig, cache: Path
) -> tuple[DigitsClassifier, dict[str, Accuracy]]:
    """The trained classifier of a config, and its accuracy on real clips by split.

    Taken from ``cache``, or trained and kept there. The file's name is a hash of the config, the
    network's shape and the data, so a change of any of them trains anew.

    Returns the classifier and its accuracy on "train" (other clips of the training handwriting),
    "test" (held-out handwriting) and "heldout" (held-out captions too). Raises ``CheckpointError``
    if a cached file is damaged.
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
    # Another seed than training's, so that "train" shows new clips of the handwriting it knows.
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


def _glimpses(frames: Tensor) -> Tensor:
    """The square with the most motion of each frame: (N, F, 6, H, W) to (N, F, 6, 16, 16).

    Channels 3 to 5 are the motion.
    """
    energy = frames[:, :, 3:].square().mean(dim=2)
    sums = F.avg_pool2d(energy, _GLIMPSE, stride=1)
    best = sums.flatten(2).argmax(dim=2)
    top, left = best // sums.shape[-1], best % sums.shape[-1]
    side = torch.arange(_GLIMPSE)
    n = torch.arange(frames.shape[0])[:, None, None, None]
    f = torch.arange(frames.shape[1])[None, :, None, None]
    y = (top[..., None] + side)[..., :, None]
    x = (left[..., None] + side)[..., None, :]
    # Indexing puts the channels last.
    return frames[n, f, :, y, x].movedim(-1, 2)


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )

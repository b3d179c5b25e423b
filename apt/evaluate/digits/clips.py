"""The clips that are compared: the same captions for every method, and real clips beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from apt.checkpoints.load import load_codec
from apt.data.digits import HELDOUT_LABELS, TRAIN_LABELS, Label, MovingDigits, Setting, Split
from apt.evaluate.digits.classifier import real_clips
from apt.evaluate.digits.methods import Method
from apt.pipeline import OneStepPipeline
from apt.pixels import to_uint8
from apt.rng import generator_for

Precision = Literal["bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Samplers with fewer network evaluations run again faster than their samples are worth keeping.
_WORTH_KEEPING = 8


@dataclass(frozen=True)
class CaptionSet:
    """The captions of one evaluation seed, each several times, grouped.

    Attributes:
        seed: of the evaluation; it also chooses the noise and the real clips.
        trained: labels with captions that models were trained on.
        heldout: labels with captions that no model has seen.
        samples_per_caption: consecutive labels that are equal.
        setting: of the moving digits that real clips are.
    """

    seed: int
    trained: tuple[Label, ...]
    heldout: tuple[Label, ...]
    samples_per_caption: int
    setting: Setting = "near"

    @property
    def labels(self) -> list[Label]:
        """Trained captions first, then those held out."""
        return [*self.trained, *self.heldout]


def caption_set(
    seed: int, num_samples: int, samples_per_caption: int, setting: Setting = "near"
) -> CaptionSet:
    """Choose ``num_samples`` trained captions, drawn without repetition, and all held-out ones.

    ``num_samples`` is a multiple of ``samples_per_caption``, and asks for no more captions than
    there are (``EvaluateConfig`` checks it). Held-out captions come as often each, but are no more
    than the trained ones.
    """
    num_captions = num_samples // samples_per_caption
    generator = generator_for("evaluation captions", seed)
    order = torch.randperm(len(TRAIN_LABELS), generator=generator)[:num_captions].tolist()
    heldout = HELDOUT_LABELS[: min(num_captions, len(HELDOUT_LABELS))]
    return CaptionSet(
        seed,
        tuple(TRAIN_LABELS[i] for i in order for _ in range(samples_per_caption)),
        tuple(label for label in heldout for _ in range(samples_per_caption)),
        samples_per_caption,
        setting,
    )


def real_for_captions(captions: CaptionSet, split: Split) -> Tensor:
    """Real clips (N, 3, T, H, W) of those captions, in the handwriting of ``split``.

    The clips of different seeds, and those of the reference, are different.
    """
    clips = []
    for position, label in enumerate(captions.labels):
        dataset = MovingDigits(
            _REAL_SEED + captions.seed, split, labels=(label,), setting=captions.setting
        )
        clips.append(real_clips(dataset, [position])[0])
    return torch.cat(clips)


def real_reference(num: int, setting: Setting = "near") -> Tensor:
    """Real clips of held-out handwriting that every method is compared with."""
    return real_clips(MovingDigits(_REFERENCE_SEED, "test", setting=setting), range(num))[0]


# Streams of their own, away from the small seeds that people train with.
_REFERENCE_SEED = 700_000
_REAL_SEED = 800_000


def generate(
    method: Method,
    folder: Path,
    captions: CaptionSet,
    *,
    batch_size: int,
    precision: Precision,
    cache: Path,
    advance: Callable[[int], None],
) -> Tensor:
    """Clips (N, 3, T, H, W) in [-1, 1], one per label of ``captions``, through the pipeline.

    Without steps: real clips of held-out handwriting through the codec and back.

    Samples of many-step methods are kept in ``cache`` under a hash of the weights, the settings
    and the captions. ``advance`` is told the number of network evaluations that are done.
    """
    labels = captions.labels
    if not method.num_steps:
        return _reconstruct(folder, captions, batch_size, advance)
    key = _key(method, folder, captions, precision)
    kept = cache / f"{method.name}-{captions.seed}-{key}.npy"
    if kept.is_file():
        advance(len(labels) * method.evaluations)
        return _to_float(torch.from_numpy(np.load(kept, allow_pickle=False)))
    pipeline = OneStepPipeline.from_pretrained(folder, dtype=DTYPES[precision])
    videos = []
    for start in range(0, len(labels), batch_size):
        chunk = labels[start : start + batch_size]
        videos.append(
            pipeline(
                [label.caption for label in chunk],
                seed=[
                    generator_for("evaluation noise", captions.seed, start + i).initial_seed()
                    for i in range(len(chunk))
                ],
                num_steps=method.num_steps,
                cfg_scale=None if method.guided else 1.0,
                batch_size=batch_size,
            )
        )
        advance(len(chunk) * method.evaluations)
    clips = torch.cat(videos)
    if method.evaluations >= _WORTH_KEEPING:
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}")
        with partial.open("wb") as stream:
            np.save(stream, clips.numpy())
        partial.replace(kept)
    return _to_float(clips)


def _reconstruct(
    folder: Path, captions: CaptionSet, batch_size: int, advance: Callable[[int], None]
) -> Tensor:
    codec = load_codec(folder)
    clips = []
    for chunk in real_for_captions(captions, "test").split(batch_size):
        with torch.no_grad():
            decoded = codec.decode(codec.encode(chunk))
        clips.append(to_uint8(decoded).float() / 127.5 - 1)
        advance(len(chunk))
    return torch.cat(clips)


def _to_float(frames: Tensor) -> Tensor:
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _key(method: Method, folder: Path, captions: CaptionSet, precision: Precision) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    settings = [
        method.num_steps,
        method.guided,
        captions.seed,
        precision,
        [label.caption for label in captions.labels],
    ]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]

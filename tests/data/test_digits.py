from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from apt.data.digits import (
    ALL_LABELS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    HELDOUT_LABELS,
    SIZE,
    TRAIN_LABELS,
    Label,
    MovingDigits,
    clip_size,
)
from apt.data.loader import make_loader
from apt.errors import InputError

SPLITS = ("train", "test", "heldout")
SETTINGS = ("centred", "near", "free", "large")
SIDE = 20


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_clip_is_a_pure_function_of_setting_seed_split_and_index(setting: str) -> None:
    a, b = MovingDigits(seed=4, setting=setting), MovingDigits(seed=4, setting=setting)
    b[7]  # what was asked before does not matter
    for index in (3, 0, 10**9):
        assert torch.equal(a[index].pixels, b[index].pixels)
        assert a[index].caption == a.caption(index) == a.labels(index).caption
    others = [MovingDigits(seed=5)[3], MovingDigits(seed=4, split="test")[3], a[4]]
    assert all(not torch.equal(other.pixels, a[3].pixels) for other in others)
    for other in {*SETTINGS} - {setting}:
        # A few: a clip that happens to be as near to the centre is the same in both.
        clips = MovingDigits(seed=4, setting=other)
        assert any(not torch.equal(clips[i].pixels, a[i].pixels) for i in range(4))
    assert a.fingerprint == b.fingerprint
    assert len({MovingDigits(setting=setting).fingerprint for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("split", SPLITS)
def test_clips_have_the_shape_and_range_of_every_other_data_set(split: str, setting: str) -> None:
    sample = MovingDigits(split=split, setting=setting)[0]
    frames, side, fps = clip_size(setting)
    assert sample.pixels.shape == (3, frames, side, side)
    assert (frames, side, fps) == ((17, 64, 16) if setting == "large" else (9, 32, 8))
    assert sample.pixels.dtype == torch.float32
    assert sample.pixels.is_contiguous()
    assert sample.pixels.abs().max() <= 1
    assert sample.pixels.max() > 0.5


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(InputError, match="train, test, heldout"):
        MovingDigits(split="validation")
    with pytest.raises(InputError, match="'wild'; choose from centred, near, free, large"):
        MovingDigits(setting="wild")


def test_held_out_captions_are_disjoint_and_leave_every_word_to_train_on() -> None:
    assert len(ALL_LABELS) == len(set(ALL_LABELS)) == 240
    assert not set(TRAIN_LABELS) & set(HELDOUT_LABELS)
    assert set(TRAIN_LABELS) | set(HELDOUT_LABELS) == set(ALL_LABELS)
    assert len(HELDOUT_LABELS) == 24
    for labels in (TRAIN_LABELS, HELDOUT_LABELS):
        assert {label.digit for label in labels} == set(DIGITS)
        assert {label.colour for label in labels} == set(COLOURS)
        assert {label.direction for label in labels} == set(DIRECTIONS)
    for split, allowed in zip(SPLITS, (TRAIN_LABELS, TRAIN_LABELS, HELDOUT_LABELS), strict=True):
        dataset = MovingDigits(split=split)
        drawn = {dataset.labels(index) for index in range(2000)}
        assert drawn == set(allowed)


def located(frame: np.ndarray) -> tuple[int, int, int]:
    """The scan that a frame (3, 32, 32) shows, and its place: (scan, y, x) by correlation."""
    # Backgrounds are dark: what is bright in any channel is ink.
    ink = np.clip((frame.max(axis=0) + 1) / 2 - 0.55, 0, None).astype(np.float32)
    patches = np.lib.stride_tricks.sliding_window_view(ink, (SIDE, SIDE)).reshape(-1, SIDE**2)
    patches = patches - patches.mean(axis=1, keepdims=True)
    patches /= np.linalg.norm(patches, axis=1, keepdims=True) + 1e-9
    scores = patches @ enlarged_scans().T
    place, scan = np.unravel_index(scores.argmax(), scores.shape)
    y, x = divmod(int(place), SIZE - SIDE + 1)
    return int(scan), y, x


_SCANS: list[np.ndarray] = []


def enlarged_scans() -> np.ndarray:
    """All scans at the size they are shown in, as unit vectors (N, 400)."""
    if not _SCANS:
        scans = torch.from_numpy(load_digits().images)[:, None]
        large = torch.nn.functional.interpolate(scans, (SIDE, SIDE), mode="bicubic").numpy()
        ink = np.clip(large / 16 - 0.55, 0, None).reshape(len(large), -1).astype(np.float32)
        ink -= ink.mean(axis=1, keepdims=True)
        _SCANS.append(ink / np.linalg.norm(ink, axis=1, keepdims=True))
    return _SCANS[0]


def seen(pixels: np.ndarray) -> tuple[Label, int]:
    """What a clip (3, 9, 32, 32) shows, without asking the data set, and the scan used."""
    scan, y0, x0 = located(pixels[:, 0])
    _, y1, x1 = located(pixels[:, -1])
    # Places of a halved clip can be off by one.
    moved = tuple(np.sign(change) * (abs(change) > 1) for change in (y1 - y0, x1 - x0))
    (direction,) = [name for name, step in DIRECTIONS.items() if step == moved]
    patch = (pixels[:, 0, y0 : y0 + SIDE, x0 : x0 + SIDE] + 1) / 2
    weight = enlarged_scans()[scan].reshape(SIDE, SIDE)
    brightest = patch[:, weight > np.quantile(weight, 0.9)].mean(axis=1) * 255
    colour = min(COLOURS, key=lambda name: np.abs(brightest - COLOURS[name]).sum())
    return Label(DIGITS[load_digits().target[scan]], colour, direction), scan


def small(dataset: MovingDigits, index: int) -> np.ndarray:
    """A clip (3, 9, 32, 32), of half the size and rate if it is large."""
    pixels = dataset[index].pixels
    if dataset.setting == "large":
        pixels = torch.nn.functional.avg_pool2d(pixels[:, ::2], 2)
    return pixels.numpy()


@pytest.mark.parametrize("setting", SETTINGS)
def test_captions_say_what_is_seen_and_handwriting_is_held_out(setting: str) -> None:
    scans: dict[str, set[int]] = {}
    for split in SPLITS:
        dataset = MovingDigits(seed=1, split=split, setting=setting)
        right = 0
        for index in range(12):
            label, scan = seen(small(dataset, index))
            right += label == dataset.labels(index)
            scans.setdefault("train" if split == "train" else "held out", set()).add(scan)
        # Correlation finds the exact scan nearly always; a wrong caption would be wrong always.
        assert right >= 11, split
    assert not scans["train"] & scans["held out"]


@pytest.mark.parametrize("setting", ("centred", "near", "free"))
def test_the_digit_moves_evenly_and_stays_in_the_picture(setting: str) -> None:
    dataset = MovingDigits(seed=2, setting=setting)
    for index in range(4):
        pixels = dataset[index].pixels.numpy()
        places = [located(pixels[:, frame])[1:] for frame in (0, 4, 8)]
        first, second = np.diff(np.array(places), axis=0)
        step = np.array(DIRECTIONS[dataset.labels(index).direction])
        assert (first == second).all()
        assert (np.sign(first) == step).all()
        assert np.abs(first).sum() == 4


def test_a_blend_of_free_clips_is_a_smear() -> None:
    """How much of the clips' edges is left in the mean of all clips of a caption."""

    def edges(clips: np.ndarray) -> float:
        return sum(float(np.square(np.diff(clips, axis=axis)).mean()) for axis in (-2, -1))

    left = {}
    for setting in ("centred", "near", "free"):
        dataset = MovingDigits(setting=setting, labels=[Label("seven", "white", "left")])
        clips = np.stack([dataset[index].pixels.numpy() for index in range(200)])
        left[setting] = edges(clips.mean(axis=0)) / edges(clips)
    assert left["free"] < 0.6 * left["centred"]
    assert left["free"] < left["near"] < 0.8 * left["centred"]


def test_free_backgrounds_hardly_repeat() -> None:
    def backgrounds(setting: str) -> int:
        """Different left edges of still pictures, where no digit moving up or down comes."""
        label = Label("one", "blue", "up")
        dataset = MovingDigits(setting=setting, labels=[label])
        edges = {dataset[i].pixels[:, 0, :, 0].numpy().tobytes() for i in range(300)}
        return len(edges)

    assert backgrounds("centred") <= 20
    assert min(backgrounds("near"), backgrounds("free")) > 250


def test_batches_are_consecutive_and_resume() -> None:
    dataset = MovingDigits()
    assert list(islice(dataset.batches(3, seed=0), 2)) == [[0, 1, 2], [3, 4, 5]]
    assert next(dataset.batches(3, seed=0, start=5)) == [15, 16, 17]
    batch = next(make_loader(dataset, batch_size=2, start_batch=1))
    assert batch.pixels.shape == (2, 3, 9, 32, 32)
    assert batch.captions == [dataset.caption(2), dataset.caption(3)]

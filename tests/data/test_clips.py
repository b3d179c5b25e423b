from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt.data.captions import CaptionRule
from apt.data.clips import check_clips, clip_size
from apt.data.dataset import Sample
from apt.data.digits import MovingDigits
from apt.data.loader import make_loader
from apt.data.source import ClipRequest
from apt.errors import DataError, PromptLengthError

SIZE = (5, 4, 6)
REQUEST = ClipRequest(frames=5, height=4, width=6)
PIXELS = torch.zeros(3, *SIZE)


class Items:
    """A map-style data set of the given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def clip(value: float) -> Tensor:
    return torch.full((3, *SIZE), float(value))


@given(length=st.integers(1, 7), batch_size=st.integers(1, 5), start=st.integers(0, 9))
def test_every_pass_has_every_clip_and_goes_on_anywhere(
    length: int, batch_size: int, start: int
) -> None:
    clips = check_clips(Items(*((clip(i / 10), f"clip {i}") for i in range(length))), REQUEST)
    batches = list(islice(clips.batches(batch_size, seed=1), length + start + 1))
    # As many batches as clips are exactly as many passes as a batch has clips.
    seen = [index for batch in batches[:length] for index in batch]
    assert sorted(seen) == list(range(batch_size * length))
    assert next(clips.batches(batch_size, seed=1, start=start)) == batches[start]


def test_what_samples_are_conditioned_on_beside_captions_is_kept() -> None:
    camera = torch.full((2,), 7.0, requires_grad=True)
    samples = [Sample(clip(0.5), "a", extra={"camera": camera})]
    batch = next(make_loader(check_clips(Items(*samples), REQUEST), batch_size=2))
    assert torch.equal(batch.extra["camera"], torch.full((2, 2), 7.0))
    assert not batch.extra["camera"].requires_grad


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_reads_them(num_workers: int) -> None:
    clips = check_clips(Items((clip(0.5), "a"), Sample(clip(-0.5), "b")), REQUEST)
    batch = next(make_loader(clips, batch_size=2, num_workers=num_workers))
    assert batch.pixels is not None and batch.pixels.shape == (2, 3, *SIZE)
    assert sorted(batch.captions) == ["a", "b"]


def test_a_bad_clip_later_on_is_named_also_by_a_worker() -> None:
    clips = check_clips(Items((clip(0), "a"), (clip(float("nan")), "b")), REQUEST)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="Items, item 1 has values that are NaN"):
            next(make_loader(clips, batch_size=2, num_workers=num_workers))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (PIXELS, "has no caption"),
        ((PIXELS,), "is a tuple of 1; expected a pair"),
        ({"pixels": PIXELS}, "is a dict; expected a pair"),
        ((PIXELS.numpy(), "a"), "has pixels of type ndarray"),
        ((PIXELS.byte(), "a"), "is uint8; expected"),
        ((PIXELS.byte(), "a"), "convert uint8 with pixels / 127.5 - 1"),
        ((PIXELS.double(), "a"), "is float64; expected"),
        ((PIXELS.to("meta"), "a"), "is on meta; expected"),
        ((PIXELS[:1], "a"), "has the shape (1, 5, 4, 6)"),
        ((PIXELS[:, 0], "a"), "has the shape (3, 4, 6)"),
        ((PIXELS[:, :0], "a"), "has the shape (3, 0, 4, 6)"),
        ((PIXELS.transpose(2, 3), "a"), "is 5x6x4, but the run asks for 5x4x6"),
        ((PIXELS + 255, "a"), "has values from 255 to 255"),
        ((PIXELS + float("inf"), "a"), "NaN or infinite"),
        ((PIXELS, None), "has the caption None"),
    ],
)
def test_a_bad_first_clip_is_one_line_at_once(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        check_clips(Items(item), REQUEST)
    assert str(error.value).startswith("Items, item 0 ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items(), "Items is empty"),
        ((x for x in [PIXELS]), "generator is not a data set: expected __len__ and __getitem__"),
        (None, "NoneType is not a data set"),
    ],
)
def test_what_is_no_data_set(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_clips(dataset, REQUEST)


def test_pixels_alone_will_do_where_captions_are_not_read() -> None:
    request = ClipRequest(frames=5, height=4, width=6, captioned=False)
    assert check_clips(Items(PIXELS), request)[0].caption == ""


def words(prompts: Any) -> None:
    if any(len(prompt.split()) > 2 for prompt in prompts):
        raise PromptLengthError("more than 2 words")


def test_long_captions_are_cut_or_an_error() -> None:
    items = Items((PIXELS, "one two three"))
    cut = ClipRequest(frames=5, height=4, width=6, captions=CaptionRule(words, "cut"))
    assert check_clips(items, cut)[0].caption == "one two"
    for rule in ("skip", "error"):
        request = ClipRequest(frames=5, height=4, width=6, captions=CaptionRule(words, rule))
        with pytest.raises(DataError, match="item 0: long caption"):
            check_clips(items, request)


def test_a_fingerprint_is_of_clips_and_captions() -> None:
    def of(*items: Any) -> str:
        return check_clips(Items(*items), REQUEST).fingerprint

    first = of((clip(0), "a"), (clip(1), "b"))
    assert first == of((clip(0), "a"), (clip(1), "b"))
    assert len({first, of((clip(0), "a")), of((clip(0), "a"), (clip(1), "c"))}) == 3


class Own(MovingDigits):
    """A data set with an order of its own, and clips of two sizes."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(3, 1 + 4 * (index % 2), 4, 4), "a")


def test_a_data_set_with_an_order_of_its_own_keeps_it() -> None:
    own = Own()
    clips = check_clips(own, REQUEST)
    assert clips.fingerprint == own.fingerprint
    assert next(clips.batches(3, seed=0, start=2)) == [6, 7, 8]
    assert clip_size(own) is None
    with pytest.raises(DataError, match=r"samples of the shapes \(3, 1, 4, 4\), \(3, 5"):
        next(make_loader(clips, batch_size=2))


def test_the_size_is_that_of_the_first_clip() -> None:
    assert clip_size(Items((PIXELS, "a"))) == SIZE
    assert clip_size(Items()) is None
    with pytest.raises(DataError, match="float16"):
        clip_size(Items((PIXELS.half(), "a")))

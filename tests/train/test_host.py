"""A rank's share of an update, made one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt.data.dataset import Batch, Sample
from apt.data.loader import make_loader
from apt.train.host import MicroBatches
from tests.train.tiny_methods import single


class Halves(nn.Module):
    """A codec that halves pixels, and counts what it was given."""

    encodes_in_autocast = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        return pixels / 2


class Bytes:
    """Clips of one colour, whose bytes tell their index."""

    fingerprint = "bytes"
    eight_bits = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        return Sample(torch.full((3, 1, 2, 2), index / 127.5 - 1), str(index))

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        while True:
            yield list(range(start * batch_size, (start + 1) * batch_size))
            start += 1


def stage(codec: Any) -> Any:
    host = SimpleNamespace(device=single().device, autocast=lambda: torch.autocast("cpu"))
    return SimpleNamespace(codec=codec, host=host)


def loader(data: Bytes, **options: int) -> Iterator[Batch]:
    return make_loader(data, batch_size=8, micro_batch_size=2, **options)  # type: ignore[arg-type]


def test_no_more_is_made_than_is_asked_for_and_the_next_part_gets_the_same() -> None:
    data, codec, handed = Bytes(), Halves(), []
    read = loader(data).__next__
    batches = MicroBatches(stage(codec), read, 4, between=handed.append)
    assert data.asked == []
    first = batches[0]
    assert data.asked == [0, 1] and first.captions == ["0", "1"] and first.offset == 0
    whole = list(batches)
    assert [batch.offset for batch in whole] == [0, 2, 4, 6] and data.asked == list(range(8))
    again = list(batches)
    assert data.asked == list(range(8)) and len(codec.seen) == 4
    assert handed == [0, *range(4), *range(4)]
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.x, other.x) and one.captions == other.captions
    values = torch.cat([batch.x for batch in whole])[:, 0, 0, 0, 0]
    torch.testing.assert_close(values, (torch.arange(8) / 127.5 - 1) / 2)
    batches.skip()
    assert MicroBatches(stage(codec), read, 4)[0].captions == ["8", "9"]


def test_what_nothing_asked_for_is_skipped() -> None:
    read = loader(Bytes()).__next__
    batches = MicroBatches(stage(None), read, 4)
    assert batches[0].captions == ["0", "1"]
    batches.skip()
    assert MicroBatches(stage(None), read, 4)[0].captions == ["8", "9"]


def test_pixels_are_bytes_until_they_are_on_the_device() -> None:
    batch = next(loader(Bytes()))
    assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
    (micro_batch,) = MicroBatches(stage(None), lambda: batch, 1)
    assert micro_batch.x.dtype == torch.float32
    torch.testing.assert_close(micro_batch.x[1], Bytes()[1].pixels)


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_batches_are_the_share_of_a_rank_in_order(rank: int, tmp_path: Path) -> None:
    read = loader(Bytes(), rank=rank, world_size=2, start_batch=3)
    for number in (3, 4):
        share = [next(read), next(read)]
        begin = 8 * number + 4 * rank
        captions = [caption for batch in share for caption in batch.captions]
        assert captions == [str(index) for index in range(begin, begin + 4)]
        assert [batch.offset for batch in share] == [4 * rank, 4 * rank + 2]
        assert [batch.batch_index for batch in share] == [number, number]

"""Which clips are held out, and that none of them is ever trained on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.data.buckets import Bucket
from apt.data.clips import check_clips
from apt.data.dataset import BucketOrder
from apt.data.folder import VideoFolder
from apt.data.heldout import Divisible, hold_out
from apt.data.latent_shards import Clip, write_clips
from apt.data.latents import CacheInfo, LatentFolder, write_cache_info
from apt.data.loader import make_loader
from apt.data.source import ClipRequest
from apt.errors import ConfigError
from tests.data.media import noise, write_image

REQUEST = ClipRequest(frames=1, height=4, width=4)


class Numbered(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Clips that show their own number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.zeros(3, 1, 4, 4), str(index)


def numbered(count: int) -> Divisible:
    clips = check_clips(Numbered(count), REQUEST)
    assert isinstance(clips, Divisible)
    return clips


def items(dataset: Divisible) -> set[int]:
    return {item for group in dataset.members.values() for item in group}


@given(count=st.integers(2, 60), clips=st.integers(1, 59))
@settings(max_examples=30, deadline=None)
def test_a_number_is_met_and_the_parts_are_all(count: int, clips: int) -> None:
    if clips >= count:
        with pytest.raises(ConfigError, match="leaves nothing to train on"):
            hold_out(numbered(count), clips=clips)
        return
    kept, held = hold_out(numbered(count), clips=clips)
    assert len(items(held)) == clips
    assert items(kept) | items(held) == set(range(count))
    assert not items(kept) & items(held)


def test_a_share_is_met_about_and_does_not_depend_on_what_else_there_is() -> None:
    _, held = hold_out(numbered(1000), share=0.1)
    assert 70 < len(items(held)) < 130
    _, fewer = hold_out(numbered(500), share=0.1)
    assert items(fewer) == {item for item in items(held) if item < 500}
    with pytest.raises(ConfigError, match=r"0 of 3 files would be held out, .* nothing to measure"):
        hold_out(numbered(3), share=1e-6)


def test_a_smaller_part_lies_in_a_larger_one() -> None:
    small, large = (items(hold_out(numbered(50), clips=number)[1]) for number in (3, 10))
    assert small < large


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_no_rank_ever_trains_on_one(world: int, start: int) -> None:
    kept, held = hold_out(numbered(23), clips=5)
    seen: set[str] = set()
    for rank in range(world):
        loader = make_loader(
            kept,  # type: ignore[arg-type]
            batch_size=4, rank=rank, world_size=world, seed=3, start_batch=start,
        )  # fmt: skip
        for batch in islice(loader, 20):
            seen |= set(batch.captions)
    assert seen == {str(item) for item in items(kept)}
    assert not seen & {str(item) for item in items(held)}


def test_an_index_is_the_same_sample_in_a_part() -> None:
    whole = numbered(12)
    kept, held = hold_out(whole, clips=4)
    for part in (kept, held):
        for index in items(part):
            assert part[index].caption == whole[index + 12].caption == str(index)  # type: ignore[index]


def test_a_bucket_that_is_held_out_whole_is_gone() -> None:
    order = BucketOrder({"a": [0], "b": [1, 2]}, 3).part([1, 2])
    assert order.members == {"b": [1, 2]}
    assert all(set(batch) <= {1, 2, 4, 5} for batch in islice(order.batches(2, seed=0), 2))


def test_a_cache_holds_out_what_its_folder_would(tmp_path: Path, folder: Path) -> None:
    videos = VideoFolder(folder, buckets=[(1, 8, 8)])
    info = CacheInfo(
        codec={}, text_encoder=None, channels=2, temporal_compression=1, spatial_compression=1,
        frames=1, height=2, width=2, fps=8.0, dtype="float32", source="", num_clips=2 * 9,
        num_prompts=0,
    )  # fmt: skip
    write_cache_info(tmp_path, info)
    latents = torch.zeros(2, 1, 2, 2)
    clips = [  # two of each
        Clip(latents, videos.caption(item), Bucket(1, 2, 2), file=videos.file_name(item))
        for item in (*range(9), *range(9))
    ]
    write_clips(tmp_path / "latents-00000.safetensors", clips)
    cache = LatentFolder(tmp_path)
    kept, held = hold_out(cache, share=0.3)
    files = [{part.file_name(item) for item in items(part)} for part in (kept, held)]
    _, same = hold_out(videos, share=0.3)
    assert files[1] == {videos.file_name(item) for item in items(same)}
    assert not files[0] & files[1] and len(items(kept)) + len(items(held)) == 18
    assert kept.fingerprint == cache.fingerprint
    trained = {index % 18 for batch in islice(kept.batches(2, seed=0), 40) for index in batch}
    assert trained == items(kept)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures, the first of them with two captions."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        write_image(root / f"{number}.png", noise(1, 8, 8, number)[0])
    rows = [f"{number}.png,about {number}" for number in range(8)]
    (root / "metadata.csv").write_text("\n".join(["file_name,caption", *rows, "0.png,again"]))
    return root


def test_all_captions_of_a_file_are_held_out_with_it(folder: Path) -> None:
    whole = VideoFolder(folder, buckets=[(1, 8, 8)])
    for clips in range(1, 8):
        kept, held = hold_out(whole, clips=clips)
        files = [{whole.file_name(item) for item in items(part)} for part in (kept, held)]
        assert not files[0] & files[1]
        assert len(files[1]) == clips
        assert held.bucket_sizes() == {(1, 8, 8): len(items(held))}


def test_a_broken_file_is_never_replaced_by_one_that_is_held_out(folder: Path) -> None:
    whole = VideoFolder(folder, buckets=[(1, 8, 8)])
    kept, _ = hold_out(whole, clips=5)
    broken, good = sorted(items(kept))[0], {whole.caption(item) for item in items(kept)}
    file = whole.items[broken].entry.path
    content = file.read_bytes()
    file.write_bytes(b"broken")
    try:
        captions = {kept[broken + epoch * len(whole)].caption for epoch in range(30)}
    finally:
        file.write_bytes(content)
    assert captions <= good
    assert kept.report is whole.report


def test_the_same_files_whatever_the_seed(folder: Path) -> None:
    parts = [
        hold_out(VideoFolder(folder, buckets=[(1, 8, 8)], seed=seed), clips=3)[1] for seed in (0, 1)
    ]
    assert items(parts[0]) == items(parts[1])

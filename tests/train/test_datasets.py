"""Of several ranks, one reads a folder."""

from __future__ import annotations

import dataclasses
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from apt.data import folder, latents, scan, shards
from apt.data.dataset import EncodedSample, Sample
from apt.data.latent_shards import Clip, write_clips
from apt.errors import DataError
from apt.methods import PretrainConfig
from apt.train.config import DataConfig, TrainConfig
from apt.train.datasets import make_dataset
from apt.train.resolve import resolve_with_notes
from tests.data.media import noise, write_image
from tests.data.test_latents import SMALL, info

Source = Literal["folder", "webdataset", "latents"]


class Ranks:
    """`from_main` of rank 0, then of another rank, which gets what rank 0 sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def first(self, make: Callable[[], Any]) -> Any:
        made = make()
        self.sent.append(pickle.dumps(made))
        return made

    def second(self, _: Callable[[], Any]) -> Any:
        return pickle.loads(self.sent.pop(0))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Images with captions, as files, in a shard, and as latents."""
    for number in range(3):
        write_image(tmp_path / "folder" / f"{number}.png", noise(1, 32, 48, seed=number)[0])
        (tmp_path / "folder" / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "webdataset").mkdir()
    with tarfile.open(tmp_path / "webdataset" / "0.tar", "w") as shard:
        for path in sorted((tmp_path / "folder").iterdir()):
            shard.add(path, path.name)
    cache = tmp_path / "latents"
    latents.write_cache_info(cache, dataclasses.replace(info(3, 0), text_encoder=None))
    made = [Clip(torch.full((2, 1, 1, 1), float(i)), f"picture {i}", SMALL) for i in range(3)]
    write_clips(cache / "latents-00000.safetensors", made)
    return tmp_path


def pixels(sample: Sample | EncodedSample) -> torch.Tensor:
    return sample.pixels if isinstance(sample, Sample) else sample.latents


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this rank reads the folder")

    for module, name in (
        (folder, "look_at"),
        (scan, "scan_folder"),
        (folder, "scan_folder"),
        (shards, "scan_shards"),
        (latents, "read_entries"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("source", ["folder", "webdataset", "latents"])
def test_another_rank_has_the_same_clips_and_reads_no_header(
    clips: Path, monkeypatch: pytest.MonkeyPatch, source: Source
) -> None:
    config = DataConfig(
        source=source, path=str(clips / source), frames=1, height=32, width=48, fps=0.0
    )
    ranks = Ranks()
    first = make_dataset(config, seed=3, from_main=ranks.first)
    nothing_is_read(monkeypatch)
    second = make_dataset(config, seed=3, from_main=ranks.second)
    assert first.fingerprint == second.fingerprint
    order = [next(iter(data.batches(3, seed=3))) for data in (first, second)]
    assert order[0] == order[1]
    for index in order[0]:
        ours, theirs = first[index], second[index]
        assert ours.caption == theirs.caption
        assert torch.equal(pixels(ours), pixels(theirs))


def test_a_size_that_is_taken_of_a_folder_is_taken_once(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        name="x",
        run_dir="x",
        stage=PretrainConfig(),
        data=DataConfig(source="folder", path=str(clips / "folder")),
    )
    ranks = Ranks()
    first = resolve_with_notes(config, None, from_main=ranks.first)
    nothing_is_read(monkeypatch)
    assert resolve_with_notes(config, None, from_main=ranks.second) == first
    assert first[0].data.width


def test_an_empty_folder_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(tmp_path), frames=1, height=32, width=48, fps=0.0)
    with pytest.raises(DataError, match="nothing usable"):
        make_dataset(config, seed=0, from_main=Ranks().first)

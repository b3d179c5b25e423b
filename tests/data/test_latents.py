"""The files of a latent cache: whole, read back as written, and refused when they are not."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt.condition import EncodedText
from apt.data.buckets import Bucket
from apt.data.dataset import Batch, EncodedSample
from apt.data.latent_shards import Clip, write_clips
from apt.data.latents import (
    CacheInfo,
    LatentFolder,
    TextFolder,
    read_cache_info,
    write_cache_info,
    write_texts,
)
from apt.data.loader import make_loader
from apt.errors import DataError
from apt.files import write_safetensors

SMALL, WIDE = Bucket(1, 8, 8), Bucket(5, 8, 16)


def info(num_clips: int, num_prompts: int) -> CacheInfo:
    return CacheInfo(
        codec={"architecture": "patchify", "config": {}},
        text_encoder={"architecture": "umt5", "config": {}},
        channels=2,
        temporal_compression=4,
        spatial_compression=8,
        frames=5,
        height=8,
        width=16,
        fps=8.0,
        dtype="float32",
        source="",
        num_clips=num_clips,
        num_prompts=num_prompts,
    )


def clip(number: int, bucket: Bucket = SMALL, dtype: torch.dtype = torch.float32) -> Clip:
    shape = (2, (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
    return Clip(torch.full(shape, float(number), dtype=dtype), f"clip {number}", bucket)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two shards: 64 small clips, then 3 small and 5 wide ones."""
    write_cache_info(tmp_path, info(72, 3))
    write_clips(tmp_path / "latents-00000.safetensors", [clip(i) for i in range(64)])
    rest = [clip(64 + i) for i in range(3)] + [clip(67 + i, WIDE) for i in range(5)]
    write_clips(tmp_path / "latents-00001.safetensors", rest)
    texts = {
        "a": EncodedText(torch.ones(1, 3, 4)),
        "b": EncodedText(torch.zeros(1, 2, 4), torch.tensor([[True, False]]), torch.ones(1, 5)),
    }
    write_texts(tmp_path / "texts-00000.safetensors", texts)
    write_texts(tmp_path / "texts-00001.safetensors", {"": EncodedText(torch.ones(1, 1, 4))})
    return tmp_path


def test_clips_come_back_as_they_were_written(cache: Path) -> None:
    folder = LatentFolder(cache)
    assert len(folder) == 72
    for index in (0, 63, 64, 71, 72 + 5):
        sample, number = folder[index], index % 72
        assert sample.caption == f"clip {number}"
        assert torch.equal(sample.latents, clip(number, SMALL if number < 67 else WIDE).latents)


def test_batches_have_one_shape_and_every_clip_once_a_pass(cache: Path) -> None:
    loader = make_loader(LatentFolder(cache), batch_size=1, seed=3)
    captions = [batch.captions[0] for batch in islice(loader, 72)]
    assert sorted(captions) == sorted(f"clip {i}" for i in range(72))
    for batch in islice(make_loader(LatentFolder(cache), batch_size=4, seed=3), 40):
        assert batch.pixels is None and batch.latents is not None
        expected = [float(caption.split()[1]) for caption in batch.captions]
        assert batch.latents.amax(dim=(1, 2, 3, 4)).tolist() == expected


def test_images_or_videos_alone(cache: Path) -> None:
    small, wide = LatentFolder(cache, images="only"), LatentFolder(cache, images="none")
    assert (len(small), len(wide)) == (67, 5)
    assert wide[0].caption == "clip 67" and small[66].caption == "clip 66"
    assert small.fingerprint != LatentFolder(cache).fingerprint
    write_clips(cache / "latents-00001.safetensors", [clip(i) for i in range(8)])
    with pytest.raises(DataError, match="no video"):
        LatentFolder(cache, images="none")


def test_a_loader_goes_on_where_one_stopped(cache: Path) -> None:
    whole = [b.captions for b in islice(make_loader(LatentFolder(cache), batch_size=4), 30)]
    rest = make_loader(LatentFolder(cache), batch_size=4, start_batch=20, num_workers=1)
    assert [b.captions for b in islice(rest, 10)] == whole[20:]


def test_texts_come_back_as_they_were_written(cache: Path) -> None:
    texts = LatentFolder(cache).texts
    assert set(texts) == {"a", "b", ""}
    assert texts["a"].mask is None and texts["a"].pooled is None
    assert texts["a"].tokens.shape == (1, 3, 4)
    mask, pooled = texts["b"].mask, texts["b"].pooled
    assert mask is not None and mask.tolist() == [[True, False]]
    assert pooled is not None and pooled.tolist() == [[1.0] * 5]


def test_texts_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """The names and shapes in the file are part of format 1."""
    tensors = {
        "0.tokens": torch.zeros(2, 4),
        "0.mask": torch.tensor([True, False]),
        "0.pooled": torch.ones(5),
        "1.tokens": torch.ones(3, 4),
    }
    path = tmp_path / "texts-00000.safetensors"
    write_safetensors(path, tensors, {"prompts": json.dumps(["b", "a"])})
    texts = TextFolder(tmp_path)
    (mask,) = texts["b"].mask  # type: ignore[misc]
    assert mask.tolist() == [True, False] and texts["b"].tokens.shape == (1, 2, 4)
    assert texts["a"].mask is None and texts["a"].tokens.tolist() == [[[1.0] * 4] * 3]
    write_texts(tmp_path / "again.safetensors", texts)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_what_else_clips_are_conditioned_on_comes_back(tmp_path: Path) -> None:
    write_cache_info(tmp_path, info(11, 0))
    cameras = [torch.full((3, 4), float(i)) for i in range(11)]
    clips = [clip(i)._replace(extra={"camera": camera}) for i, camera in enumerate(cameras)]
    write_clips(tmp_path / "latents-00000.safetensors", clips)
    folder = LatentFolder(tmp_path)
    assert folder[1].extra.keys() == folder[10].extra.keys() == {"camera"}
    batch = next(make_loader(folder, batch_size=4))
    numbers = [int(caption.split()[1]) for caption in batch.captions]
    assert torch.equal(batch.extra["camera"], torch.stack([cameras[i] for i in numbers]))
    broken = clip(0)._replace(extra={"camera": torch.tensor([float("inf")])})
    with pytest.raises(DataError, match="camera of the clip 'clip 0' has values that are NaN"):
        write_clips(tmp_path / "latents-00001.safetensors", [broken])


def test_samples_of_a_batch_are_conditioned_on_the_same() -> None:
    x = torch.zeros(2, 1, 1, 1)
    samples = [EncodedSample(x, "a"), EncodedSample(x, "b", {"camera": torch.zeros(3)})]
    with pytest.raises(DataError, match="different conditions: camera and only captions"):
        Batch.collate(samples, offset=0, batch_index=0)


def test_bf16_is_stored_as_bf16(tmp_path: Path) -> None:
    write_cache_info(tmp_path, info(1, 0))
    write_clips(tmp_path / "latents-00000.safetensors", [clip(1, dtype=torch.bfloat16)])
    assert LatentFolder(tmp_path)[0].latents.dtype == torch.bfloat16


def test_the_fingerprint_tells_captions_apart(cache: Path) -> None:
    before = LatentFolder(cache).fingerprint
    assert LatentFolder(cache).fingerprint == before
    path = cache / "latents-00000.safetensors"
    write_clips(path, [clip(i)._replace(caption="other") for i in range(64)])
    assert LatentFolder(cache).fingerprint != before


@pytest.mark.parametrize(
    "name", ["latents-00001.safetensors", "texts-00001.safetensors", "latents.json"]
)
def test_a_missing_file_is_named(cache: Path, name: str) -> None:
    (cache / name).unlink()
    with pytest.raises(DataError, match="data encode") as caught:
        LatentFolder(cache)
    if name != "latents.json":
        assert "incomplete" in str(caught.value)


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "texts-00000.safetensors"])
def test_a_truncated_file_is_named(cache: Path, name: str) -> None:
    path = cache / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=name):
        LatentFolder(cache)


def test_a_file_that_goes_while_it_is_used_is_named(cache: Path) -> None:
    folder = LatentFolder(cache)
    (cache / "latents-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"latents-00001"):
        folder[70]


def test_a_tensor_that_a_file_does_not_name_is_damage(cache: Path) -> None:
    for name, key in (("latents-00000", b'"0":'), ("texts-00000", b'"0.tokens":')):
        path = cache / f"{name}.safetensors"
        path.write_bytes(path.read_bytes().replace(key, key.replace(b"0", b"x")))
    folder = LatentFolder(cache)
    with pytest.raises(DataError, match=r"latents-00000.* damaged"):
        folder[0]
    with pytest.raises(DataError, match=r"texts-00000.* damaged"):
        folder.texts[next(iter(folder.texts))]


def test_foreign_files_are_refused(cache: Path) -> None:
    (cache / "latents-00001.safetensors").write_bytes(
        (cache / "texts-00000.safetensors").read_bytes()
    )
    with pytest.raises(DataError, match="not a file of a latent cache"):
        LatentFolder(cache)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"format": 1, "codec": {}}, {"format": 1, "unknown": 1}]
)
def test_another_format_is_refused(cache: Path, change: dict[str, object]) -> None:
    document = json.loads((cache / "latents.json").read_text())
    document = {"format": change["format"], **change} if "codec" in change else document | change
    (cache / "latents.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="again"):
        read_cache_info(cache)


def test_values_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    bad = Clip(torch.tensor([float("nan")]).view(1, 1, 1, 1), "broken", SMALL)
    with pytest.raises(DataError, match="broken"):
        write_clips(tmp_path / "latents-00000.safetensors", [bad])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tarred(tmp_path: Path) -> Path:
    """Two WebDataset shards: 64 small clips in bf16, then a wide one with a first frame."""
    write_cache_info(tmp_path, dataclasses.replace(info(65, 0), shards="tar"))
    small = [clip(i, dtype=torch.bfloat16) for i in range(64)]
    write_clips(tmp_path / "latents-00000.tar", small)
    last = clip(64, WIDE)._replace(extra={"first_frame": torch.arange(3.0)}, file="v.mp4")
    write_clips(tmp_path / "latents-00001.tar", [last])
    return tmp_path


def test_shards_of_latents_hold_what_other_files_do(tarred: Path) -> None:
    folder = LatentFolder(tarred)
    assert len(folder) == 65
    for index in (0, 63, 65 + 5):
        sample = folder[index]
        assert sample.caption == f"clip {index % 65}" and not sample.extra
        assert torch.equal(sample.latents, clip(index % 65, dtype=torch.bfloat16).latents)
    last = folder[64]
    assert torch.equal(last.latents, clip(64, WIDE).latents)
    assert torch.equal(last.extra["first_frame"], torch.arange(3.0))
    assert (folder.file_name(64), folder.file_name(1)) == (
        "v.mp4",
        "latents-00000.tar, clip 000001",
    )


def test_shards_of_latents_are_those_that_other_tools_read(tarred: Path) -> None:
    with tarfile.open(tarred / "latents-00001.tar") as shard:
        assert shard.getnames() == ["000000.safetensors", "000000.json"]
        said = json.load(shard.extractfile("000000.json"))  # type: ignore[arg-type]
    assert said == {"caption": "clip 64", "bucket": [5, 8, 16], "file": "v.mp4"}


def test_a_loader_goes_on_in_shards(tarred: Path) -> None:
    whole = [b.captions for b in islice(make_loader(LatentFolder(tarred), batch_size=4), 20)]
    rest = make_loader(LatentFolder(tarred), batch_size=4, start_batch=15, num_workers=1)
    assert [b.captions for b in islice(rest, 5)] == whole[15:]


def test_damaged_shards_of_latents_are_named(tarred: Path) -> None:
    folder = LatentFolder(tarred)
    shard = tarred / "latents-00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:560])
    with pytest.raises(DataError, match=r"latents-00001\.tar"):
        folder[64]
    for broken in (content[:100], content.replace(b'"bucket"', b'"basket"')):
        shard.write_bytes(broken)
        with pytest.raises(DataError, match=r"latents-00001\.tar is missing or damaged"):
            LatentFolder(tarred)


def test_caches_from_before_there_were_kinds_of_shards_keep_their_fingerprint(cache: Path) -> None:
    """So that runs on them can continue: the fingerprint contains the repr of `CacheInfo`."""
    assert "shards" not in repr(read_cache_info(cache))

"""A folder of captioned videos to a latent cache, which training reads without VAE or encoder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from apt.checkpoints.info import ComponentInfo
from apt.condition import EncodedText, TextEncoder
from apt.data.buckets import Bucket
from apt.data.dataset import Sample
from apt.data.folder import VideoFolder
from apt.data.latent_shards import Clip, write_clips
from apt.data.latents import (
    CLIPS_PER_SHARD,
    INFO_FILE,
    PROMPTS_PER_SHARD,
    CacheInfo,
    ShardKind,
    TextFolder,
    read_cache_info,
    write_cache_info,
    write_texts,
)
from apt.errors import DataError
from apt.pixels import LatentCodec

T = TypeVar("T")
Progress = Callable[[int, int], None]


def plan_cache(
    videos: VideoFolder,
    codec: ComponentInfo,
    built: LatentCodec,
    text_encoder: ComponentInfo | None,
    *,
    size: tuple[int, int, int],
    fps: float,
    clips_per_item: int = 1,
    prompts: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    shards: ShardKind = "safetensors",
) -> tuple[CacheInfo, list[str]]:
    """What a cache of these videos will be, and the prompts that it needs embeddings of.

    Args:
        videos: the clips, in buckets, with captions that the text encoder takes.
        codec, built: description of the codec, and the codec.
        text_encoder: description; None if the model's own encoder runs while it trains.
        size: frames, height, width that the buckets were made for.
        fps: of the clips, 0 for each video's own.
        clips_per_item: clips of each file, each with a start of its own.
        prompts: to embed besides the captions; the empty one always is.
        dtype: of the stored latents.
        shards: how files of latents are stored.
    """
    captions = sorted({videos.caption(index) for index in range(len(videos))})
    wanted = list(dict.fromkeys([*captions, "", *prompts])) if text_encoder else []
    source = hashlib.sha256(repr((videos.fingerprint, clips_per_item)).encode()).hexdigest()
    info = CacheInfo(
        codec=_describe(codec),
        text_encoder=None if text_encoder is None else _describe(text_encoder),
        channels=built.channels,
        temporal_compression=built.temporal_compression,
        spatial_compression=built.spatial_compression,
        frames=size[0],
        height=size[1],
        width=size[2],
        fps=fps,
        dtype=str(dtype).removeprefix("torch."),
        source=source,
        num_clips=len(videos) * clips_per_item,
        num_prompts=len(wanted),
        shards=shards,
    )
    return info, wanted


def open_cache(out: Path, info: CacheInfo) -> None:
    """Begin a cache, or go on with one of the same plan. Of several ranks, one calls it first.

    Raises:
        DataError: the folder holds a cache of something else, or other files, or cannot be written.
    """
    if (out / INFO_FILE).is_file():
        before = read_cache_info(out)
        same = dataclasses.replace(before, num_prompts=info.num_prompts)
        changed = [
            field.name
            for field in dataclasses.fields(info)
            if getattr(same, field.name) != getattr(info, field.name)
        ]
        if changed:
            raise DataError(
                f"{out} holds a cache that was made otherwise (different: {', '.join(changed)}); "
                "repeat the options of then, or choose another folder"
            )
        info = dataclasses.replace(info, num_prompts=max(info.num_prompts, before.num_prompts))
    elif out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is neither empty nor a latent cache; choose another folder")
    write_cache_info(out, info)


def plan_texts(out: Path, prompts: Sequence[str]) -> dict[Path, list[str]]:
    """The prompts that the cache lacks, by the shard that each goes to."""
    texts = TextFolder(out)
    missing = [prompt for prompt in prompts if prompt not in texts]
    numbers = [int(path.stem.partition("-")[2]) for path in texts.shards]
    first = max(numbers, default=-1) + 1
    shards = enumerate(_chunks(missing, PROMPTS_PER_SHARD), first)
    return {out / f"texts-{number:05d}.safetensors": shard for number, shard in shards}


def encode_texts(
    shards: Mapping[Path, Sequence[str]],
    encoder: TextEncoder,
    *,
    batch_size: int,
    progress: Progress,
) -> None:
    """Embed the prompts of each shard, and write it."""
    total, done = sum(map(len, shards.values())), 0
    for path, shard in shards.items():
        encoded: dict[str, EncodedText] = {}
        for batch in _chunks(shard, batch_size):
            encoded |= dict(zip(batch, encoder(batch).to("cpu").split(), strict=True))
            progress(done + len(encoded), total)
        write_texts(path, encoded)
        done += len(shard)


def encode_clips(
    out: Path,
    info: CacheInfo,
    videos: VideoFolder,
    codec: LatentCodec,
    *,
    batch_size: int,
    progress: Progress,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Encode the shards that are not there yet; returns how many clips were due.

    Clips whose file breaks while it is decoded are left out, and named in `videos.report`. Several
    processes share the work: each makes every `world_size`-th shard.

    Raises:
        DataError: values that are not finite, a disk that refuses, a broken file if the folder is
            strict.
    """
    plan = _plan(videos, info.num_clips)
    shards = list(zip(info.clip_shards(), _chunks(plan, CLIPS_PER_SHARD), strict=True))
    mine = shards[rank::world_size]
    due = [(name, indices) for name, indices in mine if not (out / name).is_file()]
    total, done = sum(len(indices) for _, indices in due), 0
    device, dtype = _device(codec), getattr(torch, info.dtype)
    for name, indices in due:
        clips: list[Clip] = []
        for batch in _batches(videos, indices, batch_size):
            pixels = torch.stack([sample.pixels for _, sample in batch])
            latents = codec.encode(pixels.to(device)).to(dtype).cpu()
            bucket = Bucket(*pixels.shape[2:])
            clips += (
                Clip(x, sample.caption, bucket, sample.extra, file)
                for x, (file, sample) in zip(latents, batch, strict=True)
            )
            progress(done + len(clips), total)
        write_clips(out / name, clips)
        done += len(indices)
    progress(total, total)
    return total


def _plan(videos: VideoFolder, num_clips: int) -> list[int]:
    """All indices, those of one bucket together, so that they fill batches."""
    items = videos.items
    return sorted(range(num_clips), key=lambda index: (items[index % len(items)].bucket, index))


def _batches(
    videos: VideoFolder, indices: Sequence[int], size: int
) -> Iterator[list[tuple[str, Sample]]]:
    """Samples of one shape each, with the names of their files, decoded as they are needed."""
    batch: list[tuple[str, Sample]] = []
    for index in indices:
        sample = videos[index]
        if sample.problems:
            continue  # it stands in for a broken file, and has a place of its own
        if len(batch) == size or (batch and batch[0][1].pixels.shape != sample.pixels.shape):
            yield batch
            batch = []
        batch.append((videos.file_name(index), sample))
    if batch:
        yield batch


def _describe(part: ComponentInfo) -> dict[str, object]:
    # Lists, as JSON gives them back.
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in part.config.items()}
    return {"architecture": part.architecture, "config": config}


def _device(codec: LatentCodec) -> torch.device:
    first = next(codec.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk

"""Encode a folder of captioned videos into a latent cache.

Training from such a cache needs neither the VAE nor the text encoder.
"""

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
    """Return the description of the cache to make, and the prompts to embed for it.

    Args:
        videos: the clips, in buckets, with captions that the text encoder accepts.
        codec, built: the description of the codec, and the codec itself.
        text_encoder: its description; None if the model's own encoder runs during training.
        size: the (frames, height, width) that the buckets were made for.
        fps: frame rate of the clips; 0 keeps that of each video.
        clips_per_item: clips per file, each with its own start.
        prompts: embedded besides the captions. The empty prompt always is.
        dtype: of the stored latents.
        shards: file format of the latents.
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
    """Create a cache, or reopen one with the same description.

    With several ranks, one of them must call this before the others.

    Raises:
        DataError: if the folder holds another cache or other files, or cannot be written.
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
                f"{out} holds a cache made with other options or files (different: "
                f"{', '.join(changed)}); use the same as before, or choose another folder"
            )
        info = dataclasses.replace(info, num_prompts=max(info.num_prompts, before.num_prompts))
    elif out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is neither empty nor a latent cache; choose another folder")
    write_cache_info(out, info)


def plan_texts(out: Path, prompts: Sequence[str]) -> dict[Path, list[str]]:
    """Return the prompts that the cache still lacks, grouped by the shard to write them to."""
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
    """Embed the prompts of each shard and write the shard."""
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
    """Encode the missing shards; returns the number of clips that they cover.

    Clips of files that cannot be decoded are left out and named in `videos.report`. Several
    processes can share the work: each makes every `world_size`-th shard.

    Raises:
        DataError: for latents that are not finite, a failed write, or, if the folder is strict, a
            file that cannot be decoded.
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
    """Return all indices, grouped by bucket so that they fill batches."""
    items = videos.items
    return sorted(range(num_clips), key=lambda index: (items[index % len(items)].bucket, index))


def _batches(
    videos: VideoFolder, indices: Sequence[int], size: int
) -> Iterator[list[tuple[str, Sample]]]:
    """Yield batches of samples of one shape, with their file names, decoding lazily."""
    batch: list[tuple[str, Sample]] = []
    for index in indices:
        sample = videos[index]
        if sample.problems:
            continue  # a stand-in for a broken file; the clip itself has its own index
        if len(batch) == size or (batch and batch[0][1].pixels.shape != sample.pixels.shape):
            yield batch
            batch = []
        batch.append((videos.file_name(index), sample))
    if batch:
        yield batch


def _describe(part: ComponentInfo) -> dict[str, object]:
    # JSON reads tuples back as lists.
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in part.config.items()}
    return {"architecture": part.architecture, "config": config}


def _device(codec: LatentCodec) -> torch.device:
    first = next(codec.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk

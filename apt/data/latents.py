"""A folder of encoded clips: latents and text embeddings in shards.

    latents.json                 what was encoded, by which codec and text encoder: `CacheInfo`
    latents-00000.safetensors    latents (C, T', H', W') of clips, with captions in its metadata
    latents-00000.tar            or these: a WebDataset shard, of each clip a .safetensors with
                                 "latents" and what else it is conditioned on, and a .json
    texts-00000.safetensors      embeddings of prompts, with the prompts in its metadata

A shard is there whole or not at all, so writing one continues after any interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from apt.condition import EncodedText
from apt.data.buckets import Bucket
from apt.data.captions import CaptionRule, Refused
from apt.data.dataset import BucketOrder, EncodedSample, Shuffled
from apt.data.latent_shards import (
    Entry,
    open_shard,
    read_entries,
    read_latents,
    read_metadata,
    write_shard,
)
from apt.data.tar import Member
from apt.errors import DataError
from apt.files import write_text
from apt.untrusted import read_json_file

_LOG = logging.getLogger(__name__)

ShardKind = Literal["safetensors", "tar"]

INFO_FILE = "latents.json"
FORMAT = 1
CLIPS_PER_SHARD = 64
PROMPTS_PER_SHARD = 256


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The contents of `latents.json`.

    Attributes:
        codec, text_encoder: {"architecture", "config"} of the parts that encoded; no text encoder:
            that of the model has weights of its own, and encodes while it trains.
        channels, temporal_compression, spatial_compression: of the codec.
        frames, height, width, fps: the clips that were asked for; height times width is the pixel
            budget of aspect-ratio buckets.
        dtype: of the stored latents.
        source: hash of the clips that were to be encoded.
        num_clips: how many they are; a shard has `CLIPS_PER_SHARD` of them, less broken ones.
        num_prompts: distinct captions and extra prompts that have embeddings at the end.
        shards: the kind of the files of latents; caches of earlier versions do not say.
    """

    codec: dict[str, Any]
    text_encoder: dict[str, Any] | None
    channels: int
    temporal_compression: int
    spatial_compression: int
    frames: int
    height: int
    width: int
    fps: float
    dtype: str
    source: str
    num_clips: int
    num_prompts: int
    # Not in fingerprints, which are those of earlier versions: names of files tell it as well.
    shards: ShardKind = field(default="safetensors", repr=False)

    def clip_shards(self) -> list[str]:
        """Names of all files of latents."""
        count = -(-self.num_clips // CLIPS_PER_SHARD)
        return [f"latents-{number:05d}.{self.shards}" for number in range(count)]


class LatentFolder(Shuffled):
    """The clips of a latent cache, as `EncodedSample`s.

    The order is that of the videos themselves, if each gave one clip.

    Args:
        directory: written by `diffusion-apt data encode`.
        images: "mix" has all clips, "only" those of one frame, "none" the longer ones.
        captions: what becomes of captions that the text encoder refuses, if it encodes while the
            model trains; None asks no encoder.

    Attributes:
        info: what the cache says of itself.
        texts: the embeddings of its prompts.

    Raises:
        DataError: no cache, one that is not complete, a damaged file, or no clip of that kind.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        images: Literal["mix", "only", "none"] = "mix",
        captions: CaptionRule | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.info = read_cache_info(self.directory)
        self.texts = TextFolder(self.directory)
        names = self.info.clip_shards()
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing or len(self.texts) < self.info.num_prompts:
            raise DataError(
                f"{directory}: the cache is not complete, {len(names) - len(missing)} of "
                f"{len(names)} files of latents and {len(self.texts)} of {self.info.num_prompts} "
                "prompts are there; run the same `data encode` again, it goes on"
            )
        self._clips: list[tuple[str, str, str]] = []
        self._files: list[str] = []
        self._places: list[Member | None] = []
        members: dict[Bucket, list[int]] = {}
        for name in names:
            for entry in _usable(name, read_entries(self.directory / name), captions):
                if images == "mix" or (images == "only") == (entry.bucket.frames == 1):
                    members.setdefault(entry.bucket, []).append(len(self._clips))
                    self._clips.append((name, entry.key, entry.caption))
                    self._files.append(entry.file or f"{name}, clip {entry.key}")
                    self._places.append(entry.at)
        if not self._clips:
            kind = {"mix": "clip", "only": "image", "none": "video"}[images]
            raise DataError(
                f"{directory}: the cache has no {kind} in it; encode a folder with some"
            )
        self._order = BucketOrder(dict(sorted(members.items())), len(self._clips))

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    @property
    def fingerprint(self) -> str:
        """A hash of what was encoded, and of all captions."""
        digest = hashlib.sha256(repr(self.info).encode())
        digest.update(repr(self._clips).encode())
        return digest.hexdigest()

    def file_name(self, index: int) -> str:
        """The file that a sample was made of; in caches of earlier versions its place in them."""
        return self._files[index % len(self._files)]

    def __getitem__(self, index: int) -> EncodedSample:
        """Sample `index`: clip `index % len(self)`.

        Raises DataError if the file has gone or is damaged.
        """
        number = index % len(self._clips)
        name, key, caption = self._clips[number]
        latents, extra = read_latents(self.directory / name, key, self._places[number])
        return EncodedSample(latents, caption, extra)


class TextFolder(Mapping[str, EncodedText]):
    """The embeddings of a cache by prompt, of one row each, read when they are asked for.

    Raises DataError for a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.shards = sorted(directory.glob("texts-*.safetensors"))
        self._places = {
            prompt: (path, number)
            for path in self.shards
            for number, prompt in enumerate(_prompts(path))
        }

    def __getitem__(self, prompt: str) -> EncodedText:
        path, number = self._places[prompt]
        with open_shard(path) as shard:
            keys = set(shard.keys())

            def row(kind: str) -> Tensor | None:
                key = f"{number}.{kind}"
                return shard.get_tensor(key)[None] if key in keys else None

            tokens = shard.get_tensor(f"{number}.tokens")[None]
            return EncodedText(tokens, row("mask"), row("pooled"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_cache_info(directory: Path) -> CacheInfo:
    """Read `latents.json`. Raises DataError if it is missing or not one of this format."""
    path = directory / INFO_FILE
    try:
        document = read_json_file(path)
        if document.pop("format") == FORMAT:
            info = CacheInfo(**document)
            if info.shards in get_args(ShardKind):
                return info
    except FileNotFoundError as error:
        raise DataError(
            f"{directory} has no {INFO_FILE}, so it is no latent cache; make one with "
            "`diffusion-apt data encode`"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); encode the folder again") from error
    raise DataError(f"{path} is of another format; encode the folder again with this version")


def write_cache_info(directory: Path, info: CacheInfo) -> None:
    """Write `latents.json` at once. Raises DataError if the disk refuses."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(info)}, indent=2) + "\n"
    path = directory / INFO_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def write_texts(path: Path, texts: Mapping[str, EncodedText]) -> None:
    """Write a shard of embeddings of one row each, whole or not at all.

    Raises DataError if the disk refuses.
    """
    tensors = {
        f"{number}.{kind}": value[0]
        for number, text in enumerate(texts.values())
        for kind, value in vars(text).items()
        if value is not None
    }
    write_shard(path, tensors, {"prompts": json.dumps(list(texts))})


def _usable(shard: str, entries: list[Entry], rule: CaptionRule | None) -> list[Entry]:
    """The clips of a shard whose captions can be used, some of them cut."""
    if rule is None:
        return entries
    names = [f"{shard}, clip {entry.key}" for entry in entries]
    captions = rule.apply([entry.caption for entry in entries], names)
    kept = []
    for name, entry, caption in zip(names, entries, captions, strict=True):
        if isinstance(caption, Refused):
            _LOG.warning("skipped %s: %s (%s)", name, caption.kind, caption.reason)
        else:
            kept.append(entry._replace(caption=caption))
    return kept


def _prompts(path: Path) -> list[str]:
    return read_metadata(path, "prompts", lambda prompts: [str(prompt) for prompt in prompts])

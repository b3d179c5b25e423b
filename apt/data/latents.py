"""A folder of encoded clips: latents and text embeddings in shards.

    latents.json                 what was encoded, by which codec and text encoder: `CacheInfo`
    latents-00000.safetensors    latents (C, T', H', W') of clips, with captions in its metadata
    latents-00000.tar            instead of these, a WebDataset shard with two files per clip: a
                                 .safetensors with "latents" and other conditions, and a .json
    texts-00000.safetensors      embeddings of prompts, with the prompts in its metadata

Shards are written atomically, so encoding can continue after any interruption.
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
        codec, text_encoder: {"architecture", "config"} of the parts that encoded. text_encoder is
            None if the model's encoder has weights of its own, and encodes during training.
        channels, temporal_compression, spatial_compression: of the codec.
        frames, height, width, fps: the requested clips; height times width is the pixel budget of
            aspect-ratio buckets.
        dtype: of the stored latents.
        source: hash of the clips to encode.
        num_clips: number of these clips. A shard has `CLIPS_PER_SHARD` of them, less broken ones.
        num_prompts: number of distinct captions and extra prompts with embeddings in a complete
            cache.
        shards: file format of the latents; missing in caches of earlier versions.
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
    # Not part of fingerprints, so that those of earlier versions stay valid. File names are part of
    # them, and show the format.
    shards: ShardKind = field(default="safetensors", repr=False)

    def clip_shards(self) -> list[str]:
        """Return the names of all files of latents."""
        count = -(-self.num_clips // CLIPS_PER_SHARD)
        return [f"latents-{number:05d}.{self.shards}" for number in range(count)]


class LatentFolder(Shuffled):
    """The clips of a latent cache, as `EncodedSample`s.

    With one clip per video, the order is the same as in training from the videos.

    Args:
        directory: written by `diffusion-apt data encode`.
        images: "mix" has all clips, "only" those of one frame, "none" only longer ones.
        captions: how to treat captions that the text encoder rejects, if it encodes during
            training; None checks no captions.

    Attributes:
        info: the cache's description.
        texts: the embeddings of its prompts.

    Raises:
        DataError: if there is no cache, it is incomplete, a file is damaged, or it has no clip of
            that kind.
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
                f"{directory}: the cache is incomplete, with {len(names) - len(missing)} of "
                f"{len(names)} files of latents and {len(self.texts)} of {self.info.num_prompts} "
                "prompts; run the same `data encode` again to continue it"
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
                f"{directory}: the cache contains no {kind}; encode a folder that has some"
            )
        self._order = BucketOrder(dict(sorted(members.items())), len(self._clips))

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._clips)

    @property
    def fingerprint(self) -> str:
        """A hash of the cache's description and all captions."""
        digest = hashlib.sha256(repr(self.info).encode())
        digest.update(repr(self._clips).encode())
        return digest.hexdigest()

    def file_name(self, index: int) -> str:
        """Return the source file of a sample; in caches of earlier versions, its shard and key."""
        return self._files[index % len(self._files)]

    def __getitem__(self, index: int) -> EncodedSample:
        """Return sample `index`: clip `index % len(self)`.

        Raises DataError if the file is missing or damaged.
        """
        number = index % len(self._clips)
        name, key, caption = self._clips[number]
        latents, extra = read_latents(self.directory / name, key, self._places[number])
        return EncodedSample(latents, caption, extra)


class TextFolder(Mapping[str, EncodedText]):
    """The embeddings of a cache by prompt, one row each, read on access.

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
    """Read `latents.json`. Raises DataError if it is missing, damaged or of another format."""
    path = directory / INFO_FILE
    try:
        document = read_json_file(path)
        if document.pop("format") == FORMAT:
            info = CacheInfo(**document)
            if info.shards in get_args(ShardKind):
                return info
    except FileNotFoundError as error:
        raise DataError(
            f"{directory} has no {INFO_FILE}, so it is not a latent cache; make one with "
            "`diffusion-apt data encode`"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); encode the folder again") from error
    raise DataError(f"{path} has another format; encode the folder again with this version")


def write_cache_info(directory: Path, info: CacheInfo) -> None:
    """Write `latents.json` atomically. Raises DataError if it cannot be written."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(info)}, indent=2) + "\n"
    path = directory / INFO_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; choose another folder, or free some "
            "space"
        ) from error


def write_texts(path: Path, texts: Mapping[str, EncodedText]) -> None:
    """Write a shard of embeddings, one row each, atomically.

    Raises DataError if it cannot be written.
    """
    tensors = {
        f"{number}.{kind}": value[0]
        for number, text in enumerate(texts.values())
        for kind, value in vars(text).items()
        if value is not None
    }
    write_shard(path, tensors, {"prompts": json.dumps(list(texts))})


def _usable(shard: str, entries: list[Entry], rule: CaptionRule | None) -> list[Entry]:
    """Return the clips of a shard that have usable captions, some of them cut."""
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

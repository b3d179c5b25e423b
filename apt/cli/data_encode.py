"""`diffusion-apt data encode`: a folder of videos as latents and text embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar
from apt.errors import InputError

if TYPE_CHECKING:
    from apt.distributed.parallel import Parallel


@dataclass(frozen=True)
class DataEncode:
    """Encode captioned videos and images once, so that training loads neither VAE nor text encoder.

    OUT gets shards of latents and of text embeddings. An interrupted call goes on where it stopped
    when it is repeated, and `torchrun -m apt data encode ...` shares the shards among GPUs. Train
    with --data.source latents --data.path OUT.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Captioned videos and images, as for `data check`."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Where to write; made if need be."""
    model: str
    """Whose codec and text encoder: a built-in or registered name, a folder, or a Hub id. A codec
    alone will do for pre-training."""
    source: Literal["folder", "webdataset"] = "folder"
    """What DIR holds: files, or WebDataset shards, as for train's --data.source."""
    shards: Literal["safetensors", "tar"] = "safetensors"
    """How latents are stored: tensors of 64 clips in a file, or WebDataset shards of them, a
    .safetensors and a .json for each clip."""
    frames: int | None = None
    """Frames of a clip, 4k + 1. None, also below, is what the model was trained on."""
    height: int | None = None
    """Height of a clip; times width it is the pixel budget of the aspect-ratio buckets."""
    width: int | None = None
    """Width of a clip."""
    fps: float | None = None
    """Frame rate of the clips; 0 keeps each video's own."""
    size_multiple: int | None = None
    """Heights and widths are multiples of this; None is two latents (a patch of the usual size)."""
    native_ratio: bool = True
    """Aspect-ratio buckets near each file's own shape; otherwise all are cropped to one size."""
    images: Literal["mix", "only", "none"] = "mix"
    """Images as one-frame videos beside the videos, only they, or none."""
    clips_per_item: int = 1
    """Clips of each video, from different starts."""
    prompts: tuple[str, ...] = ()
    """Prompts to embed beside the captions and the model's own negative prompt."""
    long_captions: Literal["skip", "cut", "error"] = "skip"
    """Files whose caption has more tokens than the text encoder takes: leave them out and report
    them, cut the caption to what fits, or stop."""
    strict: bool = False
    """Stop at the first file that cannot be used, instead of skipping and reporting it."""
    seed: int = 0
    """Of the clips' starts."""
    batch_size: int = 1
    """Clips, or prompts, that are encoded at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the stored latents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Embed the prompts, encode the clips, and say what is in the cache."""
    options = parse(DataEncode, args, prog=prog)
    for name in ("batch_size", "clips_per_item"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, got {getattr(options, name)}")

    from apt.distributed.parallel import Parallel

    with Parallel.from_environment(options.device) as parallel:
        encode(options, parallel)


def encode(options: DataEncode, parallel: Parallel) -> None:
    """The same, with a share of the shards if there are several ranks."""
    import torch

    from apt.checkpoints.info import ModelInfo
    from apt.checkpoints.load import describe, load_codec, load_prompt_check, load_text_encoder
    from apt.data.buckets import check_size
    from apt.data.builtin_sources import Folder, Shards
    from apt.data.captions import CaptionRule
    from apt.data.source import ClipRequest
    from apt.encode import encode_clips, encode_texts, open_cache, plan_cache, plan_texts

    info = describe(options.model)
    rule = None
    prompts = list(options.prompts)
    model = info if isinstance(info, ModelInfo) else None  # or a codec alone, which has no text
    if model is not None:
        # Before anything takes time; every rank leaves out the same captions.
        check = load_prompt_check(options.model)
        prompts = [model.sampling.negative_prompt, *prompts]
        check(prompts)
        rule = CaptionRule(check, options.long_captions)
    codec = load_codec(options.model).to(parallel.device)
    sample = info.sample
    frames, height, width = sample.sized(options.frames, options.height, options.width)
    if not (frames and height and width):
        raise InputError(
            f"{options.model} does not say which clips it was made for; give --frames, --height, "
            "--width and --fps"
        )
    multiple = options.size_multiple or 2 * codec.spatial_compression
    step = math.lcm(4, codec.temporal_compression)
    check_size(frames, height, width, multiple=multiple, frame_step=step)
    clip = ClipRequest(
        frames=frames,
        height=height,
        width=width,
        fps=sample.fps if options.fps is None else options.fps,
        size_multiple=multiple,
        native_ratio=options.native_ratio,
        images=options.images,
        seed=options.seed,
        strict=options.strict,
        captions=rule,
    )
    kind = Shards if options.source == "webdataset" else Folder
    source = kind(path=str(options.directory))
    videos = parallel.from_main(lambda: source.open(clip))
    text = model.text_encoder if model and model.text_encoder.weights is None else None
    plan, prompts = plan_cache(
        videos,
        info.codec,
        codec,
        text,
        size=clip.size,
        fps=clip.fps,
        clips_per_item=options.clips_per_item,
        prompts=prompts,
        dtype=getattr(torch, options.dtype),
        shards=options.shards,
    )
    # Rank 0 first: it would take what others have written already for another folder's files.
    parallel.on_main(lambda: open_cache(options.out, plan))
    if text is not None:
        shards = parallel.from_main(lambda: list(plan_texts(options.out, prompts).items()))
        mine = dict(shards[parallel.rank :: parallel.world_size])
        if mine:
            encoder = load_text_encoder(options.model).to(parallel.device)
            with progress_bar("embedding prompts") as update:
                encode_texts(mine, encoder, batch_size=options.batch_size, progress=update)
            del encoder  # it may be larger than the VAE and all that the VAE needs
    with progress_bar("encoding clips") as update:
        encode_clips(
            options.out,
            plan,
            videos,
            codec,
            batch_size=options.batch_size,
            progress=update,
            rank=parallel.rank,
            world_size=parallel.world_size,
        )
    if not parallel.is_main:
        return
    with printing():
        print(videos.report.text())
        print(f"{plan.num_clips} clips and {plan.num_prompts} prompts: {options.out}")

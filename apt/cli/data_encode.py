"""`diffusion-apt data encode`: encode a folder of videos as latents and text embeddings."""

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

    Writes shards of latents and of text embeddings to OUT. To continue after an interruption,
    repeat the command. `torchrun -m apt data encode ...` divides the work among GPUs. To train on
    the result, use --data.source latents --data.path OUT.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Captioned videos and images, as for `data check`."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, created if missing."""
    model: str
    """Model whose codec and text encoder to use: a built-in or registered name, a folder, or a Hub
    id. For pre-training, a codec alone is enough."""
    source: Literal["folder", "webdataset"] = "folder"
    """What DIR holds, as for train's --data.source: files, or WebDataset shards."""
    shards: Literal["safetensors", "tar"] = "safetensors"
    """File format of the latents: 64 clips per safetensors file, or WebDataset shards of them with
    a .safetensors and a .json per clip."""
    frames: int | None = None
    """Frames per clip, 4k + 1. None is the number that the model was trained on."""
    height: int | None = None
    """Height of a clip; times the width it is the pixel budget of the aspect-ratio buckets. None is
    the height that the model was trained on."""
    width: int | None = None
    """Width of a clip. None is the width that the model was trained on."""
    fps: float | None = None
    """Frame rate of the clips; 0 keeps each video's own. None is the rate that the model was
    trained on."""
    size_multiple: int | None = None
    """Heights and widths are multiples of this; None is two latents (a patch of the usual size)."""
    native_ratio: bool = True
    """Sort clips into aspect-ratio buckets near each file's shape; otherwise crop all to one
    size."""
    images: Literal["mix", "only", "none"] = "mix"
    """Encode images as one-frame videos beside the videos (mix), nothing else (only), or no images
    (none)."""
    clips_per_item: int = 1
    """Clips per video, each with its own start."""
    prompts: tuple[str, ...] = ()
    """Prompts to embed besides the captions and the model's own negative prompt."""
    long_captions: Literal["skip", "cut", "error"] = "skip"
    """If a caption has more tokens than the text encoder accepts: skip and report the file, cut the
    caption, or stop with an error."""
    strict: bool = False
    """Stop at the first file that cannot be used, instead of skipping and reporting it."""
    seed: int = 0
    """Random seed of the clips' starts."""
    batch_size: int = 1
    """Clips or prompts per encoder call."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the stored latents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that encodes; auto takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Embed the prompts, encode the clips, and print what is in the cache."""
    options = parse(DataEncode, args, prog=prog)
    for name in ("batch_size", "clips_per_item"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, got {getattr(options, name)}")

    from apt.distributed.parallel import Parallel

    with Parallel.from_environment(options.device) as parallel:
        encode(options, parallel)


def encode(options: DataEncode, parallel: Parallel) -> None:
    """Encode this rank's share of the shards, or all of them on a single process."""
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
    model = info if isinstance(info, ModelInfo) else None  # a codec alone has no text encoder
    if model is not None:
        # Before any slow work. Every rank leaves out the same captions.
        check = load_prompt_check(options.model)
        prompts = [model.sampling.negative_prompt, *prompts]
        check(prompts)
        rule = CaptionRule(check, options.long_captions)
    codec = load_codec(options.model).to(parallel.device)
    sample = info.sample
    frames, height, width = sample.sized(options.frames, options.height, options.width)
    if not (frames and height and width):
        raise InputError(
            f"{options.model} does not say which size of clips it was trained on; pass --frames, "
            "--height, --width and --fps"
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
    # Rank 0 first: it would mistake files that others have written for those of another folder.
    parallel.on_main(lambda: open_cache(options.out, plan))
    if text is not None:
        shards = parallel.from_main(lambda: list(plan_texts(options.out, prompts).items()))
        mine = dict(shards[parallel.rank :: parallel.world_size])
        if mine:
            encoder = load_text_encoder(options.model).to(parallel.device)
            with progress_bar("embedding prompts") as update:
                encode_texts(mine, encoder, batch_size=options.batch_size, progress=update)
            del encoder  # it may need more memory than the VAE and its activations
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
    with printing():
        print(videos.report.text())
        print(f"{plan.num_clips} clips and {plan.num_prompts} prompts: {options.out}")

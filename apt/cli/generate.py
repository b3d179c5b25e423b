"""`diffusion-apt generate`: prompts to files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from apt.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate videos or images from prompts; each prompt with each seed.

    The same model, prompt, seed and settings give the same output. Several outputs are numbered
    after `--out`: out-prompt0-seed3.mp4.
    """

    prompt: tuple[str, ...] = ()
    """What to show, in quotes; several of them: --prompt "a red seven moving left" "a blue one"."""
    prompt_file: Path | None = None
    """UTF-8 text with one prompt per line, added to those of --prompt; empty lines are skipped."""
    model: str = "digits"
    """A built-in name, a folder, or a Hub id (owner/name or owner/name@revision)."""
    out: Path = Path("generated.mp4")
    """Where to write; the ending is the format: .mp4, .gif, .webp, or .png (frames in a row)."""
    contact_sheet: Path | None = None
    """Also write a .png table of everything: a row per prompt, a column per seed."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seeds"])] = (0,)
    """One seed, or several."""
    num_steps: int | None = None
    """Network evaluations; None is the model's own number (1 after APT)."""
    sampler: Literal["auto", "consistency", "euler"] = "auto"
    """Between steps: fresh noise, Euler, or what suits the model. In one step they are the same."""
    timesteps: tuple[float, ...] | None = None
    """The grid itself, falling from 1 to 0, in place of --num-steps: --timesteps 1 0.6 0."""
    cfg_scale: float | None = None
    """Classifier-free guidance; 1 is off, None is the model's own."""
    negative_prompt: str | None = None
    """What guidance leads away from; None is the model's own."""
    frames: int | None = None
    """Number of frames; 1 makes an image. None, also below, is what the model was trained on."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    fps: float | None = None
    """Frames per second of the file."""
    scale: int | None = None
    """Whole factor by which small frames are enlarged in the file; None makes them easy to see."""
    batch_size: int = 1
    """Videos per network call; above 1 results are equal to rounding only."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights."""
    offload: bool = False
    """Keep only the part that works on the device: slower, for models that do not fit whole."""
    lora: str | None = None
    """A LoRA to merge first: a .safetensors file, a folder or a Hub id."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Generate, write, and say what was written."""
    options = tyro.cli(Generate, args=args, prog=prog, config=(tyro.conf.DisallowNone,))
    prompts = [*options.prompt, *read_prompts(options.prompt_file)]
    if not prompts:
        raise InputError('there is no prompt: pass --prompt "a red seven moving left", or a file')

    import torch

    from apt.media import SUFFIXES, write_contact_sheet, write_media
    from apt.pipeline import OneStepPipeline

    # Nothing of this may come up only after the time that generating takes.
    check_suffix(options.out, SUFFIXES)
    if options.contact_sheet is not None:
        check_suffix(options.contact_sheet, (".png",))
    if len(set(options.seed)) < len(options.seed):
        raise InputError(f"seeds must differ, or files would be overwritten; got {options.seed}")

    pipeline = OneStepPipeline.from_pretrained(
        options.model,
        device=None if options.device is None else find_device(options.device),
        dtype=getattr(torch, options.dtype),
        offload=options.offload,
    )
    if options.lora is not None:
        pipeline.load_lora(options.lora, scale=options.lora_scale)
    jobs = list(itertools.product(prompts, options.seed))
    videos = pipeline(
        [prompt for prompt, _ in jobs],
        seed=[seed for _, seed in jobs],
        num_steps=options.num_steps,
        sampler=options.sampler,
        timesteps=options.timesteps,
        cfg_scale=options.cfg_scale,
        negative_prompt=options.negative_prompt,
        frames=options.frames,
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
    )
    fps = pipeline.info.sample.fps if options.fps is None else options.fps
    paths = output_paths(options.out, num_prompts=len(prompts), seeds=options.seed)
    for (prompt, seed), path, video in zip(jobs, paths, videos, strict=True):
        write_media(path, video, fps=fps, scale=options.scale)
        print(f"{path}  {prompt!r}, seed {seed}")
    if options.contact_sheet is not None:
        num_seeds = len(options.seed)
        cells = [list(videos[i : i + num_seeds]) for i in range(0, len(jobs), num_seeds)]
        columns = [f"seed {seed}" for seed in options.seed]
        print(write_contact_sheet(options.contact_sheet, cells, rows=prompts, columns=columns))


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompt file that are not empty. Raises InputError if it cannot be read."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read prompts from {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{str(path)!r} has no prompt in it; write one per line")
    return prompts


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise InputError unless the file name has one of these endings."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {str(path)!r}: its ending must be {' or '.join(suffixes)}")


def output_paths(out: Path, *, num_prompts: int, seeds: Sequence[int]) -> list[Path]:
    """A path for each prompt and seed: `out` itself for one, numbered after it for more."""
    return [
        out.with_stem(
            out.stem
            + (f"-prompt{prompt}" if num_prompts > 1 else "")
            + (f"-seed{seed}" if len(seeds) > 1 else "")
        )
        for prompt in range(num_prompts)
        for seed in seeds
    ]


def find_device(name: str) -> torch.device:
    """The device of that name. Raises InputError if this machine has none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; choose cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no device {name!r}: PyTorch sees {torch.cuda.device_count()} GPUs here"
        )
    return device

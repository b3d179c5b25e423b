"""`diffusion-apt generate`: generate files from prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from apt.checkpoints.runs import model_folder
from apt.checkpoints.source import weights_digest
from apt.cli.app import parse
from apt.device import explained_memory
from apt.distributed.launch import is_one_of_many, launch_rank, launch_world_size
from apt.errors import InputError
from apt.generate_options import GenerateOptions
from apt.outputs import RECORD_SUFFIX, Output, OutputRecord, check_place
from apt.prompts import read_prompts

if TYPE_CHECKING:
    import torch

    from apt.distributed.parallel import Parallel
    from apt.kernels.attention_choice import AttentionUse
    from apt.kernels.backends import KernelUse
    from apt.media import Tags


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate a video or image for each prompt and seed.

    The same model, prompt, seed and settings give the same output. Several outputs are named after
    `--out`: out-prompt0-seed3.mp4. Each file is written atomically as soon as it is finished, and
    recorded in out.mp4.jsonl, from which --resume continues.

    With `torchrun -m apt generate ...`, all GPUs work on one video at a time, each on a share of
    the transformer's tokens.
    """

    prompt: tuple[str, ...] = ()
    """One or more prompts, in quotes: --prompt "a red seven moving left" "a blue one"."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(aliases=["--prompts"])] = None
    """Text file with one prompt per line, added to those of --prompt; empty lines are skipped."""
    model: str = "digits"
    """A built-in name, the folder of a training run or a model, a Hub id (owner/name or
    owner/name@revision), or a safetensors file of a public transformer, whose text encoder and VAE
    are those of the published model."""
    out: Path = Path("generated.mp4")
    """File to write. The ending is the format: .mp4, .mkv (lossless), .gif, .webp, or .png (frames
    in a row)."""
    contact_sheet: Path | None = None
    """Also write a .png table of all outputs, with a row per prompt and a column per seed. This
    keeps all videos in memory."""
    resume: bool = False
    """Skip the files that an interrupted call with the same settings has finished."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seeds"])] = (0,)
    """One or more seeds."""
    options: Annotated[GenerateOptions, tyro.conf.arg(name="")] = GenerateOptions()
    fps: float | None = None
    """Frame rate of the file; None is the model's own."""
    scale: int | None = None
    """Integer factor by which frames are enlarged in the file; None enlarges small frames so that
    they are easy to see."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    offload: bool = False
    """Keep on the device only the part that is computing: slower, but needs less of its memory."""
    compile_blocks: bool = False
    """Compile the transformer's blocks with torch.compile. This takes a minute, so it pays only for
    many videos."""
    lora: str | None = None
    """A LoRA to merge first: a .safetensors file, a folder or a Hub id."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    tags: bool = True
    """Record in each file how it was made: prompt, seed, model and settings, but no path of this
    machine. `diffusion-apt tags FILE` prints it."""
    verbose: bool = False
    """Also print the device, versions, and the kernels used for attention and the fused ops."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Generate and write the files, and print their paths."""
    asked = parse(Generate, args, prog=prog)
    prompts = list(asked.prompt)
    if asked.prompt_file is not None:
        prompts += read_prompts(asked.prompt_file)
    if not prompts:
        raise InputError(
            'there is no prompt: pass --prompt "a red seven moving left", or --prompt-file FILE'
        )
    # Check everything before the slow work of loading and generating.
    outputs = plan_outputs(asked, prompts)
    record = None
    if len(outputs) > 1:
        place = asked.out.with_name(asked.out.name + RECORD_SUFFIX)
        record = OutputRecord(place, _settings(asked), resume=asked.resume)
    left = [output for output in outputs if record is None or not record.has(output)]
    if len(left) < len(outputs) and launch_rank() == 0:
        print(f"{len(outputs) - len(left)} of {len(outputs)} files exist already")
    if not left:
        return
    if not is_one_of_many():
        return write_outputs(asked, prompts, left, record)

    from apt.distributed.mesh import ParallelConfig
    from apt.distributed.parallel import Parallel

    shared = ParallelConfig(sequence=launch_world_size())
    with Parallel.from_environment(asked.device or "auto", config=shared) as parallel:
        write_outputs(asked, prompts, left, record, parallel)


def write_outputs(
    asked: Generate,
    prompts: Sequence[str],
    left: Sequence[Output],
    record: OutputRecord | None,
    parallel: Parallel | None = None,
) -> None:
    """Generate the remaining videos. Several ranks generate each video together; rank 0 writes."""
    import torch

    from apt.device import find_device
    from apt.media import check_settings, write_contact_sheet, write_media
    from apt.pipeline import OneStepPipeline

    if parallel is not None:
        device: torch.device | None = parallel.device
    else:
        device = None if asked.device is None else find_device(asked.device)
    pipeline = OneStepPipeline.from_pretrained(
        asked.model,
        device=device,
        dtype=getattr(torch, asked.dtype),
        offload=asked.offload,
    )
    sample = pipeline.info.sample
    fps = sample.fps if asked.fps is None else asked.fps
    options = asked.options
    size = sample.sized(options.frames, options.height, options.width)
    pipeline.latent_shape(*size)
    if asked.fps is None and not fps:
        if size[0] > 1:
            raise InputError(
                f"{asked.model} was trained on clips at the frame rate of each video; pass the "
                "frame rate of the output with --fps"
            )
        fps = 1.0  # an image has no frame rate
    check_settings(asked.out, size, fps=fps, scale=asked.scale)
    if asked.lora is not None:
        pipeline.load_lora(asked.lora, scale=asked.lora_scale)
    if asked.compile_blocks:
        pipeline.compile_blocks()
    if parallel is not None:
        pipeline.split_tokens(parallel.sequence)
    videos = pipeline.stream(
        [output.prompt for output in left],
        seed=[output.seed for output in left],
        options=options,
    )

    def made_of(prompt: str | Sequence[str], seed: int | Sequence[int]) -> Tags | None:
        if not asked.tags:
            return None
        return pipeline.tags(prompt, seed=seed, fps=fps, options=options)

    writes = parallel is None or parallel.is_main
    kept = []
    done = 0
    with _watching(asked.verbose) as (attention, kernels):
        try:
            for output, video in zip(left, videos, strict=True):
                if not writes:
                    continue
                with explained_memory(f"writing {str(output.path)!r}", "choose a smaller scale"):
                    tags = made_of(output.prompt, output.seed)
                    write_media(output.path, video, fps=fps, scale=asked.scale, tags=tags)
                if record is not None:
                    record.add(output)
                done += 1
                print(f"{output.path}  {output.prompt!r}, seed {output.seed}", flush=True)
                if asked.contact_sheet is not None:
                    kept.append(video)
        except KeyboardInterrupt:
            if record is not None and writes:
                said = f"{done} of {len(left)} files are finished; --resume generates the rest"
                print(said, file=sys.stderr)
            raise
    if not writes:
        return
    if asked.verbose:
        print("\n".join(what_ran(pipeline.device, attention, kernels)))
    if asked.contact_sheet is not None:
        num_seeds = len(asked.seed)
        cells = [kept[i : i + num_seeds] for i in range(0, len(kept), num_seeds)]
        columns = [f"seed {seed}" for seed in asked.seed]
        with explained_memory("drawing the contact sheet", "leave it out, or ask for fewer"):
            sheet, tags = asked.contact_sheet, made_of(prompts, asked.seed)
            print(write_contact_sheet(sheet, cells, rows=prompts, columns=columns, tags=tags))


def plan_outputs(asked: Generate, prompts: Sequence[str]) -> list[Output]:
    """Return the files to write, one for each prompt and seed.

    Raises InputError for an invalid option, or a file that cannot be written.
    """
    from apt.media import SUFFIXES

    check_suffix(asked.out, SUFFIXES)
    if asked.contact_sheet is not None:
        check_suffix(asked.contact_sheet, (".png",))
        if asked.resume:
            raise InputError(
                "a contact sheet shows every video, and --resume skips finished ones; leave out "
                "one of the two options"
            )
        check_place(asked.contact_sheet)
    if not asked.seed:
        raise InputError("--seed needs at least one number")
    if len(set(asked.seed)) < len(asked.seed):
        raise InputError(f"seeds must differ, or files would be overwritten; got {asked.seed}")
    paths = output_paths(asked.out, num_prompts=len(prompts), seeds=asked.seed)
    if asked.contact_sheet in paths:
        raise InputError(
            f"{str(asked.contact_sheet)!r} would be both a video and the contact sheet; choose "
            "different names"
        )
    check_place(paths[0])
    for path in paths:
        if path.is_dir():
            raise InputError(f"cannot write {str(path)!r}: it is a folder; move it away")
    jobs = itertools.product(prompts, asked.seed)
    return [
        Output(path=path, prompt=prompt, seed=seed)
        for path, (prompt, seed) in zip(paths, jobs, strict=True)
    ]


# The options that determine the content of a file, besides its prompt and seed.
_SETTINGS = ("model", "fps", "scale", "dtype", "lora", "lora_scale", "tags")


def _settings(asked: Generate) -> dict[str, object]:
    """Return the settings that must be unchanged for --resume."""
    values = {name: getattr(asked, name) for name in _SETTINGS}
    return {
        **values,
        **dataclasses.asdict(asked.options),
        "model_content": _content(asked.model),
        "lora_content": None if asked.lora is None else _content(asked.lora),
    }


def _content(name: str) -> list[str] | None:
    """Return digests of the weights and configs of a local model or LoRA; None for other names."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = model_folder(path)
    if not path.exists():
        return None
    files = [path / file for file in ("apt.json", "model_index.json", "adapter_config.json")]
    said = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return [weights_digest(path), *said]


@contextmanager
def _watching(wanted: bool) -> Iterator[tuple[Counter[AttentionUse], Counter[KernelUse]]]:
    """Count the calls of attention and the fused ops in the block, if wanted.

    This costs time: torch is asked at every call which kernel it chooses.
    """
    if not wanted:
        yield Counter(), Counter()
        return
    from apt.kernels import watch_attention, watch_kernels

    with watch_attention() as attention, watch_kernels() as kernels:
        yield attention, kernels


def what_ran(
    device: torch.device, attention: Counter[AttentionUse], kernels: Counter[KernelUse]
) -> list[str]:
    """Return lines to print: the device and its software, each kind of call, and any warning."""
    from apt.bench.machine import describe_machine
    from apt.kernels.attention_choice import attention_warning

    lines = [describe_machine(device).describe()]
    for use, number in attention.items():
        lines.append(
            f"attention: {use.backend}: {use.kernel}, {number} calls of {use.shape} {use.dtype}"
        )
    for op, number in kernels.items():
        lines.append(f"{op.op}: {op.backend}: {op.reason}, {number} calls")
    warning = attention_warning(device, [u.kernel for u in attention if u.backend == "native"])
    return lines + ([f"WARNING: {warning}"] if warning else [])


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise InputError unless the file name has one of these endings."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {str(path)!r}: its ending must be {' or '.join(suffixes)}")


def output_paths(out: Path, *, num_prompts: int, seeds: Sequence[int]) -> list[Path]:
    """Return a path for each prompt and seed: `out` for one, or `out` with numbers for several."""
    return [
        out.with_stem(
            out.stem
            + (f"-prompt{prompt}" if num_prompts > 1 else "")
            + (f"-seed{seed}" if len(seeds) > 1 else "")
        )
        for prompt in range(num_prompts)
        for seed in seeds
    ]

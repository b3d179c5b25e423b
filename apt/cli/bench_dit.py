"""`diffusion-apt bench dit`: time one forward pass of a model, or estimate it for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apt.cli.app import parse
from apt.errors import InputError

if TYPE_CHECKING:
    from apt.bench.dit import Workload


@dataclass(frozen=True, kw_only=True)
class BenchDit:
    """Time one forward pass with random weights: the step of a one-step model.

    On a GPU it is timed as a CUDA graph, with and without our kernels, and compiled. The outputs
    must agree before anything is timed. The text encoder and the VAE are not included.
    """

    model: str = "apt_8b"
    """A registered model (`diffusion-apt list models`), or the folder of a model or training run,
    which is timed at the size of its clips."""
    frames: int | None = None
    """Number of frames; 1 is an image. None is the published model's, or else 49."""
    height: int | None = None
    """Height in pixels. None is the published model's, or else 720."""
    width: int | None = None
    """Width in pixels. None is the published model's, or else 1280."""
    batch: int | None = None
    """Batch size. None is 1."""
    text_tokens: int | None = None
    """Number of text tokens. None is that of the model's text encoder, or else 256."""
    compression: tuple[int, int, int] | None = None
    """Pixels per latent along time, height and width. None is that of the model's VAE, or else
    4 8 8."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of weights and activations."""
    floor: bool = False
    """Measure nothing; print the roofline estimate for --gpu, which this machine need not have."""
    gpu: str = ""
    """With --floor: a100, h100, h100-pcie, h200, b200 or rtx4090."""
    rounds: int = 20
    """Timing samples per variant; the variants take turns."""
    max_seconds: float = 120.0
    """Time limit for all samples together."""
    compile: bool = True
    """Also measure torch.compile of each block."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Print the estimate, or measure and print one table."""
    options = parse(BenchDit, args, prog=prog)
    if bool(options.gpu) != options.floor:
        raise InputError("--floor and --gpu must be used together, as in --floor --gpu h100")

    from apt.bench.dit import usual_workload
    from apt.bench.floor import floor_report
    from apt.bench.timing import check_rounds

    names = ("frames", "height", "width", "batch", "text_tokens", "compression", "dtype")
    given = {name: getattr(options, name) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    model, own = registered_model(options.model)
    workload = usual_workload(model, **{**own, **changes})
    check_rounds(options.rounds)
    if options.floor:
        print(floor_report(workload, options.gpu))
    else:
        measure(workload, options)


def registered_model(name: str) -> tuple[str, dict[str, Any]]:
    """Return the registered model of a name or folder, and the settings that the folder states."""
    from apt.checkpoints.load import find_model
    from apt.checkpoints.source import is_here
    from apt.models import MODELS
    from apt.models.create import describe_codec

    if name in MODELS.names():
        return name, {}
    if "/" not in name and not is_here(name):
        return name, {}
    _, info, checkpoint = find_model(name)
    usual = vars(MODELS.get(checkpoint.architecture)())
    options = {k: v for k, v in vars(checkpoint.config).items() if v != usual[k]}
    clip = info.sample
    size = (clip.frames, clip.height, clip.width)
    codec = describe_codec(info.codec.architecture, **info.codec.config)
    frames, height, width = codec.latent_shape(*size)
    compression = (
        (clip.frames - 1) // max(frames - 1, 1) or 1,
        clip.height // height,
        clip.width // width,
    )
    own = {**vars(clip), "compression": compression, "options": options}
    return checkpoint.architecture, own


def measure(workload: Workload, options: BenchDit) -> None:
    """Measure on this machine. Exits with 1 if a variant's result was wrong."""
    from apt.bench.ceilings import measure_ceilings
    from apt.bench.dit import default_variants, measure_dit
    from apt.bench.machine import describe_machine, describe_run, find_device
    from apt.bench.records import Record
    from apt.bench.tables import record_table
    from apt.bench.timing import clock_for

    device = find_device(None if options.device == "auto" else options.device)
    clock = clock_for(device)
    machine = describe_machine(device)
    print(machine.describe())
    ceilings = measure_ceilings(device, clock)
    print(f"measured {ceilings.describe()}", flush=True)  # the rest takes minutes
    variants = [v for v in default_variants(device) if options.compile or v.mode != "compile"]
    found = measure_dit(
        workload,
        variants,
        device=device,
        clock=clock,
        ceilings=ceilings,
        rounds=options.rounds,
        max_seconds=options.max_seconds,
    )
    record = Record(
        topic="dit",
        note="",
        provenance=describe_run(),
        machine=machine,
        ceilings=ceilings.as_dict(),
        measurements=tuple(found),
    )
    print(f"\n{record_table(record)}")
    if any(m.status == "wrong" for m in found):
        sys.exit("some results are wrong on this machine (see above); please report this")

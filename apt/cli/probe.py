"""`diffusion-apt probe`: what each layer knows of the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.errors import InputError
from apt.outputs import check_folder
from apt.prompts import read_prompts


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Fit a linear projection per layer to the model's one-step sample (APT Appendix G, Fig. 12).

    Writes what each layer's projection makes as layers.png, errors on other noise as errors.png,
    and all figures as probe.json.
    """

    model: str = "digits"
    """A built-in name, a folder, or a Hub id."""
    out: Path = Path("probe")
    """Folder to write; made if need be."""
    prompt: tuple[str, ...] = ()
    """Prompts to fit on and to show; without any, those that the model was previewed with."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(aliases=["--prompts"])] = None
    """More of them, one per line; of all the first are shown."""
    num_shown: int = 6
    """Prompts on the sheet."""
    num_samples: int = 512
    """Samples to fit on."""
    num_held_out: int = 128
    """Samples to measure on."""
    batch_size: int = 16
    """Samples per network call."""
    seed: int = 0
    """Of the noise."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Probe, write, and say where."""
    options = parse(Probe, args, prog=prog)
    given = list(options.prompt)
    if options.prompt_file is not None:
        given += read_prompts(options.prompt_file)
    if options.num_shown < 1:
        raise InputError(f"--num-shown must be at least 1, got {options.num_shown}")
    check_folder(options.out)

    from apt.inside import probe_layers
    from apt.inside.report import write_probe
    from apt.pipeline import OneStepPipeline

    pipeline = OneStepPipeline.from_pretrained(options.model, device=options.device)
    prompts = given or list(pipeline.info.sample_prompts())
    if not prompts:
        raise InputError(
            f"{options.model!r} does not say what it was previewed with; pass --prompt"
        )
    shown = prompts[: options.num_shown]
    result = probe_layers(
        pipeline,
        prompts,
        shown=shown,
        num_samples=options.num_samples,
        num_held_out=options.num_held_out,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_probe(options.out, result, shown, options.model)
    for layer in result.layers:
        print(f"layer {layer.layer}: error {layer.error:.4f} of the latents' variance")
    print(options.out)

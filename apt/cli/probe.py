"""`diffusion-apt probe`: measure how much each layer knows about the sample."""

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

    Writes the images that each layer's projection predicts to layers.png, the errors on held-out
    noise to errors.png, and all figures to probe.json.
    """

    model: str = "digits"
    """A built-in name, a folder, or a Hub id."""
    out: Path = Path("probe")
    """Folder to write, created if missing."""
    prompt: tuple[str, ...] = ()
    """Prompts to fit on and to show; by default those of the model's training previews."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(aliases=["--prompts"])] = None
    """Text file with more prompts, one per line. The first ones of all prompts are shown."""
    num_shown: int = 6
    """Number of prompts on the sheet."""
    num_samples: int = 512
    """Number of samples to fit on."""
    num_held_out: int = 128
    """Number of samples to measure errors on."""
    batch_size: int = 16
    """Samples per network call."""
    seed: int = 0
    """Random seed of the noise."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Probe the model, write the results, and print the folder."""
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
            f"{options.model!r} records no preview prompts; pass prompts with --prompt"
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

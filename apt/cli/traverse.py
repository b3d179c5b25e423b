"""`diffusion-apt traverse`: interpolate from one noise to another, models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.cli.app import parse
from apt.errors import InputError
from apt.outputs import check_folder


@dataclass(frozen=True, kw_only=True)
class Traverse:
    """Interpolate between noises along great circles, models side by side (APT Appendix I, Fig. 8).

    Writes the samples on the way to traverse.mp4, some of them to traverse.png, and the size of
    every step to traverse.json. If a model jumps between modes, its largest step is far above its
    mean step.
    """

    prompt: str
    """The prompt, in quotes."""
    model: tuple[str, ...] = ("digits", "digits-diffusion")
    """Built-in names, folders or Hub ids. Each model uses its own steps and guidance."""
    out: Path = Path("traverse")
    """Folder to write, created if missing."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noises to pass through, in this order."""
    num_between: int = 16
    """Steps from one noise to the next."""
    closed: bool = False
    """Return to the first noise at the end, for a video that loops."""
    num_steps: int | None = None
    """Sampling steps; None is each model's own number."""
    batch_size: int = 8
    """Samples per network call."""
    fps: float = 12.0
    """Samples shown per second."""
    scale: int | None = None
    """Integer factor by which frames are enlarged; None enlarges small frames so that they are easy
    to see."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Interpolate, write the results, and print the folder."""
    options = parse(Traverse, args, prog=prog)
    if not options.model or len(set(options.model)) < len(options.model):
        raise InputError(
            f"--model needs at least one model, and each only once; got {', '.join(options.model)}"
        )
    check_folder(options.out)

    from apt.generate_options import GenerateOptions
    from apt.inside import traverse
    from apt.inside.report import write_traversals
    from apt.media.files import check_settings
    from apt.pipeline import OneStepPipeline

    how = GenerateOptions(num_steps=options.num_steps, batch_size=options.batch_size)
    pipelines = {
        name: OneStepPipeline.from_pretrained(name, device=options.device) for name in options.model
    }
    sizes = {
        (pipeline.info.sample.height, pipeline.info.sample.width) for pipeline in pipelines.values()
    }
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise InputError(
            f"the models make videos of different sizes ({found}); choose models of one size"
        )
    # Check the settings before the slow work.
    height, width = next(iter(sizes))
    side_by_side = (1, height, width * len(pipelines))
    film = options.out / "traverse.mp4"
    check_settings(film, side_by_side, fps=options.fps, scale=options.scale)
    ways = {
        name: traverse(
            pipeline,
            options.prompt,
            seeds=options.seeds,
            num_between=options.num_between,
            closed=options.closed,
            options=how,
        )
        for name, pipeline in pipelines.items()
    }
    seeds = (*options.seeds, options.seeds[0]) if options.closed else options.seeds
    options.out.mkdir(parents=True, exist_ok=True)
    write_traversals(
        options.out, ways, prompt=options.prompt, seeds=seeds, fps=options.fps, scale=options.scale
    )
    for name, way in ways.items():
        print(f"{name}: mean step {way.mean_step:.4f}, largest step {way.peak:.2f} times the mean")
    print(options.out)

"""One step against twenty-five, with the models that come with the package: `make demo`.

Generates the same prompts from the same noise with the consistency model in one step, with the
adversarially post-trained model in one and two steps, and with the diffusion model that both were
made from. Writes videos, a contact sheet and a page that plays them side by side, and prints the
median time per video of each sampler. `--picture FILE.webp` also writes one animated picture.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apt.checkpoints.source import list_pretrained
from apt.errors import InputError
from apt.media import (
    SamplerColumn,
    moving_sheet,
    write_contact_sheet,
    write_html,
    write_media,
    write_mp4,
)
from apt.media.page import format_ratio, format_seconds
from apt.pipeline import OneStepPipeline

PROMPTS = (
    "a red seven moving left",
    "a green three moving up",
    "a blue zero moving right",
    "a yellow five moving down",
    "a magenta two moving left",
    "a white eight moving right",
)
CONSISTENCY = "digits-consistency" if "digits-consistency" in list_pretrained() else ""
SEED = 0
SCALE = 6
ROUNDS = 3
"""How often each prompt is generated; each median is over that many times the prompts."""


@dataclass
class Run:
    """A sampler, its videos and its timings."""

    pipeline: OneStepPipeline
    name: str
    detail: str
    num_steps: int
    folder: str
    videos: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def generate(runs: list[Run]) -> None:
    """Generate every prompt by itself, as for a user who waits for it.

    The samplers take turns, so that other load on the machine affects all of them.
    """
    for run in runs:
        run.pipeline(PROMPTS[0], seed=SEED, num_steps=run.num_steps)  # the first call is slower
    for number in range(ROUNDS):
        for prompt in PROMPTS:
            for run in runs:
                start = time.perf_counter()
                video = run.pipeline(prompt, seed=SEED, num_steps=run.num_steps)[0]
                run.seconds.append(time.perf_counter() - start)
                if number == 0:
                    run.videos.append(video)


def write_results(runs: list[Run], folder: Path, fps: float) -> None:
    """Write the videos, the contact sheet and the page."""
    columns = []
    for run in runs:
        files = []
        for prompt, video in zip(PROMPTS, run.videos, strict=True):
            file = folder / run.folder / f"{_slug(prompt)}.mp4"
            tags = run.pipeline.tags(prompt, seed=SEED, num_steps=run.num_steps, fps=fps)
            files.append(write_mp4(file, video, fps=fps, scale=SCALE, tags=tags))
        columns.append(
            SamplerColumn(name=run.name, detail=run.detail, seconds=run.median, files=files)
        )
    write_contact_sheet(
        folder / "contact_sheet.png",
        [[run.videos[row][::2] for run in runs] for row in range(len(PROMPTS))],
        rows=PROMPTS,
        columns=[f"{run.name}\n{run.detail}" for run in runs],
    )
    frames, height, width, _ = runs[0].videos[0].shape
    write_html(
        folder / "index.html",
        title=f"One step against {runs[-1].name.split()[0]}",
        prompts=PROMPTS,
        columns=columns,
        note=(
            f"{frames} frames of {height}×{width}, enlarged. Every row starts from the same noise. "
            f"Median time from prompt to pixels on this machine's CPU, {_threads()}."
        ),
    )


def write_picture(runs: list[Run], file: Path, fps: float) -> None:
    """Write one animated picture: prompts side by side, many steps above one step."""
    shown = [runs[-1], *(run for run in runs[:-1] if run.num_steps == 1)]
    frames = moving_sheet(
        [[run.videos[column] for column in range(len(PROMPTS))] for run in shown],
        rows=[f"{run.name}, {run.detail}" for run in shown],
        columns=PROMPTS,
        scale=4,
    )
    write_media(file, frames, fps=fps, scale=1)


def print_results(runs: list[Run], folder: Path, console: Console) -> None:
    """Print how long each sampler took, and where the files are."""
    slowest = max(run.median for run in runs)
    table = Table(title=f"Median time per video (CPU, {_threads()})")
    table.add_column("sampler")
    table.add_column("model")
    for heading in ("median", "ratio", "timings"):
        table.add_column(heading, justify="right")
    for run in runs:
        ratio = format_ratio(slowest / run.median)
        table.add_row(
            run.name, run.detail, format_seconds(run.median), ratio, str(len(run.seconds))
        )
    console.print(table)
    console.print("Written:", style="bold")
    for path in (folder / "index.html", folder / "contact_sheet.png"):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    for run in runs:
        console.print(f"  {folder / run.folder}/*.mp4", highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--model", default="digits", help="the one-step model")
    parser.add_argument("--diffusion", default="digits-diffusion", help="the many-step model")
    parser.add_argument(
        "--consistency", default=CONSISTENCY, help="the model before adversarial training"
    )
    parser.add_argument("--picture", type=Path, help="also write this .webp or .gif")
    args = parser.parse_args()
    try:
        one_step = OneStepPipeline.from_pretrained(args.model, device="cpu")
        diffusion = OneStepPipeline.from_pretrained(args.diffusion, device="cpu")
        sampling = diffusion.info.sampling
        guidance, steps = f"diffusion, guidance {sampling.cfg_scale:g}", sampling.num_steps
        runs = [
            Run(one_step, "1 step", "adversarial post-training", 1, "apt_1_step"),
            Run(one_step, "2 steps", "adversarial post-training", 2, "apt_2_steps"),
            Run(diffusion, f"{steps} steps", guidance, steps, f"diffusion_{steps}_steps"),
        ]
        if args.consistency:
            before = OneStepPipeline.from_pretrained(args.consistency, device="cpu")
            runs.insert(0, Run(before, "1 step", "consistency", 1, "consistency_1_step"))
        generate(runs)
        fps = one_step.info.sample.fps
        write_results(runs, args.out, fps)
        if args.picture:
            write_picture(runs, args.picture, fps)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_results(runs, args.out, Console())
    return 0


def _threads() -> str:
    num = torch.get_num_threads()
    return "1 thread" if num == 1 else f"{num} threads"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


if __name__ == "__main__":
    sys.exit(main())

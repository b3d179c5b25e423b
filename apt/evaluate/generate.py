"""Samples of one model for many prompts and seeds, in a folder with their manifest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apt.errors import InputError
from apt.generate_options import GenerateOptions
from apt.media import write_media
from apt.outputs import Output, OutputRecord, check_folder
from apt.pipeline import OneStepPipeline
from apt.samples import MANIFEST


def generate_samples(
    folder: Path,
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    options: GenerateOptions = GenerateOptions(),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Make every prompt with every seed: .mp4, or .png where the model makes single frames.

    An interrupted call is repeated, and makes what is left.

    Args:
        folder: for the files and their manifest (`apt.samples`); made if need be.
        model: a built-in name, a folder or a Hub id.
        prompts: no two the same.
        seeds: no two the same.
        options: how; what they leave open is the model's own.
        device: None takes a GPU if there is one.
        dtype: of the weights.
        progress: called with the number of samples that are there, and of all.

    Returns the folder.

    Raises:
        InputError: for a prompt, seed or option that does not fit; for a folder that cannot be
            written, or that has samples of other settings.
        CheckpointError: for a model that is not there.
    """
    check_folder(folder)
    pipeline = OneStepPipeline.from_pretrained(model, device=device, dtype=dtype)
    sample = pipeline.info.sample
    frames, *_ = sample.sized(options.frames, options.height, options.width)
    if frames > 1 and not sample.fps:
        raise InputError(
            f"{model} was trained on clips at each video's own rate; make its samples with "
            "`diffusion-apt generate --fps`, and compare that folder"
        )
    plan = pipeline.plan(options)
    origin = pipeline.bundle.origin
    settings: dict[str, Any] = {
        **dataclasses.asdict(options),
        "model": model,
        "model_content": origin and (origin.revision or origin.weights),
        "dtype": str(dtype).removeprefix("torch."),
        "fps": sample.fps,
        "num_steps": len(plan.timesteps) - 1,
        "sampler": plan.sampler,
        "cfg_scale": plan.cfg_scale,
    }
    suffix = ".png" if frames == 1 else ".mp4"
    outputs = [
        Output(path=folder / f"prompt{number}-seed{seed}{suffix}", prompt=prompt, seed=seed)
        for (number, prompt), seed in itertools.product(enumerate(prompts), seeds)
    ]
    record = OutputRecord(folder / MANIFEST, settings, resume=True)
    left = [output for output in outputs if not record.has(output)]
    done = len(outputs) - len(left)
    progress(done, len(outputs))
    if not left:
        return folder
    videos = pipeline.stream(
        [output.prompt for output in left], seed=[output.seed for output in left], options=options
    )
    for output, video in zip(left, videos, strict=True):
        write_media(output.path, video, fps=sample.fps)
        record.add(output)
        done += 1
        progress(done, len(outputs))
    return folder

"""Walks between noises (APT Appendix I, Fig. 8): how sharply does a model switch between modes?

Noise of many dimensions has nearly always the same length, so the way between two of them goes
along the great circle: a straight line would pass through noise that the model has never seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.errors import InputError
from apt.generate_options import GenerateOptions
from apt.inside.latents import decode, encode, sample_from
from apt.pipeline import OneStepPipeline, check_prompts


@dataclass(frozen=True)
class Traversal:
    """What a model makes along the way.

    Attributes:
        pixels: (N, 3, T, H, W) fp32 in [-1, 1].
        steps: (N - 1,) root mean square differences of neighbours, pixels in [-1, 1].
    """

    pixels: Tensor
    steps: Tensor

    @property
    def mean_step(self) -> float:
        """How far it goes in all."""
        return float(self.steps.mean())

    @property
    def peak(self) -> float:
        """The largest step in units of the mean one: 1 is even, N - 1 one jump."""
        return float(self.steps.max() / self.steps.mean().clamp_min(1e-12))


def great_circle(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """Spherical interpolation (N, ...) between tensors of one shape.

    At each of `fractions` (N,) in [0, 1] the angle is that share of the whole; the length goes
    evenly from one's to the other's.

    Raises InputError for zeros, and for opposite directions, between which there is no one way.
    """
    lengths = a.double().norm(), b.double().norm()
    if min(lengths) == 0:
        raise InputError("there is no direction in noise that is zero")
    unit_a, unit_b = a.double() / lengths[0], b.double() / lengths[1]
    angle = torch.arccos((unit_a * unit_b).sum().clamp(-1, 1))
    if torch.pi - angle < 1e-6:
        raise InputError("the two noises are opposite: there is no one way between them")
    f = fractions.double().to(a.device).reshape(-1, *[1] * a.ndim)
    # Between equal directions every weight is right; sin 0 / sin 0 is not.
    near = angle < 1e-6
    sine = torch.ones_like(angle) if near else angle.sin()
    weight_a = 1 - f if near else torch.sin((1 - f) * angle) / sine
    weight_b = f if near else torch.sin(f * angle) / sine
    length = (1 - f) * lengths[0] + f * lengths[1]
    return ((weight_a * unit_a + weight_b * unit_b) * length).to(a.dtype)


@torch.inference_mode()
def traverse(
    pipeline: OneStepPipeline,
    prompt: str,
    *,
    seeds: Sequence[int] = (0, 1),
    num_between: int = 16,
    closed: bool = False,
    options: GenerateOptions = GenerateOptions(),
) -> Traversal:
    """Samples of one prompt on the way from the noise of one seed to that of the next.

    Args:
        pipeline: a model of any stage, with its own steps and guidance unless `options` has others.
        prompt: of all samples.
        seeds: two or more; those of `pipeline(prompt, seed=...)`, which are points of the way.
        num_between: steps from a seed to the next.
        closed: go back from the last to the first.
        options: steps, sampler, guidance and samples per network call; the size is the model's own.

    Raises:
        InputError: fewer than two seeds, the same one twice in a row, no step, a prompt without
            text, or bad options.
    """
    way = [*seeds, seeds[0]] if closed and seeds else list(seeds)
    if len(way) < 2 or any(a == b for a, b in itertools.pairwise(way)):
        raise InputError(f"a way needs two seeds or more, each other than the last; got {way}")
    check_prompts([prompt])
    if num_between < 1:
        raise InputError(f"num_between must be at least 1, got {num_between}")
    if (options.frames, options.height, options.width) != (None, None, None):
        raise InputError("a way has the model's own size; leave frames, height and width out")
    plan = pipeline.plan(options)
    places = pipeline.noise(way)
    fractions = torch.arange(num_between) / num_between
    legs = [great_circle(a, b, fractions) for a, b in itertools.pairwise(places)]
    z = torch.cat([*legs, places[-1:]])
    c = encode(pipeline, [prompt])
    parts = [
        decode(pipeline, sample_from(pipeline, c.expand(len(part)), part, plan))
        for part in z.split(options.batch_size)
    ]
    pixels = torch.cat(parts)
    steps = (pixels[1:] - pixels[:-1]).square().flatten(1).mean(dim=1).sqrt()
    return Traversal(pixels, steps.cpu())

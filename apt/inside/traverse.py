"""Interpolate between noises (APT Appendix I, Fig. 8): how sharply does a model switch modes?

High-dimensional Gaussian noise nearly always has the same norm. The path between two noises
therefore follows the great circle: a straight line would pass through noise of a smaller norm,
which the model has never seen.
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
    """The samples of a model along a path.

    Attributes:
        pixels: (N, 3, T, H, W) fp32 in [-1, 1].
        steps: (N - 1,) root mean square differences of neighbouring samples, in units of `pixels`.
    """

    pixels: Tensor
    steps: Tensor

    @property
    def mean_step(self) -> float:
        """Mean of `steps`."""
        return float(self.steps.mean())

    @property
    def peak(self) -> float:
        """Largest step over the mean step: 1 if all are equal, N - 1 for a single jump."""
        return float(self.steps.max() / self.steps.mean().clamp_min(1e-12))


def great_circle(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """Interpolate spherically between two tensors of one shape; returns (N, ...).

    At each of `fractions` (N,) in [0, 1], the angle from `a` is that share of the whole angle. The
    norm is interpolated linearly.

    Raises InputError for a zero tensor, and for opposite directions, which many great circles join.
    """
    lengths = a.double().norm(), b.double().norm()
    if min(lengths) == 0:
        raise InputError(
            "cannot interpolate from or to noise that is all zero: it has no direction"
        )
    unit_a, unit_b = a.double() / lengths[0], b.double() / lengths[1]
    angle = torch.arccos((unit_a * unit_b).sum().clamp(-1, 1))
    if torch.pi - angle < 1e-6:
        raise InputError(
            "the two noises are exactly opposite, so no single great circle joins them; choose "
            "another seed"
        )
    f = fractions.double().to(a.device).reshape(-1, *[1] * a.ndim)
    # Between equal directions any weights that sum to 1 will do, but sin 0 / sin 0 is nan.
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
    """Sample one prompt along the path from the noise of each seed to that of the next.

    Args:
        pipeline: a model of any stage; uses its own steps and guidance unless `options` sets them.
        prompt: the prompt of all samples.
        seeds: two or more. At each seed the sample is that of `pipeline(prompt, seed=...)`.
        num_between: steps from one seed to the next.
        closed: also return from the last seed to the first.
        options: steps, sampler, guidance and samples per network call. Sizes must be left unset:
            the model's own is used.

    Raises:
        InputError: for fewer than two seeds, a seed twice in a row, no steps, an empty prompt, or
            bad options.
    """
    way = [*seeds, seeds[0]] if closed and seeds else list(seeds)
    if len(way) < 2 or any(a == b for a, b in itertools.pairwise(way)):
        raise InputError(
            f"a path needs at least two seeds, and neighbouring seeds must differ; got {way}"
        )
    check_prompts([prompt])
    if num_between < 1:
        raise InputError(f"num_between must be at least 1, got {num_between}")
    if (options.frames, options.height, options.width) != (None, None, None):
        raise InputError("a path uses the model's own size; leave out frames, height and width")
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

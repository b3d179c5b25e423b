"""How much of the sample each layer of a one-step model knows (APT Appendix G, Fig. 12).

The model is frozen. For every layer, a linear projection predicts the final latents from the
visual tokens with the least mean squared error. The paper trains the projection. Here it is solved
in closed form: there is no learning rate or number of updates to choose, and every machine gets the
same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.flow import bind, one_step_sample
from apt.inside.latents import decode, encode_each, to_latents, to_tokens
from apt.models.transformer import DiffusionTransformer, Tokens
from apt.pipeline import OneStepPipeline, check_prompts

_RIDGE = 1e-6
"""Ridge, as a share of the tokens' mean square: directions that no token takes get no weight."""

_HELD_OUT_SEED = 2**32
"""Seeds from here on are used to measure and to show samples; smaller ones to fit."""


@dataclass(frozen=True)
class LayerProbe:
    """The projection of one layer.

    Attributes:
        layer: number of the layer, from 1.
        weight, bias: (values, D) and (values,) fp32.
        error: mean squared error on held-out noise, divided by the variance of the final latents:
            1 is as bad as predicting their mean, 0 is perfect.
    """

    layer: int
    weight: Tensor
    bias: Tensor
    error: float


@dataclass(frozen=True)
class ProbeResult:
    """The projections of all layers, and samples decoded from them.

    Attributes:
        layers: projections, first layer first.
        pixels: for each shown prompt, (layers + 1, 3, T, H, W) fp32 in [-1, 1]: the sample
            predicted from each layer, then the model's own.
    """

    layers: list[LayerProbe]
    pixels: list[Tensor]


@torch.inference_mode()
def probe_layers(
    pipeline: OneStepPipeline,
    prompts: Sequence[str],
    *,
    shown: Sequence[str] = (),
    num_samples: int = 512,
    num_held_out: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeResult:
    """Fit one projection per layer on one-step samples, and decode what each layer predicts.

    Args:
        pipeline: a model of any stage; it is evaluated at t = 1 only.
        prompts: used in turn for the samples.
        shown: prompts for which the sample predicted from every layer is decoded.
        num_samples: samples to fit on; they must have more tokens than the model is wide.
        num_held_out: samples of other noise to measure the error on.
        batch_size: samples per network call.
        seed: seed of the noise.

    Raises:
        InputError: for no prompt, an empty one, too few samples, or a seed out of range.
    """
    backbone = pipeline.bundle.backbone
    if not prompts or min(num_samples, num_held_out, batch_size) < 1:
        raise InputError(
            "probing needs at least one prompt, one sample to fit on, one held-out sample, and a "
            "batch size of at least 1"
        )
    check_prompts(prompts)
    if not 0 <= seed < _HELD_OUT_SEED:
        raise InputError(f"seed must be in 0..{_HELD_OUT_SEED - 1}, got {seed}")
    shape = pipeline.latent_shape()
    grid = backbone.token_grid(shape[1:])
    needed, tokens = backbone.hidden_size + 1, num_samples * grid[0] * grid[1] * grid[2]
    if tokens < needed:
        raise InputError(
            f"{num_samples} samples have {tokens} tokens, but a projection has {needed} unknowns "
            "per value; use more samples"
        )

    texts = encode_each(pipeline, [*prompts, *shown])
    asked, previewed = texts[: len(prompts)], texts[len(prompts) :]
    sums = [_Sums() for _ in range(backbone.depth)]
    for hidden, x in _samples(pipeline, asked, range(seed, seed + num_samples), batch_size):
        for layer, h_BLD in zip(sums, hidden, strict=True):
            layer.add(h_BLD, to_tokens(x, grid))
    fits = [layer.solve() for layer in sums]

    unseen = range(_HELD_OUT_SEED + seed, _HELD_OUT_SEED + seed + num_held_out)
    errors = torch.zeros(len(fits), dtype=torch.float64)
    finals = []
    for hidden, x in _samples(pipeline, asked, unseen, batch_size):
        target = to_tokens(x, grid)
        finals.append(target)
        for number, ((weight, bias), h_BLD) in enumerate(zip(fits, hidden, strict=True)):
            errors[number] += (h_BLD.float() @ weight.T + bias - target).square().sum().double()
    final = torch.cat(finals).double()
    errors /= (final - final.mean(dim=(0, 1))).square().sum().clamp_min(1e-30)
    layers = [
        LayerProbe(number, weight, bias, float(error))
        for number, ((weight, bias), error) in enumerate(zip(fits, errors, strict=True), start=1)
    ]

    pixels = []
    for hidden, x in _samples(pipeline, previewed, [_HELD_OUT_SEED + seed] * len(shown), 1):
        each = [
            to_latents(h_BLD.float() @ layer.weight.T + layer.bias, grid, shape)
            for layer, h_BLD in zip(layers, hidden, strict=True)
        ]
        pixels.append(decode(pipeline, torch.cat([*each, x])))
    return ProbeResult(layers, pixels)


def _samples(
    pipeline: OneStepPipeline, texts: Sequence[EncodedText], seeds: Sequence[int], batch_size: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield batches: every layer's tokens (B, L, D), and one-step samples (B, C, T, H, W) fp32."""
    backbone = pipeline.bundle.backbone
    for start in range(0, len(seeds), batch_size):
        part = seeds[start : start + batch_size]
        rows = [texts[(start + i) % len(texts)] for i in range(len(part))]
        c = Condition(EncodedText.concatenate(rows))
        with pipeline.at_work(backbone), _kept_tokens(backbone) as hidden:
            x = one_step_sample(bind(backbone, c), pipeline.noise(part))
        yield hidden, x


@contextmanager
def _kept_tokens(backbone: DiffusionTransformer) -> Iterator[list[Tensor]]:
    """Yield a list that collects the visual tokens after every block of a forward pass."""
    hidden: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[object, ...], tokens: Tokens) -> None:
        hidden.append(tokens.visual)

    hooks = [block.register_forward_hook(keep) for block in backbone.block_list()]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


class _Sums:
    """The normal equations of one layer, accumulated in fp64 batch by batch."""

    def __init__(self) -> None:
        self.square: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, h_BLD: Tensor, target: Tensor) -> None:
        h = h_BLD.flatten(0, 1).double()
        h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        self.square = self.square + h.T @ h
        self.cross = self.cross + h.T @ target.flatten(0, 1).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.square, Tensor) and isinstance(self.cross, Tensor)
        ridge = _RIDGE * self.square.diagonal()[:-1].mean()
        damped = self.square + torch.diag(ridge.expand(len(self.square)))
        solution = torch.linalg.solve(damped, self.cross).float()
        return solution[:-1].T.contiguous(), solution[-1]

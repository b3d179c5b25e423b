"""Tokens and the latents that they represent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.errors import InputError
from apt.inside.latents import encode as encode_prompts
from apt.inside.latents import sample_from, to_latents, to_tokens
from apt.pipeline import OneStepPipeline
from tests.tiny import tiny_bundle

sizes = st.tuples(*[st.integers(1, 3)] * 3)


@given(channels=st.integers(1, 3), grid=sizes, patch=sizes)
def test_tokens_are_patches_and_back(
    channels: int, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    shape = (channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    x = torch.arange(2 * torch.Size(shape).numel()).reshape(2, *shape).float()
    tokens = to_tokens(x, grid)
    assert torch.equal(to_latents(tokens, grid, shape), x)
    # The last token of a row along W is the patch at its end.
    assert torch.equal(
        tokens[1, grid[2] - 1],
        x[1, :, : patch[0], : patch[1], (grid[2] - 1) * patch[2] :].flatten(),
    )


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="do not divide"):
        to_tokens(torch.zeros(1, 2, 3, 4, 4), (2, 2, 2))


@pytest.mark.parametrize("stage", ["apt", "diffusion"])
def test_a_seed_gives_what_the_pipeline_makes_of_it(stage: str) -> None:
    pipeline = OneStepPipeline(tiny_bundle(stage))
    plan = pipeline.plan(num_steps=1 if stage == "apt" else 3)
    with torch.inference_mode():
        x = sample_from(
            pipeline,
            encode_prompts(pipeline, ["a"] * 2),
            pipeline.noise([3, 4]),
            plan,
        )
        pixels = pipeline.bundle.codec.decode(x).clamp(-1, 1)
    own = pipeline("a", seed=[3, 4], num_steps=len(plan.timesteps) - 1, output_type="pt")
    torch.testing.assert_close(pixels.transpose(1, 2) / 2 + 0.5, own, atol=1e-5, rtol=0)

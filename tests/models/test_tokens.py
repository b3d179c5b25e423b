from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.kernels import norm_rope, qk_norm_rope
from apt.kernels.norm_rope import Layout
from apt.models.mmdit.model import position_table
from apt.models.tokens import check_layers, check_rows, rope_table, token_grid


@settings(max_examples=25, deadline=None)
@given(
    first=st.tuples(*[st.integers(0, 3)] * 3),
    second=st.tuples(*[st.integers(0, 3)] * 3),
    moved=st.tuples(*[st.integers(0, 3)] * 3),
    head_dim=st.sampled_from([6, 8, 12, 16, 32]),
)
def test_rope_is_relative(
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    moved: tuple[int, int, int],
    head_dim: int,
) -> None:
    """A query's score with a key depends on their distance along each axis alone."""
    grid = (8, 8, 8)
    cos, sin = rope_table(grid, head_dim, 10_000.0, torch.device("cpu"))
    assert cos.shape == sin.shape == (512, head_dim // 2)
    assert cos.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 1, head_dim, generator=generator).expand(1, 512, 1, head_dim)
    k = torch.randn(1, 1, 1, head_dim, generator=generator).expand(1, 512, 1, head_dim)
    q, k = qk_norm_rope(q, k, None, None, cos, sin)

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> Tensor:
        index = [(p[0] * 8 + p[1]) * 8 + p[2] for p in (a, b)]
        return (q[0, index[0], 0] * k[0, index[1], 0]).sum()

    there = [tuple(p + m for p, m in zip(place, moved, strict=True)) for place in (first, second)]
    torch.testing.assert_close(
        score(first, second), score(there[0], there[1]), rtol=1e-4, atol=1e-4
    )


def test_rope_tells_every_place_apart() -> None:
    cos, sin = rope_table((3, 4, 5), 12, 10_000.0, torch.device("cpu"))
    table = torch.cat([cos, sin], dim=-1)
    assert torch.equal(cos[0], torch.ones(6)) and torch.equal(sin[0], torch.zeros(6))
    distance = torch.cdist(table, table) + torch.eye(60)
    assert distance.min() > 0.01


@settings(max_examples=10, deadline=None)
@given(grid=st.tuples(*[st.integers(1, 6)] * 3), head_dim=st.sampled_from([6, 8, 12, 20, 128]))
def test_rope_is_diffusers(grid: tuple[int, int, int], head_dim: int) -> None:
    peer = WanRotaryPosEmbed(head_dim, (1, 1, 1), 8)
    cos, sin = peer(torch.zeros(1, 1, *grid))
    ours = rope_table(grid, head_dim, 10_000.0, torch.device("cpu"))
    for table, expected in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(table, expected[0, :, 0, ::2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("latents", "patch", "grid"),
    [((3, 4, 6), (1, 2, 2), (3, 2, 3)), ((4, 1, 9), (2, 1, 3), (2, 1, 3))],
)
def test_token_grid(
    latents: tuple[int, int, int], patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    assert token_grid(latents, patch) == grid


def test_sizes_that_no_patch_divides() -> None:
    for latents, name in (((3, 4, 4), "frames 3"), ((2, 5, 4), "height 5"), ((2, 4, 1), "width 1")):
        with pytest.raises(InputError, match=name):
            token_grid(latents, (2, 2, 2))


def test_layers_are_counted_from_1() -> None:
    check_layers([1, 3], 3)
    for layers in ([], [0], [1, 4]):
        with pytest.raises(InputError, match=r"1\.\.3"):
            check_layers(layers, 3)


def test_rows_of_timesteps_and_conditions() -> None:
    x, c = torch.zeros(3, 1, 1, 1, 4), Condition(EncodedText(torch.zeros(2, 1, 1)))
    rows = torch.tensor([0, 1, 1])
    check_rows(x, torch.zeros(2), c, rows)
    check_rows(x, torch.zeros(2, 4), c, rows, num_tokens=4)
    check_rows(x[:2], torch.zeros(2), c, None)
    for t, text, index, tokens in (
        (torch.zeros(2), c, None, None),
        (torch.zeros(3), c, None, None),
        (torch.zeros(1), c, rows, None),
        (torch.zeros(2, 4), c, rows, None),
        (torch.zeros(2, 3), c, rows, 4),
        (torch.zeros(2, 1), c, rows, 4),
    ):
        with pytest.raises(InputError, match="pass `rows`"):
            check_rows(x, t, text, index, num_tokens=tokens)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_tables_of_an_inference_serve_training(layout: Layout) -> None:
    rope_table.cache_clear()
    position_table.cache_clear()
    with torch.inference_mode():
        position_table((2, 2, 2), 12, torch.device("cpu"))
    cos, sin = rope_table((2, 2, 2), 12, 100.0, torch.device("cpu"))
    assert rope_table.cache_info().hits == 1
    q = torch.randn(1, 8, 1, 12, requires_grad=True)
    norm_rope(q, None, cos, sin, layout=layout).sum().backward()
    assert not position_table((2, 2, 2), 12, torch.device("cpu")).is_inference()

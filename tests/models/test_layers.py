from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.kernels import norm_rope, qk_norm_rope
from apt.kernels.norm_rope import Layout
from apt.models.layers import rope_table
from apt.models.mmdit.model import position_table


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

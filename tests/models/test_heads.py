from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.errors import ConfigError, InputError
from apt.models import HEADS
from apt.models.discriminator import AttentionHead, Conv3DHead

GRID = (2, 3, 4)


def make(name: str, hidden_size: int = 16) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HEADS.create(name, hidden_size=hidden_size)


def tokens(samples: int = 3, hidden_size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, math.prod(GRID), hidden_size, generator=generator)


def test_registered_heads() -> None:
    assert HEADS.names() == ["attention", "conv3d"]
    with pytest.raises(InputError, match="did you mean 'conv3d'"):
        HEADS.create("conv2d", hidden_size=8)


@pytest.mark.parametrize("name", ["attention", "conv3d"])
def test_one_feature_vector_per_sample(name: str) -> None:
    head, x = make(name), tokens()
    features = head(x, GRID)
    assert features.shape == (3, 16)
    for i in range(3):
        torch.testing.assert_close(head(x[i : i + 1], GRID)[0], features[i])


@pytest.mark.parametrize("name", ["attention", "conv3d"])
def test_narrow_tokens_are_widened_and_features_are_not_rounded(name: str) -> None:
    head, x = make(name), tokens().bfloat16()
    features = head(x, GRID)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, head(x.float(), GRID), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "conv3d"])
def test_every_weight_trains(name: str) -> None:
    head = make(name)
    head(tokens(), GRID).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


@pytest.mark.parametrize("hidden_size", [16, 128])
def test_attention_head_written_out(hidden_size: int) -> None:
    head = make("attention", hidden_size)
    assert isinstance(head, AttentionHead)
    assert head.num_heads == max(1, hidden_size // 64)
    x = tokens(1, hidden_size)
    normed = head.norm(x[0])
    query = head.to_query(head.query)
    keys, values = head.to_key(normed), head.to_value(normed)
    size = hidden_size // head.num_heads
    parts = []
    for i in range(0, hidden_size, size):
        scores = keys[:, i : i + size] @ query[i : i + size] / size**0.5
        parts.append(scores.softmax(0) @ values[:, i : i + size])
    expected = head.query + head.out(torch.cat(parts))
    torch.testing.assert_close(head(x, GRID)[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_head_sees_a_set_and_conv3d_a_volume() -> None:
    x = tokens()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    attention, conv = make("attention"), make("conv3d")
    torch.testing.assert_close(attention(x[:, order], GRID), attention(x, GRID))
    assert not torch.allclose(conv(x[:, order], GRID), conv(x, GRID), atol=1e-4)


def test_conv3d_head_written_out() -> None:
    head = make("conv3d")
    assert isinstance(head, Conv3DHead)
    x = tokens()
    small = head.reduce(head.norm(x))
    volume = torch.zeros(3, 4, *GRID)
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            for k in range(GRID[2]):
                volume[:, :, i, j, k] = small[:, (i * GRID[1] + j) * GRID[2] + k]
    hidden = F.silu(volume + F.conv3d(F.silu(volume), head.conv.weight, head.conv.bias, padding=1))
    expected = head.out(hidden.flatten(2).mean(2))
    torch.testing.assert_close(head(x, GRID), expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_split() -> None:
    with pytest.raises(ConfigError, match="200 is not divisible by the 3 attention heads"):
        make("attention", 200)

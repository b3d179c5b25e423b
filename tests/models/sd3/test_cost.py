"""The cost of a Stable Diffusion 3 against what torch counts in one, and by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.condition import Condition, EncodedText
from apt.models.costs import dit_cost
from apt.models.sd3 import SD3Config
from apt.models.sd3.checkpoint import sd3_5_large, sd3_5_medium
from tests.models.costs.flops import counted_by_torch, flops_of

SMALL = SD3Config(
    in_channels=4, depth=3, num_heads=2, head_dim=8, text_dim=20, pooled_dim=6, max_positions=6,
    sample_size=8,
)  # fmt: skip
LATENTS = (1, 4, 6)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, dual_attention_layers=(0, 2)),
        dataclasses.replace(SMALL, depth=1, qk_norm=False, patch_size=1),
    ],
    ids=["plain", "dual_attention", "sd3_one_block"],
)
def test_flops_are_those_that_torch_counts(config):
    x, text = torch.randn(2, 4, *LATENTS), torch.randn(2, 5, 20)
    condition = Condition(EncodedText(text, None, torch.randn(2, 6)))
    counted = counted_by_torch(config.build(), x, torch.rand(2), condition)
    cost = dit_cost(config, 2, LATENTS, text_tokens=5, dtype=torch.float32)
    assert flops_of(cost) == counted


def test_shared_rows_are_computed_once():
    x, rows = torch.randn(3, 4, *LATENTS), torch.zeros(3, dtype=torch.int64)
    condition = Condition(EncodedText(torch.randn(1, 5, 20), None, torch.randn(1, 6)))
    counted = counted_by_torch(SMALL.build(), x, torch.rand(1), condition, rows=rows)
    cost = dit_cost(SMALL, 3, LATENTS, text_tokens=5, num_rows=1, dtype=torch.float32)
    assert flops_of(cost) == counted


def test_3_5_large_at_1024_pixels():
    # 128x128 latents, 64x64 tokens; 77 tokens of CLIP and 256 of T5
    cost = dit_cost(sd3_5_large(), 1, (1, 128, 128), text_tokens=333)
    length, text, d = 4096, 333, 38 * 64
    both = length + text
    # By hand, two operations each: qkv 3, out 1, MLP 8 in both streams; 12 modulations of a row
    assert cost.layers[0].linear.flops == 2 * (both * 12 * d**2 + 12 * d**2)
    assert cost.layers[0].attention.flops == 4 * d * both**2
    # Behind the last block nothing reads text: keys and values alone, and two modulations
    assert cost.layers[-1].linear.flops == 2 * ((length * 12 + text * 2) * d**2 + 8 * d**2)
    assert cost.layers[-1].attention.flops == 4 * d * length * both
    assert len(cost.layers) == 38


def test_token_tensors_that_a_block_moves():
    layers = dit_cost(sd3_5_medium(), 1, (1, 128, 128), text_tokens=0).layers
    token_tensor = 4096 * 1536 * 2
    # Norm 2, q and k 4, joint sequences 6, boundary 4, GELU 8, gated add 3
    plain = layers[-2]
    assert plain.elementwise.bytes / token_tensor == pytest.approx(27, rel=0.002)
    assert plain.elementwise_fused.bytes / token_tensor == pytest.approx(12, rel=0.002)
    # The second attention: norm 2, q and k 4, gated add 3; fused, a modulation out and an update in
    assert layers[0].elementwise.bytes / token_tensor == pytest.approx(36, rel=0.002)
    assert layers[0].elementwise_fused.bytes / token_tensor == pytest.approx(18, rel=0.002)

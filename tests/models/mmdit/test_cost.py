"""The cost of an MMDiT against what torch counts in one, and against published arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.condition import Condition, EncodedText
from apt.kernels.roofline import GPUS, H100_ATTENTION_TFLOPS, Rates
from apt.models.costs import dit_cost
from apt.models.mmdit import MMDiTConfig
from apt.models.mmdit.model import apt_8b
from tests.models.costs.flops import counted_by_torch, flops_of

SMALL = MMDiTConfig(in_channels=4, hidden_size=48, depth=3, num_heads=4, text_dim=20)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, num_dual_blocks=1),
        dataclasses.replace(SMALL, modulation="block"),
        dataclasses.replace(SMALL, pooled_dim=12, mlp_ratio=2.5, patch_size=(1, 1, 2)),
        dataclasses.replace(SMALL, depth=1),
    ],
    ids=["dual", "shared_weights", "modulation_per_block", "pooled", "one_block"],
)
def test_flops_are_those_that_torch_counts(config):
    batch, text = 2, 5
    x = torch.randn(batch, 4, 2, 4, 6)
    pooled = torch.randn(batch, config.pooled_dim) if config.pooled_dim else None
    condition = Condition(EncodedText(torch.randn(batch, text, 20), None, pooled))
    counted = counted_by_torch(config.build(), x, torch.rand(batch), condition)
    cost = dit_cost(config, batch, (2, 4, 6), text_tokens=text, dtype=torch.float32)
    assert flops_of(cost) == counted
    assert cost.flops == sum(counted)


def test_shared_rows_are_computed_once():
    counts = [dit_cost(SMALL, 3, (2, 4, 6), num_rows=rows).ends.linear.flops for rows in (None, 1)]
    x, rows = torch.randn(3, 4, 2, 4, 6), torch.zeros(3, dtype=torch.int64)
    condition = Condition(EncodedText(torch.randn(1, 256, 20)))
    counted = counted_by_torch(SMALL.build(), x, torch.rand(1), condition, rows=rows)
    assert counts[1] < counts[0]
    assert flops_of(dit_cost(SMALL, 3, (2, 4, 6), num_rows=1)) == counted


def test_apt_8b_at_49_frames_of_1280x720():
    # 49 frames are 13 latents of 90x160, 13x45x80 tokens
    cost = dit_cost(apt_8b(), 1, (13, 90, 160), text_tokens=256)
    total = cost.total
    assert cost.visual_tokens == 46_800
    assert len(cost.layers) == 36
    assert round(total.linear.flops / 1e12) == 384
    assert round(total.attention.flops / 1e12, -1) == 980  # 979.4
    assert round(cost.flops / 1e12) == 1363
    # By hand: 24 D^2 for a token in each block (qkv 3, out 1, MLP 8, two operations each)
    visual = dit_cost(apt_8b(), 1, (13, 90, 160), text_tokens=0)
    blocks = sum(layer.linear.flops for layer in visual.layers)
    assert blocks == 36 * 46_800 * 24 * 3072**2
    assert visual.total.attention.flops == 36 * 4 * 46_800**2 * 3072


def test_fused_elementwise_work_moves_twelve_token_tensors_a_layer():
    cost = dit_cost(apt_8b(), 1, (13, 90, 160), text_tokens=0)
    token_tensor = 46_800 * 3072 * 2
    # Two boundaries of four, and q and k in and out; modulation and tables are under 1 %
    assert cost.layers[0].elementwise_fused.bytes / token_tensor == pytest.approx(12, rel=0.01)
    # Norm 2, q, k and v 6, boundary 4, GELU 8, gated add 3
    assert cost.layers[0].elementwise.bytes / token_tensor == pytest.approx(23, rel=0.01)


@pytest.mark.parametrize("num_dual_blocks", [None, 1], ids=["dual", "shared_weights"])
def test_the_last_block_normalises_the_keys_of_text_alone(num_dual_blocks):
    config = dataclasses.replace(SMALL, num_dual_blocks=num_dual_blocks)
    visual, both = (dit_cost(config, 2, (2, 4, 6), text_tokens=s).layers[-1] for s in (0, 5))
    tokens, head, size = 2 * 5 * 48, 12, 2
    # Tokens in and out, a row of scale and shift for each sample, and the index of that row
    norm = (2 * tokens + 2 * 2 * 48) * size + 2 * 8
    keys_and_values = (4 * tokens + head) * size  # in and out, and the weight of the norm of k
    assert both.elementwise.bytes - visual.elementwise.bytes == norm + keys_and_values


def test_floors_are_those_of_the_field():
    cost = dit_cost(apt_8b(), 1, (13, 90, 160), text_tokens=256)
    h200 = GPUS["h200"].rates
    assert round(cost.floor(h200).matmul, 2) == 1.73
    # With attention as fast as the best kernel for the card, and everything fused
    published = H100_ATTENTION_TFLOPS[cost.head_dim]
    fast = dataclasses.replace(h200, attention_tflops=published["flash-attn 3"])
    assert cost.floor(fast).total_fused == pytest.approx(2.06, abs=0.05)
    assert round(514e12 * 2.65 / cost.flops, 2) == 1.0  # the paper's 2.65 s are 514 TFLOP/s


def test_a_floor_adds_up_its_parts():
    cost = dit_cost(SMALL, 2, (2, 4, 6))
    floor = cost.floor(Rates(matmul_tflops=1e-3, memory_gb_s=1e6, attention_tflops=2e-3))
    assert floor.linear == pytest.approx(cost.total.linear.flops / 1e9)
    assert floor.attention == pytest.approx(cost.total.attention.flops / 2e9)
    assert floor.matmul == floor.linear + floor.attention
    assert floor.matmul < floor.total_fused < floor.total

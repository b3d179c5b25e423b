"""The cost of a Wan against what torch counts in one, and by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.condition import Condition, EncodedText
from apt.models.costs import dit_cost
from apt.models.wan import WanConfig
from apt.models.wan.checkpoint import wan21_t2v_1_3b
from tests.models.costs.flops import counted_by_torch, flops_of

SMALL = WanConfig(
    in_channels=4, hidden_size=24, depth=2, num_heads=2, mlp_size=20, text_dim=10, text_length=9,
    time_dim=16,
)  # fmt: skip
LATENTS = (2, 4, 6)


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, patch_size=(2, 1, 3), depth=1, mlp_size=33, num_heads=1)],
    ids=["two_blocks", "another_patch"],
)
@pytest.mark.parametrize("words", [9, 5])
def test_flops_are_those_that_torch_counts(config, words):
    x = torch.randn(2, 4, *LATENTS)
    counted = counted_by_torch(
        config.build(), x, torch.rand(2), Condition(EncodedText(torch.randn(2, words, 10)))
    )
    cost = dit_cost(config, 2, LATENTS, text_tokens=words, dtype=torch.float32)
    assert flops_of(cost) == counted
    assert cost.text_tokens == 9  # prompts are padded, and padding is attended to


def test_keys_and_values_of_shared_text_are_projected_once_and_copied():
    x, rows = torch.randn(3, 4, *LATENTS), torch.zeros(3, dtype=torch.int64)
    text = Condition(EncodedText(torch.randn(1, 9, 10)))
    counted = counted_by_torch(SMALL.build(), x, torch.rand(1), text, rows=rows)
    apart, shared = (
        dit_cost(SMALL, 3, LATENTS, text_tokens=9, num_rows=r, dtype=torch.float32)
        for r in (None, 1)
    )
    assert flops_of(shared) == counted
    assert shared.flops < apart.flops
    copies = 2 * 2 * 3 * 9 * 24 * 4  # k and v, read and written, for 3 samples
    moved = [cost.layers[0].elementwise.bytes for cost in (shared, apart)]
    fused = [cost.layers[0].elementwise_fused.bytes for cost in (shared, apart)]
    assert moved[0] - moved[1] == fused[0] - fused[1] + copies  # rows are shared in both


def test_1_3b_at_81_frames_of_832x480():
    # 81 frames are 21 latents of 60x104, 21x30x52 tokens
    cost = dit_cost(wan21_t2v_1_3b(), 1, (21, 60, 104), text_tokens=512)
    length, text, d, mlp = 32_760, 512, 1536, 8960
    assert (cost.visual_tokens, cost.text_tokens, len(cost.layers)) == (length, text, 30)
    # By hand, two operations each: q, k, v and out of attention to itself, q and out of attention
    # to text, MLP; k and v of text
    tokens = length * (4 * d**2 + 2 * d**2 + 2 * d * mlp)
    assert cost.layers[0].linear.flops == 2 * (tokens + text * 2 * d**2)
    assert cost.layers[0].attention.flops == 4 * d * (length**2 + length * text)
    # Patches of 64 numbers in and out; text twice; 256 sinusoids twice and six modulations
    ends = length * 2 * 64 * d + text * (4096 * d + d**2) + 256 * d + d**2 + 6 * d**2
    assert cost.ends.linear.flops == 2 * ends
    assert round(cost.flops / 1e12) == 283


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_token_tensors_that_a_block_moves(dtype):
    latents = (21, 60, 104)
    layer = dit_cost(wan21_t2v_1_3b(), 1, latents, text_tokens=512, dtype=dtype).layers[0]
    size = dtype.itemsize
    token_tensor = 32_760 * 1536 * size
    # Cosines and sines of 64 pairs, fp32; keys of text in and out
    small = 2 * 64 * 4 / (1536 * size) + 2 * 512 / 32_760
    # Norm 2, q and k 4, boundary 4; q 2, boundary 4; GELU 2 of the MLP's width, gated add 3. The
    # gate is fp32: bf16 tokens come out of a sum that is written and read in fp32
    sums = 4 if dtype == torch.bfloat16 else 0
    by_hand = 19 + 2 * 8960 / 1536 + sums + small
    assert layer.elementwise.bytes / token_tensor == pytest.approx(by_hand, rel=0.001)
    # Three boundaries of four, q and k, and q once more
    fused = 18 + small
    assert layer.elementwise_fused.bytes / token_tensor == pytest.approx(fused, rel=0.001)

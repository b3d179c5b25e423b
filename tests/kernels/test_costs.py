"""Costs against counts by hand and torch's own counter, and the rooflines."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apt.errors import InputError
from apt.kernels import attention, query_pooling
from apt.kernels.costs import (
    OpCost,
    attention_cost,
    fused_rmsprop_cost,
    linear_cost,
    modulated_norm_cost,
    perturbed_batch_cost,
    qk_norm_rope_cost,
    query_pooling_cost,
    residual_modulated_norm_cost,
    sample_shifted_timesteps_cost,
)
from apt.kernels.roofline import GPUS, H100_ATTENTION_TFLOPS, Rates, find_gpu

BF16, FP32 = torch.bfloat16, torch.float32
# 2 samples, 5 tokens, 8 channels: 80 numbers of tokens, 16 of modulation
TOKENS, ROW = 80, 8


def test_costs_add_and_multiply():
    cost = OpCost(1, 2, 3) + 2 * OpCost(10, 20, 30)
    assert cost == OpCost(21, 42, 63)
    assert cost.bytes == 63
    assert sum([cost, cost], OpCost()) == cost * 2


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        # x, scale and shift in, y out; backward d y, x, scale in, d x, d scale, d shift out
        (
            {},
            OpCost(2 * (TOKENS + 4 * ROW), 2 * TOKENS, 5 * TOKENS),
            OpCost(2 * (2 * TOKENS + 2 * ROW), 2 * (TOKENS + 4 * ROW), 10 * TOKENS),
        ),
        # Three rows of modulation for two samples, and two int64 that say which
        (
            {"num_rows": 3},
            OpCost(2 * (TOKENS + 6 * ROW) + 16, 2 * TOKENS, 5 * TOKENS),
            OpCost(2 * (2 * TOKENS + 3 * ROW) + 16, 2 * (TOKENS + 6 * ROW), 10 * TOKENS),
        ),
        # Mean and its subtraction, weight and bias
        (
            {"norm": "layer", "weight": True, "bias": True},
            OpCost(2 * (TOKENS + 6 * ROW), 2 * TOKENS, 9 * TOKENS),
            OpCost(2 * (2 * TOKENS + 4 * ROW), 2 * (TOKENS + 6 * ROW), 13 * TOKENS),
        ),
        # Scale and shift are as large as x, and 1 + scale is computed for each
        (
            {"modulation": "per_token"},
            OpCost(2 * 3 * TOKENS, 2 * TOKENS, 6 * TOKENS),
            OpCost(2 * 3 * TOKENS, 2 * 3 * TOKENS, 11 * TOKENS),
        ),
    ],
    ids=["rms", "rows", "affine", "per_token"],
)
def test_modulated_norm_by_hand(options, forward, backward):
    assert modulated_norm_cost(2, 5, 8, dtype=BF16, **options) == forward
    assert modulated_norm_cost(2, 5, 8, dtype=BF16, backward=True, **options) == backward


def test_residual_modulated_norm_by_hand():
    # x, update, gate, scale, shift in; x_new, y out
    assert residual_modulated_norm_cost(2, 5, 8, dtype=FP32) == OpCost(
        4 * (2 * TOKENS + 6 * ROW), 4 * 2 * TOKENS, 7 * TOKENS
    )
    # d y, d x_new, x_new, update, gate, scale in; d x, d update, d gate, d scale, d shift out
    assert residual_modulated_norm_cost(2, 5, 8, dtype=FP32, backward=True) == OpCost(
        4 * (4 * TOKENS + 4 * ROW), 4 * (2 * TOKENS + 6 * ROW), 14 * TOKENS
    )


def test_the_boundary_at_720p_moves_four_token_tensors():
    cost = residual_modulated_norm_cost(1, 46_800, 3072, dtype=BF16)
    assert cost.bytes == 4 * 46_800 * 3072 * 2 + 3 * 3072 * 2
    assert round(46_800 * 3072 * 2 / 1e6) == 288  # 288 MB per token tensor


def test_an_unknown_norm_is_no_other():
    with pytest.raises(InputError, match="batch"):
        modulated_norm_cost(1, 1, 8, dtype=BF16, norm="batch")  # type: ignore[arg-type]


def test_qk_norm_rope_by_hand():
    # 2 samples, 5 tokens, 3 heads of 4 channels: 120 numbers; 2 x 5 x 2 fp32 of tables
    values, tables = 120, 4 * 20
    assert qk_norm_rope_cost(2, 5, 3, 4, dtype=BF16) == OpCost(
        2 * (2 * values + 2 * 4) + tables, 2 * 2 * values, 7 * 2 * values
    )
    # Text: no tables. v is copied. Across heads there are 12 weights.
    assert qk_norm_rope_cost(
        2, 5, 3, 4, dtype=BF16, rope=False, copied=1, across_heads=True
    ) == OpCost(2 * (3 * values + 2 * 12), 2 * 3 * values, 4 * 2 * values)
    # Both gradients and both inputs in, gradients of inputs and weights out
    assert qk_norm_rope_cost(2, 5, 3, 4, dtype=BF16, backward=True) == OpCost(
        2 * (4 * values + 2 * 4) + tables, 2 * (2 * values + 2 * 4), 12 * 2 * values
    )
    # A gradient of v only moves
    one, with_v = (
        qk_norm_rope_cost(2, 5, 3, 4, dtype=BF16, backward=True, copied=n) for n in (0, 1)
    )
    assert with_v == one + OpCost(2 * values, 2 * values, 0)


def test_random_ops_by_hand():
    assert sample_shifted_timesteps_cost(7) == OpCost(0, 28, 28)
    # 3 real and 2 generated samples of 10 numbers, 1 perturbed
    forward = perturbed_batch_cost(3, 2, 10, dtype=FP32, num_perturbed=1)
    assert forward == OpCost(4 * 50, 4 * 60, 20)
    backward = perturbed_batch_cost(3, 2, 10, dtype=FP32, num_perturbed=1, backward=True)
    assert backward == OpCost(4 * 60, 4 * 50, 10)
    assert perturbed_batch_cost(3, 2, 10, dtype=FP32).bytes_written == 4 * 80


def test_fused_rmsprop_by_hand():
    # fp32: parameter, gradient, square average and EMA in, all but the gradient out
    assert fused_rmsprop_cost(10, dtype=FP32) == OpCost(160, 120, 120)
    assert fused_rmsprop_cost(10, dtype=BF16, ema=False) == OpCost(80, 60, 90)
    assert fused_rmsprop_cost(10, dtype=BF16, grad_dtype=FP32, weight_decay=True) == OpCost(
        10 * (2 + 4 + 8), 10 * (2 + 8), 140
    )


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [False, True])
def test_linear_against_the_counter_of_torch(bias):
    layer = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(7, 24, requires_grad=True)
    forward = count(lambda: layer(x))
    both = count(lambda: layer(x).sum().backward())
    assert linear_cost(7, 24, 40, dtype=FP32, bias=bias).flops == forward
    assert linear_cost(7, 24, 40, dtype=FP32, backward=True).flops == both - forward
    assert linear_cost(7, 24, 40, dtype=FP32, bias=bias) == OpCost(
        4 * (7 * 24 + 24 * 40 + 40 * bias), 4 * 7 * 40, forward
    )


def test_attention_against_the_counter_of_torch():
    q = torch.randn(2, 5, 3, 16)
    k = v = torch.randn(2, 9, 3, 16)
    cost = attention_cost(2, 5, 9, 3, 16, dtype=FP32)
    # torch counts no attention kernel of the CPU; as plain products it counts the same
    assert cost.flops == count(lambda: attention(q, k, v, backend="_native_math"))
    assert cost.flops == 4 * 2 * 3 * 5 * 9 * 16
    queries, keys = 2 * 5 * 48, 2 * 9 * 48
    assert (cost.bytes_read, cost.bytes_written) == (4 * (queries + 2 * keys), 4 * queries)
    backward = attention_cost(2, 5, 9, 3, 16, dtype=FP32, mask=True, backward=True)
    # q, output and its gradient, k, v and the mask in; three gradients out
    assert backward == OpCost(
        4 * (3 * queries + 2 * keys) + 18, 4 * (queries + 2 * keys), 10 * 2 * 3 * 5 * 9 * 16
    )


def test_attention_backward_as_torch_counts_flash_attention():
    from torch.utils.flop_counter import sdpa_backward_flop_count

    q, k = (2, 3, 5, 16), (2, 3, 9, 16)  # (B, H, L, Dh)
    cost = attention_cost(2, 5, 9, 3, 16, dtype=BF16, backward=True)
    assert cost.flops == sdpa_backward_flop_count(q, q, k, k)


def test_query_pooling_against_the_counter_of_torch():
    batch, length, width, heads = 2, 7, 24, 3
    tokens = torch.randn(batch, length, width, requires_grad=True)
    query = torch.randn(width, requires_grad=True)
    weights = torch.randn(2, width, width, requires_grad=True)

    def pool():
        return query_pooling(tokens, query, *weights, num_heads=heads)

    forward, both = count(pool), count(lambda: pool().sum().backward())
    cost = query_pooling_cost(batch, length, width, heads, dtype=FP32)
    assert cost.flops == forward
    assert cost.bytes_read == 4 * (batch * length * width + 2 * width**2 + width)
    assert cost.bytes_written == 4 * batch * width
    backward = query_pooling_cost(batch, length, width, heads, dtype=FP32, backward=True)
    assert backward.flops == both - forward
    # Tokens, both matrices, the query and the gradient in; gradients of the first three out
    assert backward.bytes_read == cost.bytes_read + 4 * batch * width
    assert backward.bytes_written == cost.bytes_read


def test_a_roofline_is_the_slower_of_work_and_traffic():
    rates = Rates(matmul_tflops=2, memory_gb_s=1, attention_tflops=1)
    assert rates.seconds(OpCost(0, 1, 4 * 10**12)) == 2
    assert rates.seconds(OpCost(3 * 10**9, 2 * 10**9, 1)) == 5
    assert rates.attention_seconds(OpCost(0, 1, 4 * 10**12)) == 4


def test_gpus_are_found_by_name_and_are_plausible():
    assert find_gpu("h200").rates.matmul_tflops == 790
    assert find_gpu("a100").rates is find_gpu("a100").peak
    with pytest.raises(InputError, match=r"h100.*h200"):
        find_gpu("h300")
    for gpu in GPUS.values():
        # FLOPs for each byte: between a card for games and the newest accelerator
        assert 100 < gpu.peak.matmul_tflops * 1e3 / gpu.peak.memory_gb_s < 400
        if gpu.measured is not None:
            assert gpu.measured.matmul_tflops < gpu.peak.matmul_tflops
            assert gpu.measured.memory_gb_s < gpu.peak.memory_gb_s
            assert gpu.measured_by
    narrow, wide = H100_ATTENTION_TFLOPS[64], H100_ATTENTION_TFLOPS[128]
    assert narrow.keys() == wide.keys()
    assert all(200 < narrow[name] < wide[name] < 989.4 for name in wide)

"""Time is attributed to the right kind of work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apt.bench.split import kind_of, profile_split


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_scaled_dot_product_cudnn_attention", "attention"),
        ("aten::_flash_attention_forward", "attention"),
        ("aten::_cudnn_attention_forward", "attention"),
        ("flash_attn::_flash_attn_forward", "attention"),
        ("xformers_flash3::flash_fwd", "attention"),
        ("aten::addmm", "linear"),
        ("aten::mm", "linear"),
        ("aten::bmm", "linear"),
        ("aten::_scaled_mm", "linear"),
        ("aten::mul", "elementwise"),
        ("aten::gelu", "elementwise"),
        ("apt::modulated_norm", "elementwise"),
        ("triton_poi_fused_add_mul_0", "elementwise"),
        ("aten::copy_", "elementwise"),
    ],
)
def test_kinds(op, kind):
    assert kind_of(op) == kind


@pytest.mark.parametrize("kind", ["attention", "linear", "elementwise"])
def test_the_heaviest_kind_is_seen(kind):
    q = torch.randn(1, 4, 512, 64)
    a = torch.randn(512, 512)
    runs = {
        "attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "linear": lambda: a @ a,
        "elementwise": lambda: q.exp().sin(),
    }
    split = profile_split(runs[kind], torch.device("cpu")).milliseconds()
    assert max(split, key=lambda name: split[name]) == kind
    assert split["unattributed"] == 0

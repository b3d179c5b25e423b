"""Streams laid out in one sequence: the reference is the parts, one after the other."""

from __future__ import annotations

import pytest
import torch

from apt.errors import InputError
from apt.kernels import StreamQKV, joint_qk_norm_rope, norm_rope


def streams(*, text_queries: bool = True) -> list[StreamQKV]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    visual = StreamQKV(draw(2, 5, 3, 2, 8), draw(8), draw(8), draw(5, 4), draw(5, 4))
    text = StreamQKV(draw(2, 3, 3, 2, 8), draw(8), draw(8))
    if not text_queries:
        text = StreamQKV(text.qkv[:, :, 1:], None, text.k_weight)
    return [visual, text]


def test_is_each_stream_by_itself_and_concatenation():
    visual, text = streams()
    q, k, v = joint_qk_norm_rope([visual, text])
    for found, part in ((q, 0), (k, 1)):
        of_visual = norm_rope(visual.qkv[:, :, part], visual[1 + part], visual.cos, visual.sin)
        of_text = norm_rope(text.qkv[:, :, part], text[1 + part])
        assert torch.equal(found, torch.cat([of_visual, of_text], dim=1))
    assert torch.equal(v, torch.cat([visual.qkv[:, :, 2], text.qkv[:, :, 2]], dim=1))


def test_a_stream_without_queries_is_only_attended_to():
    q, k, v = joint_qk_norm_rope(streams(text_queries=False))
    with_queries = joint_qk_norm_rope(streams())
    assert torch.equal(q, with_queries[0][:, :5])
    assert torch.equal(k, with_queries[1]) and torch.equal(v, with_queries[2])
    text_first = joint_qk_norm_rope(streams(text_queries=False)[::-1])
    assert torch.equal(text_first[0], q)
    assert torch.equal(text_first[1], k.roll(3, 1)) and torch.equal(text_first[2], v.roll(3, 1))


def test_options_reach_every_stream():
    visual, text = streams()
    wide = [s._replace(q_weight=torch.randn(16), k_weight=torch.randn(16)) for s in (visual, text)]
    q, k, _ = joint_qk_norm_rope(wide, across_heads=True, layout="half", eps=0.1)
    options = {"across_heads": True, "layout": "half", "eps": 0.1}
    for begin, stream in zip((0, 5), wide, strict=True):
        mine = slice(begin, begin + stream.qkv.shape[1])
        of_q = norm_rope(stream.qkv[:, :, 0], stream.q_weight, *stream[3:], **options)
        of_k = norm_rope(stream.qkv[:, :, 1], stream.k_weight, *stream[3:], **options)
        assert torch.equal(q[:, mine], of_q) and torch.equal(k[:, mine], of_k)


def test_twice_differentiable():
    shapes = [(1, 2, 3, 1, 4), (4,), (4,), (1, 1, 2, 1, 4), (4,)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    table = torch.randn(2, 2, 2, dtype=torch.float64).unbind()

    def run(qkv, q_weight, k_weight, text_qkv, text_weight):
        given = [
            StreamQKV(qkv, q_weight, k_weight, *table),
            StreamQKV(text_qkv, None, text_weight),
        ]
        return joint_qk_norm_rope(given, backend="reference")

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 4, 2, 8)}, r"streams\[1\].qkv must be \(B, L, 3, H, Dh\)"),
        ({"qkv": torch.zeros(2, 3, 16)}, r"streams\[1\].qkv must be"),
        ({"qkv": torch.zeros(2, 3, 3, 2, 7)}, r"keys of streams\[1\].qkv must be .* even Dh"),
        ({"qkv": torch.zeros(1, 3, 3, 2, 8)}, "agree in samples, heads and channels"),
        ({"qkv": torch.zeros(2, 3, 3, 4, 4)}, "agree in samples, heads and channels"),
        ({"qkv": torch.zeros(2, 3, 3, 2, 8).half()}, "must have one dtype"),
        ({"qkv": torch.zeros(2, 3, 2, 2, 8)}, r"streams\[1\] has no queries"),
        ({"k_weight": torch.zeros(16)}, r"streams\[1\].k_weight must be \(8,\)"),
        ({"sin": torch.zeros(3, 4)}, "both cos and sin"),
    ],
)
def test_bad_input_is_refused(change, message):
    visual, text = streams()
    with pytest.raises(InputError, match=message):
        joint_qk_norm_rope([visual, text._replace(**change)])


def test_some_stream_must_have_queries():
    keys = streams(text_queries=False)[1]
    for given in ([], [keys]):
        with pytest.raises(InputError, match="at least one stream must have queries"):
            joint_qk_norm_rope(given)
    with pytest.raises(InputError, match="layout must be"):
        joint_qk_norm_rope(streams(), layout="split")

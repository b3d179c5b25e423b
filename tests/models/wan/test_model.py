"""Wan against diffusers' own class: tiny, with random weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import ConfigError, InputError
from apt.models import create_model
from apt.models.wan import Wan
from tests.models.wan_nets import (
    CHANNELS,
    TEXT_DIM,
    ours_of,
    relative_error,
    run_peer,
    tiny_peer,
    tiny_wan,
    wan_inputs,
)

diffusers = pytest.importorskip("diffusers")

SIZES = ["wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "wan2.2_ti2v_5b", "wan2.2_t2v_a14b"]


@settings(max_examples=12, deadline=None)
@given(
    samples=st.integers(1, 3),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    patch=st.sampled_from([(1, 2, 2), (1, 2, 2), (2, 1, 3)]),
    heads=st.sampled_from([(1, 6), (2, 12), (3, 8), (2, 10)]),
    mlp=st.sampled_from([7, 20]),
    depth=st.integers(1, 3),
    words=st.integers(1, 9),
    eps=st.sampled_from([1e-6, 1e-2]),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_diffusers(
    samples: int,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    heads: tuple[int, int],
    mlp: int,
    depth: int,
    words: int,
    eps: float,
    seed: int,
) -> None:
    peer = tiny_peer(
        seed,
        patch_size=patch,
        num_attention_heads=heads[0],
        attention_head_dim=heads[1],
        ffn_dim=mlp,
        num_layers=depth,
        eps=eps,
    )
    size = (grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2])
    lengths = [max(1, words - 3 * i) for i in range(samples)]
    x, t, c = wan_inputs(samples, size, lengths=lengths, seed=seed)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    results = []
    for model, run in ((ours_of(peer), lambda m, *a: m(*a)), (peer, run_peer)):
        latents, tokens = x.clone().requires_grad_(), c.text.tokens.clone().requires_grad_()
        velocity = run(model, latents, t, c.with_text(dataclasses.replace(c.text, tokens=tokens)))
        (velocity * upstream).sum().backward()
        weights = {name: p.grad for name, p in model.named_parameters()}
        results.append((velocity, latents.grad, tokens.grad, weights))
    ours, theirs = results
    assert ours[0].shape == x.shape
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert relative_error(a, b) < 1e-5
    assert_same_gradients(ours[3], theirs[3])


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of each, or 1e-6 of the largest: some nearly vanish, and are noise in both."""
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        limit = 1e-4 * float(gradient.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(
            ours[name], gradient, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), samples=st.integers(1, 2), frames=st.integers(1, 3))
def test_a_timestep_for_each_token(seed: int, samples: int, frames: int) -> None:
    """As Wan 2.2 TI2V: a given first frame has t = 0."""
    peer = tiny_peer(seed)
    x, _, c = wan_inputs(samples, (frames, 6, 2), lengths=[4] * samples, seed=seed)
    t = torch.rand(samples, 3 * frames, generator=torch.Generator().manual_seed(seed))
    t[:, :3] = 0
    assert relative_error(ours_of(peer)(x, t, c), run_peer(peer, x, t, c)) < 1e-5


def test_equal_timesteps_per_token_are_one_per_sample() -> None:
    model = tiny_wan()
    x, t, c = wan_inputs(3)
    rows = torch.tensor([1, 0, 1])
    t, c = t[:2], c.select(slice(0, 2))
    per_token = model(x, t[:, None].expand(2, 12), c, rows=rows)
    torch.testing.assert_close(per_token, model(x, t, c, rows=rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_bf16_is_as_close_as_diffusers(seed: int, tmp_path: Any) -> None:
    """Output and input-gradient, against the peer in fp32: at most twice its own bf16 error."""
    peer = tiny_peer(seed, num_attention_heads=3, attention_head_dim=16, num_layers=4)
    peer.save_pretrained(tmp_path)
    half = type(peer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = ours_of(peer).bfloat16()
    fp32_there = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {name for name, p in ours.named_parameters() if p.dtype == torch.float32} == fp32_there
    x, t, c = wan_inputs(2, (3, 8, 6), lengths=[7, 3], seed=seed)
    x, c = x.bfloat16(), c.to(dtype=torch.bfloat16)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def results(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        latents = x.to(dtype, copy=True).requires_grad_()
        text = c.to(dtype=dtype)
        out = (
            model(latents, t, text) if isinstance(model, Wan) else run_peer(model, latents, t, text)
        )
        assert out.dtype == dtype
        (out * upstream.to(dtype)).sum().backward()
        assert latents.grad is not None
        return out.detach().float(), latents.grad.float()

    exact = results(peer, torch.float32)
    for ours_half, peer_half, expected in zip(
        results(ours, torch.bfloat16), results(half, torch.bfloat16), exact, strict=True
    ):
        error, peer_error = (
            (half_value - expected).norm() / expected.norm()
            for half_value in (ours_half, peer_half)
        )
        assert 0 < error <= 2 * peer_error < 0.05


def test_casting_keeps_fp32_where_diffusers_does() -> None:
    model = tiny_wan()
    before = copy.deepcopy(model.state_dict())
    for cast in (model.bfloat16, model.half, lambda: model.to("cpu", torch.bfloat16)):
        cast()
    for name, value in model.state_dict().items():
        kept = any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert (value.dtype == torch.float32) == kept, name
        assert not kept or torch.equal(value, before[name])
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_autocast_leaves_the_timestep_in_fp32() -> None:
    model = tiny_wan()
    x, t, c = wan_inputs(2)
    seen: list[Tensor] = []
    embedder = model.condition_embedder.time_embedder
    embedder.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = model(x, t, c)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x, t, c)
    assert torch.equal(*seen) and seen[1].dtype == torch.float32
    assert 1e-4 < relative_error(velocity, expected) < 0.05


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes_have_diffusers_names_and_shapes(name: str) -> None:
    """At the configs of the released checkpoints, on the meta device."""
    heads, depth, mlp, channels = {
        "wan2.1_t2v_1.3b": (12, 30, 8960, 16),
        "wan2.1_t2v_14b": (40, 40, 13824, 16),
        "wan2.2_ti2v_5b": (24, 30, 14336, 48),
        "wan2.2_t2v_a14b": (40, 40, 13824, 16),
    }[name]
    with torch.device("meta"):
        model: Any = create_model(name)
        peer = diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            num_layers=depth,
            ffn_dim=mlp,
            in_channels=channels,
            out_channels=channels,
            text_dim=4096,
            freq_dim=256,
            patch_size=(1, 2, 2),
        )
    ours, theirs = model.state_dict(), peer.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    count = sum(p.numel() for p in model.parameters())
    assert count == {12: 1_418_996_800, 40: 14_288_491_584, 24: 4_999_787_712}[heads]
    assert (model.depth, model.hidden_size, model.in_channels) == (depth, heads * 128, channels)


def test_a_new_model_predicts_zero_and_still_learns() -> None:
    model = dataclasses.replace(
        tiny_wan().config, in_channels=CHANNELS, text_dim=TEXT_DIM, depth=1
    ).build()
    x, t, c = wan_inputs(1)
    velocity = model(x, t, c)
    assert not velocity.any()
    (velocity - x).square().mean().backward()
    assert model.proj_out.weight.grad is not None and model.proj_out.weight.grad.any()


def test_hidden_states_are_diffusers() -> None:
    peer = tiny_peer(num_layers=3)
    x, t, c = wan_inputs(2)
    theirs: list[Tensor] = []
    for block in peer.blocks:
        block.register_forward_hook(lambda module, args, out: theirs.append(out))
    run_peer(peer, x, t, c)
    ours = ours_of(peer).hidden_states(x, t, c, layers=[1, 2, 3])
    assert max(map(relative_error, ours, theirs)) < 1e-5


def test_text_is_projected_once_for_each_row() -> None:
    model = tiny_wan()
    x, t, c = wan_inputs(1)
    seen: list[tuple[int, ...]] = []
    model.block_list()[0].attn2.to_k.register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape))
    )
    model(x.expand(4, -1, -1, -1, -1), t, c, rows=torch.zeros(4, dtype=torch.int64))
    assert seen == [(1, 9, 24)]


def test_padding_is_zeros_and_is_attended_to() -> None:
    model = tiny_wan()
    x, t, c = wan_inputs(2, lengths=[5, 3])
    assert c.text.mask is not None
    noisy = torch.where(c.text.mask[..., None], c.text.tokens, torch.full_like(c.text.tokens, 7.0))
    velocity = model(x, t, c)
    assert torch.equal(model(x, t, Condition(EncodedText(noisy, c.text.mask))), velocity)
    zeros = c.text.tokens.masked_fill(~c.text.mask[..., None], 0.0)
    assert torch.equal(model(x, t, Condition(EncodedText(zeros))), velocity)
    only_words = ours_of(tiny_peer(), text_length=3)
    short = only_words(x[1:], t[1:], Condition(EncodedText(c.text.tokens[1:, :3])))
    assert not torch.allclose(short, velocity[1:], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 25}, "must split into 3 heads"),
        ({"hidden_size": 27}, "even"),
        ({"hidden_size": 12}, "at least 6"),
        ({"depth": 0}, "depth"),
        ({"time_dim": 7}, "time_dim must be even"),
        ({"dept": 3}, "did you mean 'depth'"),
        ({"patch_size": (1, 2)}, "patch_size"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(
            "wan2.1_t2v_1.3b", **{"hidden_size": 24, "num_heads": 3, "depth": 1, **options}
        )


def test_bad_inputs() -> None:
    model = tiny_wan()
    x, t, c = wan_inputs(2)
    with pytest.raises(InputError, match="accepts at most 32"):
        model(torch.zeros(2, CHANNELS, 33, 2, 2), t, c)
    with pytest.raises(InputError, match=r"shape \(2,\) or \(2, 12\); got timesteps \(1,\)"):
        model(x, t[:1], c)
    with pytest.raises(InputError, match="at most 9 text tokens, got 10"):
        model(x, t, Condition(EncodedText(torch.zeros(2, 10, TEXT_DIM))))

"""SD3 against diffusers' transformer and pipeline, tiny, with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import ConfigError, InputError
from apt.methods.apt import generate
from apt.models import (
    MODELS,
    create_codec,
    create_discriminator,
    create_model,
    create_text_encoder,
)
from apt.models.sd3 import SD3, SD3Config
from apt.models.sd3.checkpoint import config_to_diffusers
from apt.models.sd3.model import position_table
from tests.models.tiny_sd3 import PROMPTS, tiny_pipeline

diffusers = pytest.importorskip("diffusers")

TINY = SD3Config(
    in_channels=4,
    depth=3,
    num_heads=2,
    head_dim=6,
    text_dim=10,
    pooled_dim=5,
    dual_attention_layers=(0, 1),
    max_positions=12,
    sample_size=8,
)
VARIANTS = {
    "medium": TINY,
    "large": dataclasses.replace(TINY, dual_attention_layers=()),
    "sd3": dataclasses.replace(TINY, dual_attention_layers=(), qk_norm=False),
    "last_is_dual": dataclasses.replace(TINY, dual_attention_layers=(2,)),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))


def tiny(config: SD3Config = TINY, seed: int = 0) -> SD3:
    """No layer is left at its initial zeros."""
    model = config.build()
    generator = torch.Generator().manual_seed(seed)
    # Without their norm, larger queries and keys make a softmax that amplifies rounding errors.
    std = 0.2 if config.qk_norm else 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def peer_of(model: SD3) -> Any:
    """diffusers' class with the same weights, by the same names."""
    options = config_to_diffusers(model.config)
    options.pop("_class_name")
    peer = diffusers.SD3Transformer2DModel(**options)
    peer.load_state_dict(model.state_dict())
    return peer


def inputs(
    config: SD3Config = TINY,
    samples: int = 2,
    size: tuple[int, int] = (4, 6),
    words: int = 5,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, config.in_channels, 1, *size, generator=generator)
    t = torch.rand(samples, generator=generator)
    tokens = torch.randn(samples, words, config.text_dim, generator=generator)
    pooled = torch.randn(samples, config.pooled_dim, generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
    return x, t, Condition(EncodedText(tokens, mask, pooled))


def output_and_gradients(
    model: Any, x: Tensor, t: Tensor, c: Condition, *, theirs: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Velocity, and the gradients of a fixed functional of it by latents, tokens and pooled."""
    assert c.text.pooled is not None
    leaves = [v.to(dtype).clone().requires_grad_() for v in (x, c.text.tokens, c.text.pooled)]
    latents, tokens, pooled = leaves
    if theirs:
        velocity = model(latents[:, :, 0], tokens, pooled, 1000 * t, return_dict=False)[0]
        velocity = velocity[:, :, None]
    else:
        velocity = model(latents, t, Condition(EncodedText(tokens, None, pooled)))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (velocity.float() * upstream).sum().backward()
    gradients = [v.grad for v in leaves]
    return [v.detach().float() for v in (velocity, *gradients) if v is not None]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@st.composite
def cases(draw: st.DrawFn) -> tuple[SD3Config, int, tuple[int, int], int]:
    depth, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    config = SD3Config(
        in_channels=draw(st.integers(1, 5)),
        depth=depth,
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 12, 20])),
        patch_size=patch,
        text_dim=draw(st.integers(4, 12)),
        pooled_dim=draw(st.integers(3, 9)),
        dual_attention_layers=tuple(sorted(draw(st.sets(st.integers(0, depth - 1))))),
        qk_norm=draw(st.booleans()),
        max_positions=draw(st.integers(5, 9)),
        sample_size=patch * draw(st.integers(1, 9)),
    )
    size = (patch * draw(st.integers(1, 5)), patch * draw(st.integers(1, 5)))
    return config, draw(st.integers(1, 3)), size, draw(st.integers(1, 6))


@settings(max_examples=15, deadline=None)
@given(cases())
def test_output_and_gradients_are_diffusers(
    case: tuple[SD3Config, int, tuple[int, int], int],
) -> None:
    config, samples, size, words = case
    model = tiny(config)
    x, t, c = inputs(config, samples, size, words)
    ours = output_and_gradients(model, x, t, c, theirs=False, dtype=torch.float32)
    peer = peer_of(model)
    expected = output_and_gradients(peer, x, t, c, theirs=True, dtype=torch.float32)
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected, strict=True):
        assert relative(a, b) < 1e-5
    # Weights too: a generator is trained through them. Some have nearly no gradient by nature.
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    total = torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            error = (parameter.grad - theirs[name]).norm()
            assert error < 1e-6 * total + 1e-4 * theirs[name].norm(), name


@variants
def test_in_bf16_no_worse_than_diffusers(config: SD3Config) -> None:
    """Against diffusers in fp32 with the same rounded weights."""
    model = tiny(dataclasses.replace(config, num_heads=4, head_dim=16)).bfloat16()
    x, t, c = inputs(config, 3, (8, 6), 9)
    rounded = c.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    arguments: Any = (x.bfloat16().float(), t, rounded)
    peer = peer_of(model)
    exact = output_and_gradients(peer.float(), *arguments, theirs=True, dtype=torch.float32)
    theirs = output_and_gradients(peer.bfloat16(), *arguments, theirs=True, dtype=torch.bfloat16)
    ours = output_and_gradients(model, *arguments, theirs=False, dtype=torch.bfloat16)
    assert len(ours) == 4
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert 0 < relative(a, reference) <= 2 * relative(b, reference)


def test_positions_are_diffusers_bit_for_bit() -> None:
    """Odd tables too, and the one of 3.5 medium on a narrower model."""
    for positions, sample_size in ((192, 128), (384, 128), (7, 10)):
        config = dataclasses.replace(TINY, max_positions=positions, sample_size=sample_size)
        peer = diffusers.models.embeddings.PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=2,
            embed_dim=config.hidden_size,
            pos_embed_max_size=positions,
        )
        assert torch.equal(position_table(config), peer.pos_embed)


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd3.5_medium", 2_243_171_520), ("sd3.5_large", 8_056_627_520)]
)
def test_full_size_has_the_published_names_and_shapes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
        assert isinstance(model, SD3)
        peer = peer_of_shape(model)
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert ours == {key: value.shape for key, value in peer.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert "pos_embed.pos_embed" in ours


def peer_of_shape(model: SD3) -> Any:
    """diffusers' class as its authors' configs have it, written out."""
    medium = model.depth == 24
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24 if medium else 38,
        attention_head_dim=64,
        num_attention_heads=24 if medium else 38,
        joint_attention_dim=4096,
        caption_projection_dim=1536 if medium else 2432,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384 if medium else 192,
        dual_attention_layers=tuple(range(13)) if medium else (),
        qk_norm="rms_norm",
    )


@pytest.mark.parametrize("name", ["sd3.5_medium", "sd3.5_large"])
def test_published_weights_are_gated(name: str) -> None:
    (entry,) = MODELS.pretrained(name).values()
    assert entry.repo == f"stabilityai/stable-diffusion-{name.removeprefix('sd').replace('_', '-')}"
    assert entry.gated and entry.license == "stabilityai-ai-community"
    assert (entry.codec, entry.text_encoder) == ("sd3_vae", "sd3")


def test_one_step_is_the_stock_pipelines(tmp_path: Any) -> None:
    """From prompt to pixels, through the files of the pipeline."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    config = dataclasses.replace(
        TINY, in_channels=16, head_dim=8, text_dim=40, pooled_dim=14, max_positions=12
    )
    model = config.build()
    model.load_state_dict(pipeline.transformer.state_dict())
    z = torch.randn(3, 16, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "prompt": PROMPTS[:3],
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "latents": z[:, :, 0],
        "height": 24,
        "width": 16,
    }
    text_encoder = create_text_encoder("sd3", repo=str(tmp_path), dtype="float32")
    with torch.no_grad():
        latents = generate(model, z, Condition(text_encoder(PROMPTS[:3])))
    expected = pipeline(**options, output_type="latent").images
    assert relative(latents[:, :, 0], expected) < 1e-5
    pixels = create_codec("sd3_vae", repo=str(tmp_path)).decode(latents)
    images = pipeline(**options, output_type="pt").images
    torch.testing.assert_close(pixels[:, :, 0] / 2 + 0.5, images, rtol=0, atol=1e-5)


def test_the_vae_normalises_with_its_own_statistics(tmp_path: Any) -> None:
    vae = tiny_pipeline().vae
    vae.save_pretrained(tmp_path / "vae")
    codec = create_codec("sd3_vae", repo=str(tmp_path))
    assert (codec.channels, codec.temporal_compression) == (16, 1)
    images = torch.rand(2, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images[:, :, 0]).latent_dist.mode()
    torch.testing.assert_close(codec.encode(images)[:, :, 0], (raw - 0.0609) * 1.5305)


@variants
def test_masked_text_has_no_effect(config: SD3Config) -> None:
    """Equal to diffusers on the unmasked tokens alone, whatever follows them."""
    model = tiny(config)
    x, t, c = inputs(config, lengths=[3, 3])
    assert c.text.mask is not None and c.text.pooled is not None
    peer = peer_of(model)
    expected = peer(x[:, :, 0], c.text.tokens[:, :3], c.text.pooled, 1000 * t, return_dict=False)[0]
    assert relative(model(x, t, c)[:, :, 0], expected) < 1e-5
    noisy = torch.where(c.text.mask[..., None], c.text.tokens, torch.full_like(c.text.tokens, 7.0))
    assert torch.equal(
        model(x, t, Condition(EncodedText(noisy, c.text.mask, c.text.pooled))), model(x, t, c)
    )
    unmasked = Condition(EncodedText(c.text.tokens, None, c.text.pooled))
    assert not torch.allclose(model(x, t, unmasked), model(x, t, c), atol=1e-3)


@variants
def test_every_weight_trains_but_the_last_texts_queries(config: SD3Config) -> None:
    """Published files contain those, although nothing reads them; they are frozen."""
    model = tiny(config)
    x, t, c = inputs(config)
    model(x, t, c).square().sum().backward()
    last = "transformer_blocks.2.attn"
    dead = {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias"}
    dead |= {f"{last}.norm_added_q.weight"} if config.qk_norm else set()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == dead
    assert {name for name, p in model.named_parameters() if p.grad is None} == dead


def test_a_new_model_predicts_zero_and_still_learns() -> None:
    model = TINY.build()
    x, t, c = inputs()
    assert not model(x, t, c).any()
    assert torch.equal(*model.hidden_states(x, t, c, layers=[1, 3]))
    (model(x, t, c) - x).square().mean().backward()
    assert model.proj_out.weight.grad is not None and model.proj_out.weight.grad.any()


def test_hidden_states_are_diffusers() -> None:
    model = tiny()
    x, t, c = inputs()
    peer, seen = peer_of(model), []
    for block in peer.transformer_blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    peer(x[:, :, 0], c.text.tokens, c.text.pooled, 1000 * t)
    for a, b in zip(model.hidden_states(x, t, c, layers=[1, 2, 3]), seen, strict=True):
        assert relative(a, b) < 1e-5


def test_full_size_discriminators() -> None:
    with torch.device("meta"):
        discriminator = create_discriminator(create_model("sd3.5_large"))
    assert discriminator.layers == (17, 27, 38) and discriminator.norm.normalized_shape == (
        3 * 2432,
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 2, 4, 4), r"makes images.*got 2 frames"),
        ((4, 1, 5, 4), "height 5 is not a multiple of the patch, 2"),
        ((4, 1, 4, 0), "width 0 is not a multiple of the patch, 2"),
        ((4, 1, 26, 4), r"\(13, 2\) tokens.*at most 12 along each, 24 latents"),
    ],
)
def test_latents_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    _, t, c = inputs()
    with pytest.raises(InputError, match=message):
        tiny()(torch.zeros(2, *shape), t, c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_heads": 1}, "must be a multiple of 4"),
        ({"num_heads": 4, "head_dim": 7}, "head_dim must be even with qk_norm"),
        ({"dual_attention_layers": (3,)}, r"in 0\.\.2"),
        ({"dual_attention_layers": (1, 0)}, "must be in increasing order"),
    ],
)
def test_configs_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **options)

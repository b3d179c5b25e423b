"""SD3 against diffusers' transformer and pipeline, tiny, with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.kernels.attention import attention_backend
from apt.kernels.backends import kernel_backend
from apt.models import (
    MODELS,
    TextCondition,
    create_codec,
    create_discriminator,
    create_model,
    create_text_encoder,
    generate,
)
from apt.models.conversions.sd3 import config_to_diffusers
from apt.models.protocols import Backbone
from apt.models.sd3 import SD3, SD3Config, position_table
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
) -> tuple[Tensor, Tensor, TextCondition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, config.in_channels, 1, *size, generator=generator)
    t = torch.rand(samples, generator=generator)
    tokens = torch.randn(samples, words, config.text_dim, generator=generator)
    pooled = torch.randn(samples, config.pooled_dim, generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
    return x, t, TextCondition(tokens, mask, pooled)


def output_and_gradients(
    model: Any, x: Tensor, t: Tensor, c: TextCondition, *, theirs: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Velocity, and the gradients of a fixed functional of it by latents, tokens and pooled."""
    assert c.pooled is not None
    leaves = [v.to(dtype).clone().requires_grad_() for v in (x, c.tokens, c.pooled)]
    latents, tokens, pooled = leaves
    if theirs:
        velocity = model(latents[:, :, 0], tokens, pooled, 1000 * t, return_dict=False)[0]
        velocity = velocity[:, :, None]
    else:
        velocity = model(latents, t, TextCondition(tokens, None, pooled))
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
        assert isinstance(model, SD3) and isinstance(model, Backbone)
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
        latents = generate(model, z, text_encoder(PROMPTS[:3]))
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
def test_samples_do_not_see_each_other(config: SD3Config) -> None:
    model = tiny(config)
    x, t, c = inputs(config, 3, lengths=[5, 2, 3])
    together = model(x, t, c)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], c.select(slice(i, i + 1)))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@variants
def test_masked_text_is_not_there(config: SD3Config) -> None:
    """Equal to diffusers on the words alone, whatever stands behind them."""
    model = tiny(config)
    x, t, c = inputs(config, lengths=[3, 3])
    assert c.mask is not None and c.pooled is not None
    peer = peer_of(model)
    expected = peer(x[:, :, 0], c.tokens[:, :3], c.pooled, 1000 * t, return_dict=False)[0]
    assert relative(model(x, t, c)[:, :, 0], expected) < 1e-5
    noisy = torch.where(c.mask[..., None], c.tokens, torch.full_like(c.tokens, 7.0))
    assert torch.equal(model(x, t, TextCondition(noisy, c.mask, c.pooled)), model(x, t, c))
    unmasked = TextCondition(c.tokens, None, c.pooled)
    assert not torch.allclose(model(x, t, unmasked), model(x, t, c), atol=1e-3)


@variants
def test_shared_rows_equal_repeated_rows(config: SD3Config) -> None:
    """Values and all gradients, with rows that are shared, out of order, and left out."""
    rows = torch.tensor([2, 0, 2, 2, 0])
    x, t, c = inputs(config, 3, lengths=[5, 1, 4])
    x = torch.cat([x, x.flip(0)])[:5] + torch.arange(5.0).view(-1, 1, 1, 1, 1) / 10
    results = []
    for shared in (True, False):
        model = tiny(config)
        latents, tokens = x.clone().requires_grad_(), c.tokens.clone().requires_grad_()
        text = dataclasses.replace(c, tokens=tokens)
        if shared:
            velocity = model(latents, t, text, rows=rows)
        else:
            velocity = model(latents, t[rows], text.select(rows))
        velocity.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((velocity, latents.grad, tokens.grad, grads))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert ours[2] is not None and not ours[2][1].any(), "a row that no sample uses"
    assert ours[3].keys() == theirs[3].keys()
    for name, value in ours[3].items():
        scale = float(theirs[3][name].abs().max())
        torch.testing.assert_close(value, theirs[3][name], rtol=1e-3, atol=1e-4 * scale)


def without_gradient(model: SD3) -> set[str]:
    return {
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    }


@variants
def test_every_weight_trains_but_the_last_texts_queries(config: SD3Config) -> None:
    """Published files hold those, though nothing reads them; they are frozen."""
    model = tiny(config)
    x, t, c = inputs(config)
    model(x, t, c).square().sum().backward()
    last = "transformer_blocks.2.attn"
    dead = {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias"}
    dead |= {f"{last}.norm_added_q.weight"} if config.qk_norm else set()
    assert without_gradient(model) == dead
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == dead


def test_a_new_model_predicts_zero_and_still_learns() -> None:
    model = TINY.build()
    x, t, c = inputs()
    assert not model(x, t, c).any()
    assert torch.equal(*model.hidden_states(x, t, c, layers=[1, 3]))
    (model(x, t, c) - x).square().mean().backward()
    assert model.proj_out.weight.grad is not None and model.proj_out.weight.grad.any()


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_gives_the_same_gradients(shared: bool) -> None:
    rows = torch.tensor([1, 1, 0]) if shared else None
    x, t, c = inputs(lengths=[5, 3])
    x = torch.cat([x, x[:1] + 1])[: 3 if shared else 2]
    results, stored = [], []
    for enabled in (False, True):
        model = tiny()
        model.set_checkpointing(enabled)
        latents = x.clone().requires_grad_()
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            velocity = model(latents, t, c, rows=rows)
        velocity.square().sum().backward()
        results.append([velocity, latents.grad, *(p.grad for p in model.parameters())])
        stored.append(sum(kept))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert stored[1] < stored[0] / 3


def test_hidden_states_are_those_of_the_forward_pass() -> None:
    model = tiny()
    x, t, c = inputs()
    seen: list[Tensor] = []
    for block in model.block_list():
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    model(x, t, c)
    assert len(seen) == 3
    states = model.hidden_states(x, t, c, layers=[1, 3])
    assert torch.equal(states[0], seen[0]) and torch.equal(states[1], seen[2])
    assert states[0].shape == (2, 2 * 3, 12)
    seen.clear()
    model.hidden_states(x, t, c, layers=[2])
    assert len(seen) == 2, "blocks after the last one asked for are not run"


def test_hidden_states_are_diffusers() -> None:
    model = tiny()
    x, t, c = inputs()
    peer, seen = peer_of(model), []
    for block in peer.transformer_blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    peer(x[:, :, 0], c.tokens, c.pooled, 1000 * t)
    for a, b in zip(model.hidden_states(x, t, c, layers=[1, 2, 3]), seen, strict=True):
        assert relative(a, b) < 1e-5


@variants
@pytest.mark.parametrize("last", [1, 2, 3])
def test_keep_hidden_states_deletes_only_what_is_not_run(config: SD3Config, last: int) -> None:
    whole, kept = tiny(config), tiny(config)
    kept.keep_hidden_states(last)
    x, t, c = inputs(config)
    assert kept.depth == len(kept.block_list()) == last
    (expected,) = whole.hidden_states(x, t, c, layers=[last])
    (hidden,) = kept.hidden_states(x, t, c, layers=[last])
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)
    hidden.square().sum().backward()
    assert without_gradient(kept) == set()
    assert all(p.requires_grad for p in kept.parameters())


@pytest.mark.parametrize("layers", [None, (1,), (1, 2)])
def test_as_a_discriminator(layers: tuple[int, ...] | None) -> None:
    """Gradients reach every weight, and the latents that a generator would have made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = create_discriminator(tiny(), layers=layers)
    judge.backbone.set_checkpointing(True)
    x, t, c = inputs(samples=2)
    x = torch.cat([x, x + 0.01, -x]).requires_grad_()
    logits, _ = judge(x, t, c, rows=torch.arange(2).repeat(3))
    assert logits.shape == (6,) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert x.grad is not None and x.grad.flatten(1).abs().amax(1).gt(0).all()
    assert not [name for name, p in judge.named_parameters() if p.grad is None]


def test_full_size_discriminators() -> None:
    with torch.device("meta"):
        judge = create_discriminator(create_model("sd3.5_large"))
    assert judge.layers == (17, 27, 38) and judge.norm.normalized_shape == (3 * 2432,)


def test_on_the_fused_kernels() -> None:
    """Their interpreter where there is no GPU."""
    pytest.importorskip("triton")
    config = dataclasses.replace(TINY, depth=2, dual_attention_layers=(0,))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, t, c = inputs(samples=3, lengths=[5, 2, 3])
    x, t, c = x.to(device), t.to(device), c.to(device)
    rows = torch.tensor([2, 0, 2], device=device)
    results = []
    for backend in ("triton", "reference"):
        model = tiny(config).to(device)
        latents = x.clone().requires_grad_()
        with kernel_backend(backend):
            velocity = model(latents, t, c, rows=rows)
            velocity.square().sum().backward()
        results.append([velocity, latents.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-5


def test_exact_r1_runs_on_reference_ops() -> None:
    """Second derivatives, as APT Eq. 8 needs."""
    judge = create_discriminator(tiny())
    x, t, c = inputs()
    x.requires_grad_()
    with kernel_backend("reference"), attention_backend("_native_math"):
        (gradient,) = torch.autograd.grad(judge(x, t, c).logits.sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert judge.backbone.pos_embed.proj.weight.grad is not None


def test_under_autocast() -> None:
    model = tiny()
    x, t, c = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x, t, c)
    assert 0 < relative(velocity.float(), model(x, t, c)) < 0.05


def test_compiles_without_graph_breaks() -> None:
    model = tiny()
    x, t, c = inputs(samples=3, lengths=[5, 2, 3])
    rows = torch.tensor([2, 0, 1])
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, t, c, rows=rows), model(x, t, c, rows=rows), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 2, 4, 4), r"makes images.*got 2 frames"),
        ((4, 1, 5, 4), "height 5 is not a multiple of the patch, 2"),
        ((4, 1, 4, 0), "width 0 is not a multiple of the patch, 2"),
        ((4, 1, 26, 4), r"\(13, 2\) tokens.*up to 12 along each, 24 latents"),
        ((5, 1, 4, 4), r"latents must be \(B, 4, 1, H, W\)"),
        ((4, 4, 4), r"latents must be \(B, 4, 1, H, W\)"),
    ],
)
def test_latents_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    _, t, c = inputs()
    with pytest.raises(InputError, match=message):
        tiny()(torch.zeros(2, *shape), t, c)


def test_conditions_that_do_not_fit() -> None:
    model = tiny()
    x, t, c = inputs()
    assert c.pooled is not None
    with pytest.raises(InputError, match="needs text tokens of 10 dimensions, got 3"):
        model(x, t, TextCondition(c.tokens[..., :3], None, c.pooled))
    with pytest.raises(InputError, match="pooled text vector of 5 dimensions, got none"):
        model(x, t, TextCondition(c.tokens))
    with pytest.raises(InputError, match=r"pooled text vector of 5 dimensions, got \(2, 4\)"):
        model(x, t, TextCondition(c.tokens, None, c.pooled[:, :4]))
    with pytest.raises(InputError, match="pass `rows` to share them"):
        model(x, t[:1], c)
    with pytest.raises(InputError, match=r"layers must lie in 1\.\.3"):
        model.hidden_states(x, t, c, layers=[4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_heads": 1}, "must be a multiple of 4"),
        ({"num_heads": 4, "head_dim": 7}, "head_dim must be even with qk_norm"),
        ({"dual_attention_layers": (3,)}, r"lie in 0\.\.2"),
        ({"dual_attention_layers": (1, 0)}, "must rise"),
    ],
)
def test_configs_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **options)

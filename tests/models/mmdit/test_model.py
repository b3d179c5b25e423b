from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import ConfigError
from apt.flow import to_sample
from apt.kernels.modulated_norm import take_rows
from apt.methods.apt import generate
from apt.models import create_model
from apt.models.mmdit import MMDiT, MMDiTConfig
from apt.models.mmdit.model import TimestepEmbedding
from tests.models.nets import CHANNELS, POOLED_DIM, TEXT_DIM, inputs, tiny_mmdit

VARIANTS: dict[str, dict[str, Any]] = {
    "dual": {},
    "one_dual_block": {"num_dual_blocks": 1},
    "shared_weights": {"num_dual_blocks": 0},
    "block_modulation": {"modulation": "block", "num_dual_blocks": 2},
    "sample_prediction": {"prediction": "sample", "num_dual_blocks": 1, "rope_theta": 10.0},
    "absolute_positions": {"absolute_positions": True, "num_dual_blocks": 0},
    "pooled_text": {"pooled_dim": POOLED_DIM, "num_dual_blocks": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def angles_of(position: tuple[int, int, int], channels: int, theta: float) -> list[float]:
    """The angle of each pair of channels."""
    spatial = channels // 6 * 2
    sizes = (channels - 2 * spatial, spatial, spatial)
    return [
        place * theta ** (-i / size)
        for size, place in zip(sizes, position, strict=True)
        for i in range(0, size, 2)
    ]


def rotate(x: Tensor, position: tuple[int, int, int], theta: float) -> Tensor:
    """One head's channels of one token, turned pair by pair."""
    out = x.clone()
    for pair, angle in enumerate(angles_of(position, len(x), theta)):
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def reference(model: MMDiT, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """The velocity of one sample x (C, T, H, W), t (), tokens (S, E), in fp64 and plain loops."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    heads, d = config.num_heads, config.hidden_size

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value * torch.sigmoid(value)

    pt, ph, pw = config.patch_size
    grid = (x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw)
    positions = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]

    def box(p: tuple[int, int, int]) -> tuple[slice, ...]:
        ranges = zip(p, config.patch_size, strict=True)
        return (slice(None), *(slice(i * size, (i + 1) * size) for i, size in ranges))

    visual = linear("patch_in", torch.stack([x.double()[box(p)].flatten() for p in positions]))
    if config.absolute_positions:
        places = torch.tensor([angles_of(p, d, 100.0) for p in positions], dtype=torch.float64)
        visual = visual + torch.cat([places.cos(), places.sin()], dim=1)
    text = linear("text_in", tokens.double())
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = 1000 * t.double() * frequencies
    sinusoid = torch.cat([angles.cos(), angles.sin()])
    time = linear("time_in.linear2", silu(linear("time_in.linear1", sinusoid)))
    if config.pooled_dim:
        time = time + linear("pooled_in.2", silu(linear("pooled_in.0", pooled.double())))
    time = silu(time)

    for i in range(model.depth):
        streams = [f"blocks.{i}.streams.0", f"blocks.{i}.streams.1"]
        if f"{streams[1]}.qkv.weight" not in w:
            streams[1] = streams[0]
        keys, values, queries, tables = [], [], [], []
        for s, (name, h) in enumerate(zip(streams, (visual, text), strict=True)):
            if config.modulation == "shared":
                table = linear("time_modulation", time) + w[f"{name}.modulation_bias"]
            else:
                table = linear(f"{name}.modulation", time)
            shift, scale = table[:d], table[d : 2 * d]
            qkv = linear(f"{name}.qkv", rms(h) * (1 + scale) + shift)
            for token, row in enumerate(qkv):
                # The last block's text, if its weights are its own, gives keys and values only.
                *asked, k, v = row.reshape(-1, heads, d // heads)
                q = rms(asked[0]) * w[f"{name}.q_norm"] if asked else torch.zeros_like(k)
                k = rms(k) * w[f"{name}.k_norm"]
                if s == 0:
                    place = positions[token]
                    q = torch.stack([rotate(one, place, config.rope_theta) for one in q])
                    k = torch.stack([rotate(one, place, config.rope_theta) for one in k])
                queries.append(q)
                keys.append(k)
                values.append(v)
            tables.append(table)
        attended = []
        for q in queries:
            out = []
            for head in range(heads):
                scores = torch.stack([q[head] @ k[head] for k in keys]) / math.sqrt(d // heads)
                share = scores.softmax(0)
                out.append(sum(p * v[head] for p, v in zip(share, values, strict=True)))
            attended.append(torch.cat(out))
        split = len(visual)
        halves = torch.stack(attended[:split]), torch.stack(attended[split:])
        updated = []
        for name, h, a, table in zip(streams, (visual, text), halves, tables, strict=True):
            if f"{name}.out.weight" not in w:
                updated.append(h)
                continue
            gate, shift, scale, gate2 = table[2 * d :].chunk(4)
            h = h + gate * linear(f"{name}.out", a)
            inner = linear(f"{name}.mlp_in", rms(h) * (1 + scale) + shift)
            inner = torch.nn.functional.gelu(inner, approximate="tanh")
            updated.append(h + gate2 * linear(f"{name}.mlp_out", inner))
        visual, text = updated

    shift, scale = linear("final_modulation", time).chunk(2)
    patches = linear("patch_out", rms(visual) * (1 + scale) + shift)
    out = torch.zeros_like(x, dtype=torch.float64)
    for p, patch in zip(positions, patches, strict=True):
        out[box(p)] = patch.reshape(x.shape[0], pt, ph, pw)
    if config.prediction == "sample":
        out = (x.double() - out) / max(float(t), 0.05)
    return out


@variants
def test_forward_is_the_written_out_model(options: dict[str, Any]) -> None:
    model = tiny_mmdit(depth=2, **options)
    x, t, c = inputs(2, (2, 4, 2))
    velocity = model(x, t, c)
    assert velocity.shape == x.shape and velocity.dtype == torch.float32
    for i in range(2):
        assert c.text.pooled is not None
        expected = reference(model, x[i], t[i], c.text.tokens[i], c.text.pooled[i])
        torch.testing.assert_close(velocity[i].double(), expected, rtol=1e-3, atol=1e-4)


def test_temporal_patches() -> None:
    model = tiny_mmdit(patch_size=(2, 1, 2), depth=1)
    x, t, c = inputs(2, (4, 3, 2))
    assert model.token_grid((4, 3, 2)) == (2, 3, 1)
    assert c.text.pooled is not None
    expected = reference(model, x[0], t[0], c.text.tokens[0], c.text.pooled[0])
    torch.testing.assert_close(model(x, t, c)[0].double(), expected, rtol=1e-3, atol=1e-4)


@variants
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    model = tiny_mmdit(**options)
    x, t, c = inputs(2, lengths=[3, 3])
    assert c.text.mask is not None
    short = model(x, t, Condition(EncodedText(c.text.tokens[:, :3], None, c.text.pooled)))
    torch.testing.assert_close(model(x, t, c), short, rtol=1e-4, atol=1e-5)
    noisy = torch.where(c.text.mask[..., None], c.text.tokens, torch.full_like(c.text.tokens, 7.0))
    assert torch.equal(
        model(x, t, Condition(EncodedText(noisy, c.text.mask, c.text.pooled))), model(x, t, c)
    )


def test_position_matters_on_every_axis() -> None:
    model = tiny_mmdit()
    x, t, c = inputs(1, (4, 8, 8))
    for axis, step in ((2, 1), (3, 2), (4, 2)):
        rolled = model(x.roll(step, axis), t, c).roll(-step, axis)
        assert not torch.allclose(rolled, model(x, t, c), atol=1e-3)


def test_gradients_of_shared_rows_add_up_in_a_fixed_order() -> None:
    """On many threads as on one: a resumed run must equal an uninterrupted one bit for bit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(32).repeat(3)
    values = torch.randn(32, 6, 192, generator=generator)
    upstream = torch.randn(96, 6, 192, generator=generator)
    assert torch.equal(take_rows(values, rows), values[rows])

    def gradient(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        leaf = values.clone().requires_grad_()
        take_rows(leaf, rows).backward(upstream)
        assert leaf.grad is not None
        return leaf.grad

    before = torch.get_num_threads()
    try:
        serial = gradient(1)
        assert all(torch.equal(gradient(4), serial) for _ in range(50))
    finally:
        torch.set_num_threads(before)


def test_sample_prediction_at_pure_noise_is_the_networks_output() -> None:
    """G(z) = z - v is what the last layer emits, and at small t nothing explodes."""
    model = tiny_mmdit(prediction="sample")
    z, _, c = inputs(2)
    emitted: list[Tensor] = []
    model.patch_out.register_forward_hook(lambda module, args, out: emitted.append(out))
    sample = generate(model, z, c)
    blocks = emitted[0].unflatten(2, (CHANNELS, 1, 2, 2)).unflatten(1, (2, 2, 3))
    expected = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(z.shape)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)


def test_sample_prediction_near_data_is_the_input() -> None:
    """x - t v is exact down to t = 0.05; below that, the prediction matters less and less."""
    model = tiny_mmdit(prediction="sample")
    for level in (0.0, 0.02, 0.06, 0.15):
        x, _, c = inputs(1)
        t = torch.tensor([level])
        assert c.text.pooled is not None
        expected = reference(model, x[0], t[0], c.text.tokens[0], c.text.pooled[0])
        velocity = model(x, t, c)
        torch.testing.assert_close(velocity[0].double(), expected, rtol=1e-3, atol=1e-3)
        moved = (to_sample(x, velocity, t) - x).abs().max()
        assert (moved == 0) == (level == 0)


def test_sample_prediction_returns_fp32_velocities_in_half_precision() -> None:
    model = tiny_mmdit(prediction="sample").bfloat16()
    x, t, c = inputs(1)
    assert model(x.bfloat16(), t, c.to(dtype=torch.bfloat16)).dtype == torch.float32


def test_a_new_model_predicts_zero_and_still_learns() -> None:
    """Blocks start as identities: only the last layer has a gradient at first."""
    model = create_model(
        "mmdit_small", in_channels=CHANNELS, hidden_size=24, depth=2, num_heads=2, text_dim=TEXT_DIM
    )
    assert isinstance(model, MMDiT)
    x, t, c = inputs(1)
    assert not model(x, t, c).any()
    hidden = model.hidden_states(x, t, c, layers=[1, 2])
    assert torch.equal(*hidden)
    (model(x, t, c) - x).square().mean().backward()
    assert model.patch_out.weight.grad is not None and model.patch_out.weight.grad.any()


def test_timestep_embedding_is_diffusers() -> None:
    embedding = TimestepEmbedding(12)
    seen: list[Tensor] = []
    embedding.linear1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    t = torch.tensor([0.0, 0.001, 0.3, 1.0])
    assert embedding(t, dtype=torch.float32).shape == (4, 12)
    expected = get_timestep_embedding(
        1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=10_000
    )
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_apt_8b_has_the_papers_shape() -> None:
    with torch.device("meta"):
        model = create_model("apt_8b")
    assert isinstance(model, MMDiT)
    assert (model.depth, len(model.block_list()), model.hidden_size) == (36, 36, 3072)
    assert model.config.num_heads == 24 and model.config.patch_size == (1, 2, 2)
    d, text, patch = 3072, 4096, 16 * 4
    block = 2 * (
        6 * d  # modulation bias
        + (d * 3 * d + 3 * d)  # q, k, v
        + 2 * 128  # qk-norm
        + (d * d + d)  # output
        + (d * 4 * d + 4 * d)  # MLP
        + (4 * d * d + d)
    )
    outside = (
        (patch * d + d)
        + (text * d + d)
        + (256 * d + d + d * d + d)  # timestep
        + (d * 6 * d + 6 * d)  # shared modulation
        + (d * 2 * d + 2 * d)  # last modulation
        + (d * patch + patch)
    )
    # Text of the last block: query, its norm, output and MLP.
    unused = 2 * (d * d + d) + 128 + (d * 4 * d + 4 * d) + (4 * d * d + d)
    count = sum(p.numel() for p in model.parameters())
    assert count == 36 * block + outside - unused == 8_161_403_840
    assert model.token_grid((13, 90, 160)) == (13, 45, 80)


@pytest.mark.parametrize(("name", "millions"), [("mmdit_digits", 6), ("mmdit_small", 310)])
def test_presets_have_the_size_that_they_say(name: str, millions: int) -> None:
    with torch.device("meta"):
        model: Any = create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 25}, "must split into 3 heads"),
        ({"hidden_size": 27}, "even"),
        ({"hidden_size": 12}, "at least 6"),
        ({"depth": 0}, "depth"),
        ({"dept": 3}, "did you mean 'depth'"),
        ({"depth": "3"}, "must be int"),
        ({"depth": True}, "must be int"),
        ({"modulation": "both"}, "modulation"),
        ({"patch_size": (1, 2)}, "patch_size"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_mmdit(**options)


def test_config_survives_json() -> None:
    model = create_model("mmdit_digits", patch_size=[1, 2, 2], depth=1)
    assert model.config.patch_size == (1, 2, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.depth = 1
    assert isinstance(MMDiTConfig(hidden_size=24, num_heads=2, depth=1).build(), MMDiT)

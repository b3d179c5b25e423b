from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.models import Discriminator, create_discriminator, create_model
from apt.models.discriminator import paper_layers
from tests.models.nets import POOLED_DIM, inputs, tiny_mmdit


def tiny(**options: Any) -> Discriminator:
    """Over a backbone whose last block shares its weights; no layer is at its initial values."""
    backbone = tiny_mmdit(num_dual_blocks=1, pooled_dim=POOLED_DIM)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_discriminator(backbone, **options)


def test_the_papers_layers() -> None:
    assert paper_layers(36) == (16, 26, 36)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (6, (3, 4, 6)), (30, (13, 22, 30))],
)
def test_layers_scale_with_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert paper_layers(depth) == layers


@given(st.integers(1, 200))
def test_layers_are_rising_and_end_at_the_last_block(depth: int) -> None:
    layers = paper_layers(depth)
    assert layers[-1] == depth and layers[0] >= 1
    assert list(layers) == sorted(set(layers)) and len(layers) == min(depth, 3)


def test_apt_8b_gets_the_papers_heads() -> None:
    with torch.device("meta"):
        discriminator = create_discriminator(create_model("apt_8b"))
    assert discriminator.layers == (16, 26, 36) and len(discriminator.heads) == 3
    assert discriminator.norm.normalized_shape == (3 * 3072,)
    assert discriminator.project.out_features == 1


@pytest.mark.parametrize("head", ["attention", "conv3d"])
def test_a_logit_for_each_sample(head: str) -> None:
    discriminator = tiny(head=head)
    x, t, c = inputs(3, lengths=[5, 2, 3])
    logits, features = discriminator(x, t, c)
    assert logits.shape == (3,) and logits.dtype == torch.float32
    assert [f.shape for f in features] == [(3, 24)] * 3
    for i in range(3):
        alone = discriminator(x[i : i + 1], t[i : i + 1], c.select(slice(i, i + 1))).logits
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_it_is_the_backbone_with_heads() -> None:
    """Against the backbone before it was cut: concatenate, normalise, project."""
    backbone = tiny_mmdit()
    discriminator = create_discriminator(backbone, layers=(1, 3))
    x, t, c = inputs(2)
    states = backbone.hidden_states(x, t, c, layers=(1, 3))
    grid = backbone.token_grid((2, 4, 6))
    features = [head(state, grid) for head, state in zip(discriminator.heads, states, strict=True)]
    row = torch.cat(features, dim=1)
    centred = row - row.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + discriminator.norm.eps).sqrt()
    normed = normed * discriminator.norm.weight + discriminator.norm.bias
    expected = normed @ discriminator.project.weight[0] + discriminator.project.bias
    output = discriminator(x, t, c)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(output.features, features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["attention", "conv3d"])
def test_one_forward_of_three_groups_equals_three(head: str) -> None:
    discriminator = tiny(head=head)
    real, t, c = inputs(3, lengths=[5, 2, 3])
    perturbed, fake = real + 0.1 * torch.randn_like(real), inputs(3, seed=9)[0]
    rows = torch.arange(3)
    together = discriminator(
        torch.cat([real, perturbed[:2], fake]), t, c, rows=torch.cat([rows, rows[:2], rows])
    )
    apart = [
        discriminator(x, t[: len(x)], c.select(slice(0, len(x))))
        for x in (real, perturbed[:2], fake)
    ]
    expected = torch.cat([one.logits for one in apart])
    torch.testing.assert_close(together.logits, expected, rtol=1e-4, atol=1e-5)
    for i, feature in enumerate(together.features):
        torch.testing.assert_close(
            feature, torch.cat([one.features[i] for one in apart]), rtol=1e-4, atol=1e-5
        )


def test_a_pair_differs_by_its_latents_alone() -> None:
    """The same x under the same row has the same logit; another row's t or c changes it."""
    discriminator = tiny()
    x, t, c = inputs(2)
    pair = discriminator(
        x[:1].expand(2, -1, -1, -1, -1),
        t[:1],
        c.select(slice(0, 1)),
        rows=torch.zeros(2, dtype=torch.int64),
    )
    torch.testing.assert_close(pair.logits[0], pair.logits[1], rtol=1e-6, atol=1e-6)
    logits = discriminator(x, t, c).logits
    assert not torch.allclose(discriminator(x, t.flip(0), c).logits, logits, atol=1e-4)
    assert not torch.allclose(
        discriminator(x, t, c.select(torch.tensor([1, 0]))).logits, logits, atol=1e-4
    )


def test_x_is_never_noised() -> None:
    discriminator = tiny()
    seen: list[Tensor] = []
    discriminator.backbone.patch_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))  # type: ignore[union-attr]
    x, _, c = inputs(1)
    for t in (0.0, 0.5, 1.0):
        discriminator(x, torch.tensor([t]), c)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0].flatten().sort().values, x.flatten().sort().values)


@pytest.mark.parametrize("head", ["attention", "conv3d"])
@pytest.mark.parametrize("layers", [None, (2,), (2, 3)])
def test_every_weight_trains(head: str, layers: tuple[int, ...] | None) -> None:
    discriminator = tiny(head=head, layers=layers)
    x, t, c = inputs(3)
    x.requires_grad_()
    discriminator(x, t, c).logits.sum().backward()
    dead = [n for n, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert x.grad is not None and all(g.any() for g in x.grad)


def test_depth_and_number_of_heads_are_configurable() -> None:
    discriminator = tiny(layers=(2,))
    assert len(discriminator.heads) == 1 and discriminator.backbone.depth == 2
    assert discriminator.project.in_features == 24
    names = discriminator.backbone.state_dict()  # type: ignore[attr-defined]
    assert any(name.startswith("blocks.1.") for name in names)
    assert not any(name.startswith("blocks.2.") for name in names)


def test_the_backbone_keeps_its_weights() -> None:
    backbone = tiny_mmdit(num_dual_blocks=1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    discriminator = create_discriminator(backbone)
    kept = discriminator.backbone.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    gone = {name.split(".")[0] for name in before.keys() - kept.keys()}
    assert gone == {"final_modulation", "patch_out"}


def test_it_takes_a_copy_unless_it_is_given_the_backbone() -> None:
    backbone = tiny_mmdit()
    x, t, c = inputs(2)
    before = backbone(x, t, c)
    discriminator = create_discriminator(backbone, layers=(1, 2))
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.zero_()
    assert torch.equal(backbone(x, t, c), before)
    handed_over = create_discriminator(backbone, layers=(1, 2), copy=False)
    assert handed_over.backbone is backbone and backbone.depth == 2


@pytest.mark.parametrize("wrong", [{"head": "attn"}, {"layers": (1, 4)}, {"layers": (1, 2.5)}])
def test_a_backbone_is_whole_after_a_wrong_argument(wrong: dict[str, Any]) -> None:
    backbone = tiny_mmdit()
    names = backbone.state_dict().keys()
    for build in (Discriminator, create_discriminator):
        with pytest.raises(InputError):
            build(backbone, **wrong)
    with pytest.raises(InputError):
        create_discriminator(backbone, copy=False, **wrong)
    assert backbone.depth == 3 and backbone.state_dict().keys() == names


def test_heads_are_where_the_backbone_is() -> None:
    discriminator = create_discriminator(tiny_mmdit().to("meta"))
    assert {p.device.type for p in discriminator.parameters()} == {"meta"}


def test_head_parameters_are_all_but_the_backbone() -> None:
    discriminator = tiny()
    heads = {id(p) for p in discriminator.head_parameters()}
    others = {id(p) for name, p in discriminator.named_parameters() if name.startswith("backbone.")}
    assert not heads & others
    assert heads | others == {id(p) for p in discriminator.parameters()}


@pytest.mark.parametrize("head", ["attention", "conv3d"])
def test_heads_and_logits_are_fp32_under_autocast(head: str) -> None:
    discriminator = tiny(head=head)
    x, t, c = inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        states = discriminator.backbone.hidden_states(x, t, c, layers=discriminator.layers)
        output = discriminator(x, t, c)
    assert output.logits.dtype == torch.float32
    assert all(f.dtype == torch.float32 for f in output.features)
    # The heads themselves compute in fp32: from the same bf16 tokens they give the fp32 result.
    grid = discriminator.backbone.token_grid((2, 4, 6))
    features = [h(s.float(), grid) for h, s in zip(discriminator.heads, states, strict=True)]
    logits = discriminator.project(discriminator.norm(torch.cat(features, dim=-1)))[:, 0]
    torch.testing.assert_close(output.logits, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 2)}, r"must lie in 1\.\.3"),
        ({"layers": (1, 4)}, r"must lie in 1\.\.3"),
        ({"layers": (2, 1)}, "in increasing order"),
        ({"layers": (1, 1)}, "in increasing order"),
        ({"layers": ()}, "in increasing order"),
        ({"layers": (1, 2.5)}, "must be integers"),
        ({"layers": (1, "last")}, "must be integers"),
    ],
)
def test_bad_layers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_unknown_heads() -> None:
    with pytest.raises(InputError, match="did you mean 'attention'"):
        tiny(head="attn")


def test_models_are_shown_in_a_line() -> None:
    with torch.device("meta"):
        backbone = create_model("apt_8b", dtype=torch.bfloat16)
        discriminator = create_discriminator(create_model("mmdit_small", depth=2), layers=(2,))
    assert repr(backbone).endswith("in_channels=16, 8.16 B parameters, bfloat16 on meta)")
    text = repr(discriminator)
    assert text.startswith("Discriminator(MMDiT(depth=2,") and "\n" not in text
    assert "AttentionHead after blocks [2], " in text and text.endswith("float32 on meta)")

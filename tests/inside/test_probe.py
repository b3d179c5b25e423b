"""A projection per layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apt.errors import InputError
from apt.inside import probe_layers
from apt.inside.latents import encode, to_tokens
from apt.models import create_model
from apt.models.transformer import DiffusionTransformer, Tokens
from apt.pipeline import OneStepPipeline
from tests.models.backbones import CASES, Case
from tests.tiny import tiny_bundle

PROMPTS = ["a red seven moving left", "a blue two moving up"]


def test_projections_are_the_least_squares_of_the_tokens() -> None:
    pipeline = OneStepPipeline(tiny_bundle())
    encoder, encoded = pipeline.bundle.text_encoder, []
    assert isinstance(encoder, nn.Module)
    hook = encoder.register_forward_pre_hook(lambda _, prompts: encoded.extend(prompts[0]))
    result = probe_layers(
        pipeline, PROMPTS, shown=PROMPTS, num_samples=5, num_held_out=3, batch_size=2
    )
    hook.remove()
    assert encoded == PROMPTS, "each once"
    backbone = pipeline.bundle.backbone
    c, z = (
        encode(pipeline, [PROMPTS[i % 2] for i in range(5)]),
        pipeline.noise(range(5)),
    )
    t = torch.ones(5)
    with torch.no_grad():
        hidden = backbone.hidden_states(z, t, c, layers=(1, 2))
        target = to_tokens(z - backbone(z, t, c), backbone.token_grid(z.shape[2:])).flatten(0, 1)
    assert [layer.layer for layer in result.layers] == [1, 2]
    for layer, h_BLD in zip(result.layers, hidden, strict=True):
        h = torch.cat([h_BLD.flatten(0, 1), torch.ones(len(target), 1)], dim=1).double()
        best = torch.linalg.lstsq(h, target.double()).solution
        least = (h @ best - target).square().mean()
        found = h[:, :-1].float() @ layer.weight.T + layer.bias
        assert (found - target).square().mean() < 1.001 * least
        assert layer.error > 0.9 * least / target.var()
    # Two layers and the model's own, of each prompt.
    assert [tuple(pixels.shape) for pixels in result.pixels] == [(3, 3, 9, 32, 32)] * 2
    assert not torch.equal(result.pixels[0][1], result.pixels[0][2])


def test_a_model_whose_last_layer_says_it_all_is_read_without_error() -> None:
    pipeline = OneStepPipeline.from_pretrained("digits", device="cpu")
    errors = [
        layer.error
        for layer in probe_layers(pipeline, PROMPTS, num_samples=64, num_held_out=8).layers
    ]
    assert errors[-1] < 0.15 < errors[0], "a trained model knows more from layer to layer"
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_family_orders_tokens_as_their_patches_lie(case: Case) -> None:
    backbone = case.build()
    x, t, c = case.inputs()
    grid = backbone.token_grid(x.shape[2:])
    token = torch.Size(grid).numel() - 2

    def push(block: nn.Module, args: object, tokens: Tokens) -> Tokens:
        visual = tokens.visual.clone()
        visual[:, token] += torch.arange(1.0, 1 + visual.shape[-1])
        return tokens._replace(visual=visual)

    with torch.no_grad():
        before = backbone(x, t, c)
        hook = backbone.block_list()[-1].register_forward_hook(push)
        after = backbone(x, t, c)
        hook.remove()
    changed = (to_tokens(after - before, grid) != 0).any(dim=-1)[0].nonzero().flatten()
    assert changed.tolist() == [token]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"num_held_out": 0}, "one held-out sample"),
        ({"num_samples": 1}, "use more samples"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_what_cannot_be_probed_is_refused(asked: dict[str, object], said: str) -> None:
    bundle = tiny_bundle()
    if "num_samples" in asked:
        bundle.backbone = wide()
    with pytest.raises(InputError, match=said):
        probe_layers(OneStepPipeline(bundle), **({"prompts": PROMPTS} | asked))  # type: ignore[arg-type]


def wide() -> DiffusionTransformer:
    """With more unknowns than a sample has tokens."""
    return create_model(
        "mmdit_digits", hidden_size=96, depth=1, num_heads=2, text_dim=16, pooled_dim=16
    )

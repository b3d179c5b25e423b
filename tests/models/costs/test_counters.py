"""Counters are chosen by the class of a config, and refuse what a model would."""

from __future__ import annotations

import dataclasses

import pytest

from apt.errors import InputError
from apt.models import MODELS
from apt.models.costs import COUNTERS, DiTCost, LayerCost, Sizes, dit_cost
from apt.models.mmdit import MMDiTConfig
from apt.models.sd3 import SD3Config
from apt.models.wan import WanConfig

WAN = WanConfig(hidden_size=24, depth=1, num_heads=2, mlp_size=20, max_positions=8, text_length=9)
SD3 = SD3Config(depth=1, num_heads=2, head_dim=8, text_dim=20, pooled_dim=6, max_positions=6)


@pytest.mark.parametrize("name", MODELS.names())
def test_every_registered_model_is_counted(name):
    config = MODELS.get(name)()
    assert type(config) in COUNTERS
    frames = 1 if isinstance(config, SD3Config) else 2
    cost = dit_cost(config, 1, (frames, 4, 6), text_tokens=3)
    assert len(cost.layers) == config.depth
    total = cost.total
    assert min(total.linear.flops, total.attention.flops) > 0
    assert total.elementwise.bytes > total.elementwise_fused.bytes > 0


@pytest.mark.parametrize(
    ("config", "latents", "options", "message"),
    [
        (MMDiTConfig(), (2, 5, 6), {}, "latent height 5 is not a multiple of the patch, 2"),
        (MMDiTConfig(), (0, 4, 6), {}, "latent frames 0 is not a multiple"),
        (MMDiTConfig(), (2, 4, 6), {"batch": 0}, "batch and num_rows must be at least 1"),
        (MMDiTConfig(), (2, 4, 6), {"num_rows": 0}, "got 1, 0, 256"),
        (MMDiTConfig(), (2, 4, 6), {"text_tokens": -1}, "got 1, None, -1"),
        (WAN, (2, 4, 7), {"text_tokens": 9}, "latent width 7 is not a multiple of the patch, 2"),
        (WAN, (9, 4, 6), {"text_tokens": 9}, "at most 8 along each"),
        (WAN, (2, 4, 6), {"text_tokens": 10}, "at most 9 text tokens, got 10; .* so use 9"),
        (SD3, (2, 4, 6), {}, "makes images: .*got 2 frames; choose a video model"),
        (SD3, (1, 4, 14), {}, "at most 6 along each, 12 latents"),
        (object(), (1, 4, 4), {}, "for a object, only for MMDiTConfig, SD3Config, WanConfig; reg"),
    ],
)
def test_what_cannot_be_counted_is_refused(config, latents, options, message):
    with pytest.raises(InputError, match=message):
        dit_cost(config, options.pop("batch", 1), latents, **options)


def test_a_network_of_ones_own_brings_its_counter(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Own:
        depth: int = 2

    def count(config: Own, sizes: Sizes) -> DiTCost:
        assert (sizes.rows, sizes.latent_shape) == (3, (1, 2, 2))
        return DiTCost(
            batch=sizes.batch,
            visual_tokens=4,
            text_tokens=sizes.text_tokens,
            head_dim=64,
            layers=(LayerCost(),) * config.depth,
            ends=LayerCost(),
        )

    monkeypatch.setitem(COUNTERS, Own, count)
    assert len(dit_cost(Own(), 3, (1, 2, 2)).layers) == 2

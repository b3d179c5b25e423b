"""SD3's configs and keys against diffusers' class and its converter of the original layout."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import CheckpointError
from apt.models import FAMILIES, MODELS
from apt.models.sd3 import SD3Config
from apt.models.sd3.checkpoint import config_from_diffusers, config_to_diffusers

diffusers = pytest.importorskip("diffusers")

MEDIUM, LARGE = MODELS.get("sd3.5_medium")(), MODELS.get("sd3.5_large")()
SIZES = {"medium": MEDIUM, "large": LARGE}
sizes = pytest.mark.parametrize("config", SIZES.values(), ids=list(SIZES))
OLD = SD3Config(depth=24, num_heads=24, qk_norm=False)  # Stable Diffusion 3 medium


def original_shapes(config: SD3Config) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as in Stability AI's reference code, whose fused layers have biases."""
    d, p = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, config.max_positions**2, d)}

    def linear(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    def attention(name: str, *, output: bool) -> None:
        linear(f"{name}.qkv", 3 * d, d)
        if config.qk_norm:
            shapes[f"{name}.ln_q.weight"] = shapes[f"{name}.ln_k.weight"] = (config.head_dim,)
        if output:
            linear(f"{name}.proj", d, d)

    linear("x_embedder.proj", d, config.in_channels, p, p)
    linear("context_embedder", d, config.text_dim)
    for name, width in (("t_embedder", 256), ("y_embedder", config.pooled_dim)):
        linear(f"{name}.mlp.0", d, width)
        linear(f"{name}.mlp.2", d, d)
    for i in range(config.depth):
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{i}.{stream}"
            dual = stream == "x_block" and i in config.dual_attention_layers
            output = stream == "x_block" or i < config.depth - 1
            linear(f"{name}.adaLN_modulation.1", (9 if dual else 6 if output else 2) * d, d)
            attention(f"{name}.attn", output=output)
            if dual:
                attention(f"{name}.attn2", output=True)
            if output:
                linear(f"{name}.mlp.fc1", 4 * d, d)
                linear(f"{name}.mlp.fc2", d, 4 * d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", p * p * config.in_channels, d)
    return shapes


def convert(config: SD3Config, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert by the rules; each original key matches exactly one."""
    rules = FAMILIES.get("sd3")().rules_for(config)
    ours: dict[str, Tensor] = {}
    for key, tensor in original.items():
        matches = [(rule, names) for rule in rules if (names := rule.match(key)) is not None]
        assert len(matches) == 1, key
        rule, names = matches[0]
        if rule.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            assert name not in ours
            ours[name] = part
    return ours


@pytest.mark.parametrize("config", [MEDIUM, LARGE, OLD], ids=["medium", "large", "sd3"])
def test_every_original_key_becomes_what_diffusers_makes_of_it(config: SD3Config) -> None:
    """At full size, row by row: each row of each tensor carries a number of its own."""
    from diffusers.loaders.single_file_utils import (
        convert_sd3_transformer_checkpoint_to_diffusers,
    )

    original, start = {}, 0
    for key, shape in original_shapes(config).items():
        # The table's first dimension is 1
        rows = shape[1] if key == "pos_embed" else shape[0]
        original[key] = torch.arange(start, start + rows, dtype=torch.int32)
        original[key] = original[key][None] if key == "pos_embed" else original[key]
        start += rows
    ours = convert(config, original)
    left = dict(original)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(left)
    assert not left, "diffusers' converter takes every key of the layout written out above"
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("config", [MEDIUM, LARGE, OLD], ids=["medium", "large", "sd3"])
def test_original_shapes_become_the_modules(config: SD3Config) -> None:
    with torch.device("meta"):
        original = {key: torch.empty(shape) for key, shape in original_shapes(config).items()}
        state = config.build().state_dict()
    ours = {key: tensor.shape for key, tensor in convert(config, original).items()}
    assert ours == {key: tensor.shape for key, tensor in state.items()}


def test_the_original_layout_computes_the_same() -> None:
    """diffusers' module from diffusers' converter, ours from our rules: one velocity."""
    from diffusers.loaders.single_file_utils import (
        convert_sd3_transformer_checkpoint_to_diffusers,
    )

    config = SD3Config(
        in_channels=4, depth=2, num_heads=2, head_dim=8, text_dim=10, pooled_dim=5,
        dual_attention_layers=(0,), max_positions=8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    original = {
        key: 0.2 * torch.randn(shape, generator=generator)
        for key, shape in original_shapes(config).items()
    }
    model = config.build()
    model.load_state_dict(convert(config, original))
    options = config_to_diffusers(config)
    options.pop("_class_name")
    peer = diffusers.SD3Transformer2DModel(**options)
    peer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(original)))
    x = torch.randn(1, 4, 1, 4, 6, generator=generator)
    tokens, pooled = torch.randn(1, 3, 10, generator=generator), torch.ones(1, 5)
    velocity = model(x, torch.tensor([0.7]), Condition(EncodedText(tokens, pooled=pooled)))
    expected = peer(x[:, :, 0], tokens, pooled, torch.tensor([700.0]), return_dict=False)[0]
    assert (velocity[:, :, 0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("key", ["joint_blocks.0.x_block.attn.ln_q.bias", "decoder.conv.weight"])
def test_foreign_keys_meet_no_rule(key: str) -> None:
    rules = FAMILIES.get("sd3")().rules_for(MEDIUM)
    assert [rule for rule in rules if rule.match(key) is not None] == []


@pytest.mark.parametrize("config", [MEDIUM, LARGE, OLD], ids=["medium", "large", "sd3"])
def test_marks_are_in_both_layouts(config: SD3Config) -> None:
    with torch.device("meta"):
        layouts = [list(original_shapes(config)), list(config.build().state_dict())]
    for keys in layouts:
        for mark in FAMILIES.get("sd3")().marks:
            assert any(mark in key for key in keys)


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "AuraFlowTransformer2DModel", "WanTransformer3DModel"]
)
def test_marks_are_in_no_other_family(name: str) -> None:
    tiny: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2}
    if name == "AuraFlowTransformer2DModel":
        tiny = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
    with torch.device("meta"):
        keys = list(getattr(diffusers, name)(**tiny).state_dict())
    marks = FAMILIES.get("sd3")().marks
    assert not all(any(mark in key for key in keys) for mark in marks)


@pytest.mark.parametrize("config", [MEDIUM, LARGE, OLD], ids=["medium", "large", "sd3"])
def test_configs_go_there_and_back(config: SD3Config) -> None:
    saved = json.loads(json.dumps(config_to_diffusers(config)))
    assert config_from_diffusers(saved) == config
    with torch.device("meta"):
        peer = diffusers.SD3Transformer2DModel.from_config(saved)
    assert config_from_diffusers(peer.config) == config
    assert (
        peer.config.items() >= {key: value for key, value in saved.items() if key[0] != "_"}.items()
    )


def test_what_a_config_leaves_out_is_diffusers_default() -> None:
    with torch.device("meta"):
        peer = diffusers.SD3Transformer2DModel()
    assert config_from_diffusers({}) == config_from_diffusers(peer.config)
    assert dataclasses.asdict(config_from_diffusers({}))["depth"] == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        ({"guidance_embeds": True}, "unknown options: guidance_embeds"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'.*expected 'rms_norm' or None"),
        ({"caption_projection_dim": 7}, "caption_projection_dim is 7.*expected 1536"),
        ({"out_channels": 32}, "out_channels is 32.*expected 16 or None"),
        ({"dual_attention_layers": [0, 99]}, r"cannot be built: dual_attention_layers"),
        ({"num_layers": "24"}, r"cannot be built.*'depth' must be int, got '24'"),
    ],
)
def test_configs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_diffusers({**config_to_diffusers(MEDIUM), **options})


def test_the_family() -> None:
    family = FAMILIES.get("sd3")()
    assert (family.name, family.config_class) == ("sd3", SD3Config)
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(family.adapter.time(t), torch.tensor([0.0, 250.0, 1000.0]))
    assert torch.equal(family.adapter.velocity(t), t)
    assert hasattr(diffusers, family.diffusers_class) and hasattr(diffusers, family.pipeline_class)

"""The Wan family against diffusers: configs both ways, and the table of original keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apt.checkpoints.layouts import Family
from apt.errors import CheckpointError
from apt.models import FAMILIES, MODELS, create_model
from apt.models.wan import WanConfig

diffusers = pytest.importorskip("diffusers")

SIZES = ["wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "wan2.2_ti2v_5b", "wan2.2_t2v_a14b"]

# What diffusers' script that converted Wan 2.1 1.3B for its release writes
RELEASED = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}


@pytest.fixture(scope="module")
def family() -> Family:
    return FAMILIES.create("wan")


def original_state(config: WanConfig) -> dict[str, Tensor]:
    """The tensors of WanModel in the authors' repository, by its modules, on the meta device."""
    d, text = config.hidden_size, config.text_dim
    pt, ph, pw = config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, config.in_channels, pt, ph, pw),
        "patch_embedding.bias": (d,),
        "head.modulation": (1, 2, d),
    }

    def linear(name: str, size_in: int, size_out: int) -> None:
        shapes[f"{name}.weight"] = (size_out, size_in)
        shapes[f"{name}.bias"] = (size_out,)

    linear("text_embedding.0", text, d)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", config.time_dim, d)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", d, 6 * d)
    linear("head.head", d, config.in_channels * pt * ph * pw)
    for i in range(config.depth):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (d,)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attention}.{name}", d, d)
            for name in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{name}.weight"] = (d,)
        linear(f"{block}.ffn.0", d, config.mlp_size)
        linear(f"{block}.ffn.2", config.mlp_size, d)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SIZES)
def test_every_original_key_goes_where_diffusers_puts_it(name: str, family: Family) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    with torch.device("meta"):
        model: Any = create_model(name)
    original = original_state(model.config)
    rules = family.rules_for(model.config)
    ours: dict[str, Tensor] = {}
    for key, value in original.items():
        found = [rule.match(key) for rule in rules]
        (targets,) = [match for match in found if match is not None]
        (target,) = targets
        assert target not in ours
        ours[target] = value
    assert not any(rule.swap_halves for rule in rules)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert ours[key] is theirs[key] and ours[key].shape == value.shape


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.cross_attn.norm_k_img.weight",
        "img_emb.proj.1.weight",
        "vace_blocks.0.self_attn.q.weight",
        "face_adapter.fuser_blocks.0.k_norm.weight",
        "blocks.0.norm1.weight",
        "blocks.x.modulation",
        "xhead.modulation",
        "blocks.0.self_attn.q.weight_scale",
        "condition_embedder.time_proj.weight",
    ],
)
def test_keys_of_other_models_meet_no_rule(key: str, family: Family) -> None:
    rules = family.rules_for(WanConfig())
    assert [rule for rule in rules if rule.match(key)] == []


def test_marks_are_in_both_layouts_and_in_no_other_family(family: Family) -> None:
    model = MODELS.get("wan2.1_t2v_1.3b")()
    with torch.device("meta"):
        peers = {
            "ours": model.build(),
            "flux": diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1),
            "sd3": diffusers.SD3Transformer2DModel(num_layers=2, qk_norm="rms_norm"),
            "ltx": diffusers.LTXVideoTransformer3DModel(num_layers=1),
            "cogvideox": diffusers.CogVideoXTransformer3DModel(num_layers=1),
            "mochi": diffusers.MochiTransformer3DModel(num_layers=1),
            "hunyuan": diffusers.HunyuanVideoTransformer3DModel(
                num_layers=1, num_single_layers=1, num_refiner_layers=1
            ),
            "apt": create_model("mmdit_small"),
            "vae": diffusers.AutoencoderKLWan(base_dim=3),
        }
    keys = {name: list(peer.state_dict()) for name, peer in peers.items()}
    keys["original"] = list(original_state(model))

    def looks_like_wan(names: list[str]) -> bool:
        return all(any(mark in name for name in names) for mark in family.marks)

    assert {name for name, names in keys.items() if looks_like_wan(names)} == {"ours", "original"}


def test_the_released_config(family: Family) -> None:
    assert family.from_diffusers(RELEASED) == MODELS.get("wan2.1_t2v_1.3b")()
    written = family.to_diffusers(MODELS.get("wan2.1_t2v_1.3b")())
    assert {key: written[key] for key in RELEASED if key != "_diffusers_version"} == {
        key: value for key, value in RELEASED.items() if key != "_diffusers_version"
    }


@pytest.mark.parametrize("name", SIZES)
def test_configs_there_and_back(name: str, family: Family) -> None:
    config = MODELS.get(name)()
    written = family.to_diffusers(config)
    assert family.from_diffusers(written) == config
    with torch.device("meta"):
        peer = diffusers.WanTransformer3DModel.from_config(written)
    understood = {key: value for key, value in peer.config.items() if not key.startswith("_")}
    assert family.from_diffusers(understood) == config
    assert {**understood, "patch_size": list(understood["patch_size"])} == {
        key: value for key, value in written.items() if key != "_class_name"
    }


def test_what_a_config_leaves_out_is_diffusers_default(family: Family) -> None:
    with torch.device("meta"):
        defaults = dict(diffusers.WanTransformer3DModel.from_config({"num_layers": 1}).config)
    assert family.from_diffusers({"num_layers": 1}) == family.from_diffusers(defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel"),
        ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, "image-to-video"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120"),
        ({"in_channels": 36}, "reads 36 channels and writes 16"),
        ({"pos_embed_seq_len": 514}, "between two given frames"),
        ({"cross_attn_norm": False}, "expected True"),
        ({"qk_norm": "layer_norm"}, "expected 'rms_norm_across_heads'"),
        ({"vace_layers": [0, 5]}, "unknown options: vace_layers"),
        ({"num_layers": "many"}, "'depth' must be int"),
        ({"num_layers": 0}, "depth must be at least 1"),
        ({"num_attention_heads": None}, "cannot be built"),
        ({"attention_head_dim": 4}, "at least 6 dimensions"),
        ({"patch_size": [1, 2]}, "patch_size"),
    ],
)
def test_configs_that_cannot_be_built(change: dict[str, Any], message: str, family: Family) -> None:
    with pytest.raises(CheckpointError, match=message):
        family.from_diffusers({**RELEASED, **change})


def test_published_weights() -> None:
    for name in SIZES:
        for tag, entry in MODELS.pretrained(name).items():
            assert entry.repo.startswith("Wan-AI/Wan2.") and entry.repo.endswith("-Diffusers")
            assert entry.license == "Apache-2.0" and not entry.gated
            assert entry.text_encoder == "umt5"
            assert entry.codec == ("wan2.2_vae" if name == "wan2.2_ti2v_5b" else "wan_vae")
            assert entry.subfolder == ("transformer_2" if tag == "low_noise" else "transformer")
    assert next(iter(MODELS.pretrained("wan2.2_t2v_a14b"))) == "high_noise"

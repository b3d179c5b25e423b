"""LoRA files of every spelling, against peft's and diffusers' own loaders."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.checkpoints.layouts import FAMILIES
from apt.checkpoints.lora import (
    LORA_FILE,
    LoRA,
    LoRALayer,
    find_lora,
    load_lora,
    merge_lora,
    save_lora,
)
from apt.errors import CheckpointError, InputError
from apt.models import create_model
from tests.models.wan_nets import ours_of, tiny_peer, wan_inputs

diffusers = pytest.importorskip("diffusers")

RANK = 3
# Our name and the authors' name of one layer of each kind.
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


@pytest.fixture
def model() -> nn.Module:
    return ours_of(tiny_peer(0, num_layers=2))


def factors(model: nn.Module, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for each of LAYERS."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in LAYERS:
        out, inner = model.get_parameter(f"{name}.weight").shape
        made[name] = (
            torch.randn(RANK, inner, generator=generator),
            torch.randn(out, RANK, generator=generator),
        )
    return made


def merged(model: nn.Module, path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    changed = copy.deepcopy(model)
    merge_lora(changed, load_lora(path, model), scale=scale)
    return changed.state_dict()


def expected(model: nn.Module, scale: float) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, (down, up) in factors(model).items():
        state[f"{name}.weight"] += scale * (up @ down)
    return state


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name)


STYLES = ["diffusers", "peft", "old diffusers", "comfyui", "original down", "kohya"]


def write(path: Path, model: nn.Module, style: str, alpha: float | None = None) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors(model).items():
        original = LAYERS[name]
        prefix, a, b = {
            "diffusers": (f"transformer.{name}", "lora_A.weight", "lora_B.weight"),
            "peft": (f"base_model.model.{name}", "lora_A.default.weight", "lora_B.default.weight"),
            "old diffusers": (f"transformer.{name}", "lora.down.weight", "lora.up.weight"),
            "comfyui": (f"diffusion_model.{original}", "lora_A.weight", "lora_B.weight"),
            "original down": (
                f"diffusion_model.{original}", "lora_down.weight", "lora_up.weight"
            ),
            "kohya": (
                "lora_unet_" + original.replace(".", "_"), "lora_down.weight", "lora_up.weight"
            ),
        }[style]  # fmt: skip
        tensors |= {f"{prefix}.{a}": down, f"{prefix}.{b}": up}
        if alpha is not None:
            tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_spelling_is_the_same_change(
    tmp_path: Path, model: nn.Module, style: str, alpha: float | None
) -> None:
    path = write(tmp_path / "lora.safetensors", model, style, alpha)
    factor = 1.0 if alpha is None else alpha / RANK
    assert_same(merged(model, path), expected(model, factor))
    assert_same(merged(model, path, scale=0.5), expected(model, 0.5 * factor))


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_the_output_is_that_of_diffusers_own_loader(tmp_path: Path, style: str) -> None:
    pytest.importorskip("peft")
    peer = tiny_peer(0, num_layers=2)
    model = ours_of(peer)
    path = write(tmp_path / LORA_FILE, model, style)
    merge_lora(model, load_lora(path, model))
    state, _ = diffusers.WanPipeline.lora_state_dict(
        tmp_path, weight_name=LORA_FILE, return_lora_metadata=True
    )
    diffusers.WanPipeline.load_lora_into_transformer(state, peer)
    x, t, c = wan_inputs(1, (2, 4, 4), lengths=[5], seed=1)
    theirs = peer(hidden_states=x, timestep=t * 1000, encoder_hidden_states=model._padded(c)).sample
    torch.testing.assert_close(model(x, t, c), theirs, rtol=1e-4, atol=1e-4)


def test_alpha_in_the_metadata_of_diffusers(tmp_path: Path, model: nn.Module) -> None:
    (name, (down, up)), *_ = factors(model).items()
    other = "blocks.1.attn2.to_v"
    tensors = {
        f"transformer.{key}.lora_{part}.weight": value.contiguous()
        for key, pair in ((name, (down, up)), (other, factors(model)[other]))
        for part, value in zip("AB", pair, strict=True)
    }
    options = {
        "transformer.r": RANK, "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {other: 12},
    }  # fmt: skip
    for rslora, divisor in ((False, RANK), (True, RANK**0.5)):
        metadata = json.dumps(options | {"transformer.use_rslora": rslora})
        path = tmp_path / "lora.safetensors"
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        lora = load_lora(path, model)
        assert lora.layers[name].scale == pytest.approx(6 / divisor)
        assert lora.layers[other].scale == pytest.approx(12 / divisor)


def test_whole_differences_of_weights_and_biases(tmp_path: Path, model: nn.Module) -> None:
    bias = torch.randn(model.get_parameter("blocks.0.attn1.to_q.bias").shape)
    norm = torch.randn(model.get_parameter("blocks.0.norm2.weight").shape)
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.diff_b": bias,
            "diffusion_model.blocks.0.norm3.diff": norm,
        },
        path,
    )
    changed = merged(model, path, scale=2.0)
    want = model.state_dict()
    torch.testing.assert_close(
        changed["blocks.0.attn1.to_q.bias"], want["blocks.0.attn1.to_q.bias"] + 2 * bias
    )
    torch.testing.assert_close(
        changed["blocks.0.norm2.weight"], want["blocks.0.norm2.weight"] + 2 * norm
    )


def test_a_convolution(tmp_path: Path, model: nn.Module) -> None:
    weight = model.get_parameter("patch_embedding.weight")
    down, up = torch.randn(2, *weight.shape[1:]), torch.randn(weight.shape[0], 2, 1, 1, 1)
    path = tmp_path / "lora.safetensors"
    prefix = "diffusion_model.patch_embedding"
    save_file({f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}, path)
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    changed = merged(model, path)["patch_embedding.weight"]
    torch.testing.assert_close(changed, weight.detach() + change)


def test_merging_rounds_once_and_is_taken_off_again(tmp_path: Path, model: nn.Module) -> None:
    path = write(tmp_path / "lora.safetensors", model, "diffusers")
    lora, before = load_lora(path, model), copy.deepcopy(model.state_dict())
    merge_lora(model, lora, scale=0.7)
    merge_lora(model, lora, scale=-0.7)
    assert_same(model.state_dict(), before)
    half = copy.deepcopy(model).to(torch.bfloat16)
    name = "blocks.0.attn1.to_q"
    want = half.get_parameter(f"{name}.weight").float() + lora.layers[name].delta()
    merge_lora(half, lora)
    assert torch.equal(half.get_parameter(f"{name}.weight"), want.bfloat16())
    with pytest.raises(InputError, match="finite"):
        merge_lora(model, lora, scale=float("nan"))


def test_what_is_saved_reads_back_and_runs_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    peer = tiny_peer(0, num_layers=2)
    model = ours_of(peer)
    layers = {n: LoRALayer(down, up, 0.5) for n, (down, up) in factors(model).items()}
    file = save_lora(tmp_path, layers)
    assert file.name == LORA_FILE
    assert_same(merged(model, tmp_path), expected(model, 0.5))
    state, metadata = diffusers.WanPipeline.lora_state_dict(
        tmp_path, weight_name=LORA_FILE, return_lora_metadata=True
    )
    diffusers.WanPipeline.load_lora_into_transformer(state, peer, metadata=metadata)
    merge_lora(model, LoRA(layers, {}))
    x, t, c = wan_inputs(1, (2, 4, 4), lengths=[5], seed=1)
    theirs = peer(hidden_states=x, timestep=t * 1000, encoder_hidden_states=model._padded(c)).sample
    torch.testing.assert_close(model(x, t, c), theirs, rtol=1e-4, atol=1e-4)


def test_our_own_models_have_no_other_names(tmp_path: Path) -> None:
    model = create_model("mmdit_digits", hidden_size=24, depth=1, num_heads=2)
    down, up = torch.randn(2, 24), torch.randn(72, 2)
    save_lora(tmp_path, {"blocks.0.streams.0.qkv": LoRALayer(down, up)})
    before = model.get_parameter("blocks.0.streams.0.qkv.weight").clone()
    merge_lora(model, load_lora(tmp_path, model))
    torch.testing.assert_close(
        model.get_parameter("blocks.0.streams.0.qkv.weight"), before + up @ down
    )


def test_a_fused_projection_of_sd3_is_cut(tmp_path: Path) -> None:
    model = create_model(
        "sd3.5_medium", depth=2, num_heads=2, head_dim=12, dual_attention_layers=(0,),
        text_dim=16, pooled_dim=8, max_positions=8, sample_size=8,
    )  # fmt: skip
    down, up = torch.randn(2, 24), torch.randn(72, 2)
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    path = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    before = copy.deepcopy(model.state_dict())
    merge_lora(model, load_lora(path, model))
    for name, part in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        weight = f"transformer_blocks.0.attn.{name}.weight"
        torch.testing.assert_close(model.state_dict()[weight], before[weight] + part @ down)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["diffusion_model.blocks.9.self_attn.q.lora_A.weight"], "match nothing"),
        (["lora_te_layers_0.lora_down.weight"], "text encoder"),
        (["transformer.blocks.0.attn1.to_q.lora_magnitude_vector"], "DoRA"),
        (["transformer.blocks.0.attn1.to_q.weight"], "another model"),
    ],
)
def test_keys_of_something_else(
    tmp_path: Path, model: nn.Module, keys: list[str], message: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(CheckpointError, match=message):
        load_lora(path, model)


def test_half_a_pair_wrong_shapes_and_nothing(tmp_path: Path, model: nn.Module) -> None:
    path, name = tmp_path / "lora.safetensors", "transformer.blocks.0.attn1.to_q"
    down, up = factors(model)["blocks.0.attn1.to_q"]
    save_file({f"{name}.lora_A.weight": down}, path)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_lora(path, model)
    save_file({f"{name}.lora_A.weight": down[:, 1:].clone(), f"{name}.lora_B.weight": up}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_lora(path, model)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:, 1:].clone()}, path)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        load_lora(path, model)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        load_lora(path, model)
    with pytest.raises(CheckpointError, match="missing"):
        load_lora(tmp_path / "nowhere.safetensors", model)
    for name in (tmp_path / "nowhere", "folder/nowhere.safetensors"):
        with pytest.raises(CheckpointError, match="there is no LoRA"):
            find_lora(name)


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        save_lora(tmp_path, {"a": LoRALayer(torch.full((1, 2), float("nan")), torch.ones(2, 1))})
    assert not list(tmp_path.iterdir())


def test_every_rule_that_cuts_is_found_with_underscores_too() -> None:
    for name in FAMILIES.names():
        family = FAMILIES.get(name)()
        for rule in family.rules_for(family.config_class()):
            # The patterns must survive dots that become underscores
            assert "." not in rule.theirs.replace(r"\.", ""), rule

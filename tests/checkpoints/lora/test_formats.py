"""Adapters of every kind and spelling, against peft's own merge and the formulas of LyCORIS."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.checkpoints.lora import load_lora, merge_lora
from apt.errors import CheckpointError, InputError
from apt.models import create_model

peft = pytest.importorskip("peft")

SMALL = {
    "depth": 1, "hidden_size": 48, "num_heads": 4, "mlp_size": 96, "text_dim": 32, "time_dim": 32,
}  # fmt: skip
TARGETS = ["blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj", "proj_out"]
ORIGINAL = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "proj_out": "head.head",
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("wan2.1_t2v_1.3b", **SMALL)
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def merged(base: nn.Module, path: Path, scale: float = 1.0) -> nn.Module:
    model = copy.deepcopy(base)
    merge_lora(model, load_lora(path, model), scale=scale)
    return model


def assert_changes(model: nn.Module, base: nn.Module, changes: dict[str, Tensor]) -> None:
    """Assert that exactly these parameters changed, by these amounts."""
    before = dict(base.named_parameters())
    for name, value in model.named_parameters():
        expected = before[name].detach()
        if name in changes:
            expected = expected + changes[name].reshape(expected.shape)
        torch.testing.assert_close(value.detach(), expected, msg=name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
    return path


CONFIGS: dict[str, Callable[[], Any]] = {
    "plain": lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=4, use_rslora=True, target_modules=TARGETS
    ),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={"to_q": 2, r"^proj_out": 3},
        alpha_pattern={r"attn\d\.to_q": 5, "ffn.net.0.proj": 7},
    ),
    "rslora with patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS,
        rank_pattern={"to_q": 2}, alpha_pattern={"proj_out": 5},
    ),
    "bias": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, lora_bias=True, target_modules=TARGETS
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr of four": lambda: peft.LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=6, target_modules=TARGETS
    ),
    "lokr of whole matrices": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=TARGETS),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_merged_as_peft_merges_it(
    name: str, base: nn.Module, tmp_path: Path
) -> None:
    adapted = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    adapted.save_pretrained(tmp_path)
    theirs = dict(adapted.merge_and_unload().named_parameters())
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        ours = merged(base, path)
        moved = 0
        for key, value in ours.named_parameters():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)
            moved += not torch.equal(value, base.get_parameter(key))
        assert moved >= len(TARGETS)


# Keys of one layer in the authors' layout, and what stands before and between.
PREFIXES = [
    "", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.",
    "base_model.model.model.", "unet.", "unet.base_model.model.", "module.", "model.", "net.",
    "dit.", "pipe.dit.", "_orig_mod.", "diffusion_model._orig_mod.",
]  # fmt: skip
FLAT_PREFIXES = ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "lora_dit_", ""]
SPELLINGS = [
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-adapter.weight", "lora_B.my-adapter.weight"),
    ("lora_A", "lora_B"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]


def check_spelling(base: nn.Module, tmp_path: Path, name: str, ours: str, spelling: Any) -> None:
    weight = base.get_parameter(f"{ours}.weight")
    down, up = random(3, weight.shape[1]), random(weight.shape[0], 3, seed=1)
    a, b = spelling
    path = save(
        tmp_path / "x.safetensors",
        {f"{name}.{a}": down, f"{name}.{b}": up, f"{name}.alpha": torch.tensor(6.0)},
    )
    assert_changes(merged(base, path), base, {f"{ours}.weight": 2 * (up @ down)})


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("ours", TARGETS)
def test_prefixes(base: nn.Module, tmp_path: Path, prefix: str, ours: str) -> None:
    for name in (ours, ORIGINAL[ours]):
        check_spelling(base, tmp_path, prefix + name, ours, SPELLINGS[0])


@pytest.mark.parametrize("prefix", FLAT_PREFIXES)
@pytest.mark.parametrize("ours", TARGETS)
def test_underscores_for_dots(base: nn.Module, tmp_path: Path, prefix: str, ours: str) -> None:
    for name in (ours, ORIGINAL[ours]):
        check_spelling(base, tmp_path, prefix + name.replace(".", "_"), ours, SPELLINGS[0])
        # Some writers replace only the first dots.
        check_spelling(base, tmp_path, prefix + name.replace(".", "_", 1), ours, SPELLINGS[0])


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda pair: pair[0])
def test_names_of_the_factors(base: nn.Module, tmp_path: Path, spelling: Any) -> None:
    check_spelling(
        base, tmp_path, "diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q", spelling
    )


def test_attention_processors_of_old_diffusers(base: nn.Module, tmp_path: Path) -> None:
    for name, ours in (
        ("unet.blocks.0.attn1.processor.to_q_lora", "blocks.0.attn1.to_q"),
        ("unet.blocks.0.attn1.processor.to_out_lora", "blocks.0.attn1.to_out.0"),
    ):
        weight = base.get_parameter(f"{ours}.weight")
        down, up = random(3, weight.shape[1]), random(weight.shape[0], 3, seed=1)
        tensors = {f"{name}.down.weight": down, f"{name}.up.weight": up}
        path = save(tmp_path / "x.safetensors", tensors)
        assert_changes(merged(base, path), base, {f"{ours}.weight": up @ down})


def test_a_lora_cut_from_a_whole_fine_tune(base: nn.Module, tmp_path: Path) -> None:
    """LightX2V's: differences of norms, biases, the patch embedding and the modulation tables."""
    shapes = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
        "blocks.0.ffn.2.diff_b": "blocks.0.ffn.net.2.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "time_embedding.0.diff_b": "condition_embedder.time_embedder.linear_1.bias",
    }
    changes = {
        ours: random(*base.get_parameter(ours).shape, seed=i)
        for i, ours in enumerate(shapes.values())
    }
    tensors = {f"diffusion_model.{key}": changes[ours] for key, ours in shapes.items()}
    path = save(tmp_path / "x.safetensors", tensors)
    assert_changes(merged(base, path), base, changes)
    halved = {name: 0.5 * value for name, value in changes.items()}
    assert_changes(merged(base, path, scale=0.5), base, halved)
    # The same tables by their own names, in either layout.
    for name, ours in (
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.scale_shift_table"),
        ("transformer.blocks.0.scale_shift_table.diff", "blocks.0.scale_shift_table"),
        ("transformer.scale_shift_table.diff", "scale_shift_table"),
    ):
        path = save(tmp_path / "y.safetensors", {name: changes[ours]})
        assert_changes(merged(base, path), base, {ours: changes[ours]})


def test_lycoris_norms_and_full(base: nn.Module, tmp_path: Path) -> None:
    weight, bias = random(48), random(48, seed=1)
    path = save(
        tmp_path / "x.safetensors",
        {"lycoris_blocks_0_norm2.w_norm": weight, "lycoris_blocks_0_norm2.b_norm": bias},
    )
    changes = {"blocks.0.norm2.weight": weight, "blocks.0.norm2.bias": bias}
    assert_changes(merged(base, path), base, changes)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lycoris_products(base: nn.Module, tmp_path: Path, prefix: str) -> None:
    """Its formulas; alpha scales factors, and is ignored for whole matrices."""
    name, ours = f"{prefix}blocks_0_attn1_to_q", "blocks.0.attn1.to_q.weight"
    alpha = torch.tensor(3.0)
    w1, w2 = random(4, 4), random(12, 12, seed=1)
    a, b = random(12, 2, seed=2), random(2, 12, seed=3)
    p, q = random(4, 2, seed=4), random(2, 4, seed=5)
    u1, v1, u2, v2 = random(48, 2), random(2, 48, seed=1), random(48, 2, seed=2), random(2, 48)
    cases: list[tuple[dict[str, Tensor], Tensor]] = [
        ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
        ({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, 1.5 * torch.kron(w1, a @ b)),
        (
            {"lokr_w1_a": p, "lokr_w1_b": q, "lokr_w2_a": a, "lokr_w2_b": b},
            1.5 * torch.kron(p @ q, a @ b),
        ),
        (
            {"hada_w1_a": u1, "hada_w1_b": v1, "hada_w2_a": u2, "hada_w2_b": v2},
            1.5 * (u1 @ v1) * (u2 @ v2),
        ),
    ]
    for parts, change in cases:
        tensors = {f"{name}.{part}": value for part, value in parts.items()}
        path = save(tmp_path / "x.safetensors", {**tensors, f"{name}.alpha": alpha})
        assert_changes(merged(base, path), base, {ours: change})


def test_convolutions_with_cores(base: nn.Module, tmp_path: Path) -> None:
    """Tucker decompositions of the patch embedding (LyCORIS' use_tucker)."""
    name, ours = "lycoris_patch_embedding", "patch_embedding.weight"
    core, other = random(2, 2, 1, 2, 2), random(2, 2, 1, 2, 2, seed=1)
    down, up = random(2, 16, 1, 1, 1, seed=2), random(48, 2, 1, 1, 1, seed=3)
    a1, b1, a2, b2 = random(2, 48), random(2, 16), random(2, 48, seed=4), random(2, 16, seed=5)

    def full(core: Tensor, out: Tensor, inner: Tensor) -> Tensor:
        return torch.einsum("rsthw,ro,si->oithw", core, out, inner)

    w1, c, d = random(4, 4), random(2, 12, seed=6), random(2, 4, seed=7)
    kron = torch.einsum("ab,cdthw->acbdthw", w1, full(core, c, d)).reshape(48, 16, 1, 2, 2)
    cases: list[tuple[dict[str, Tensor], Tensor]] = [
        (
            {"lora_mid.weight": core, "lora_down.weight": down, "lora_up.weight": up},
            full(core, up.flatten(1).T, down.flatten(1)),
        ),
        (
            {
                "hada_t1": core, "hada_w1_a": a1, "hada_w1_b": b1,
                "hada_t2": other, "hada_w2_a": a2, "hada_w2_b": b2,
            },
            full(core, a1, b1) * full(other, a2, b2),
        ),
        ({"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": c, "lokr_w2_b": d}, kron),
    ]  # fmt: skip
    for parts, change in cases:
        tensors = {f"{name}.{part}": value for part, value in parts.items()}
        path = save(tmp_path / "x.safetensors", {**tensors, f"{name}.alpha": torch.tensor(2.0)})
        assert_changes(merged(base, path), base, {ours: change})


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_rows_and_of_columns(base: nn.Module, tmp_path: Path, axis: int) -> None:
    name, ours = "diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj.weight"
    weight = base.get_parameter(ours).detach()
    down, up = random(3, 48), random(96, 3, seed=1)
    norms = 1 + torch.rand((96, 1) if axis == 0 else (1, 48))
    moved = weight + up @ down
    moved = norms * moved / moved.norm(dim=1 - axis, keepdim=True)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.dora_scale": norms,
    }
    path = save(tmp_path / "x.safetensors", tensors)
    assert_changes(merged(base, path), base, {ours: moved - weight})
    assert_changes(merged(base, path, scale=0.5), base, {ours: 0.5 * (moved - weight)})
    with pytest.raises(InputError, match="a DoRA cannot be removed"):
        merged(base, path, scale=-1)
    path = save(tmp_path / "x.safetensors", {**tensors, f"{name}.dora_scale": random(5, 1)})
    with pytest.raises(CheckpointError, match="DoRA norms"):
        load_lora(path, base)


@pytest.fixture(scope="module")
def sd3() -> nn.Module:
    model = create_model(
        "sd3.5_medium", depth=2, num_heads=2, head_dim=12, dual_attention_layers=(0,),
        text_dim=16, pooled_dim=8, max_positions=8, sample_size=8,
    )  # fmt: skip
    assert isinstance(model, nn.Module)
    return model


def test_a_fused_projection_of_sd3_is_cut_whatever_the_adapter(
    sd3: nn.Module, tmp_path: Path
) -> None:
    model = sd3
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    parts = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    whole = torch.cat([model.get_parameter(part).detach() for part in parts])
    w1, w2 = random(9, 3), random(8, 8, seed=1)
    u1, v1, u2, v2 = random(72, 2), random(2, 24), random(72, 2, seed=2), random(2, 24, seed=3)
    norms = 1 + torch.rand(72, 1)
    down, up = random(2, 24), random(72, 2, seed=4)
    moved = whole + up @ down
    lora = {"lora_down.weight": down, "lora_up.weight": up}
    hada = {"hada_w1_a": u1, "hada_w1_b": v1, "hada_w2_a": u2, "hada_w2_b": v2}
    cases: list[tuple[dict[str, Tensor], Tensor]] = [
        ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
        (hada, (u1 @ v1) * (u2 @ v2)),
        (lora, up @ down),
        ({**lora, "dora_scale": norms}, norms * moved / moved.norm(dim=1, keepdim=True) - whole),
        ({"diff": random(72, 24, seed=5)}, random(72, 24, seed=5)),
    ]
    for tensors, change in cases:
        path = save(
            tmp_path / "x.safetensors", {f"{name}.{part}": v for part, v in tensors.items()}
        )
        changes = dict(zip(parts, change.chunk(3), strict=True))
        assert_changes(merged(model, path), model, changes)
    # Shift and scale trade places in the last norm.
    value = random(48, 24)
    path = save(tmp_path / "x.safetensors", {"final_layer.adaLN_modulation.1.diff": value})
    swapped = torch.cat(value.chunk(2)[::-1])
    assert_changes(merged(model, path), model, {"norm_out.linear.weight": swapped})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight"], "image-to-video"),
        (["lora_unet_blocks_0_cross_attn_v_img.lora_up.weight"], "image-to-video"),
        (["transformer.blocks.0.attn2.add_k_proj.lora_A.weight"], "image-to-video"),
        (["diffusion_model.img_emb.proj.1.lora_A.weight"], "image-to-video"),
        (["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"], "image-to-video"),
        (["diffusion_model.vace_blocks.0.after_proj.lora_A.weight"], "a VACE"),
        (["diffusion_model.ref_conv.diff"], "Fun Control"),
        (["transformer_2.blocks.7.attn1.to_q.lora_A.weight"], "low-noise"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "text encoder"),
        (["text_encoders.t5xxl.transformer.shared.lora_A.weight"], "text encoder"),
        (["diffusion_model.blocks.0.self_attn.q.oft_blocks"], "an OFT"),
        (["diffusion_model.blocks.0.self_attn.q.a1.weight"], "a GLoRA"),
        (["diffusion_model.blocks.0.self_attn.q.set_weight"], "whole weights"),
        (["diffusion_model.patch_embedding.reshape_weight"], "enlarges a weight"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"], "a LoKr for another model"),
        (["lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"], "a LoHa for another model"),
        (["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"], "a DoRA for another model"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "family 'sd3'"),
    ],
)
def test_what_cannot_be_merged_is_named(
    base: nn.Module, tmp_path: Path, keys: list[str], message: str
) -> None:
    path = save(tmp_path / "x.safetensors", {key: torch.zeros(2, 2) for key in keys})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_lora(path, base)
    assert "match nothing" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lokr_w1": (4, 4)}, "incomplete.*of a LoKr"),
        ({"hada_w1_a": (48, 2), "hada_w1_b": (2, 48)}, "incomplete.*of a LoHa"),
        ({"dora_scale": (48, 1)}, "incomplete.*of a DoRA"),
        ({"alpha": ()}, "incomplete"),
        ({"lokr_w1": (4, 4), "lokr_w2": (5, 12)}, "does not fit the model"),
        (
            {"hada_w1_a": (48, 2), "hada_w1_b": (3, 48), "hada_w2_a": (48, 2),
             "hada_w2_b": (2, 48)},
            "do not fit each other",
        ),
        ({"lora_down.weight": (0, 48), "lora_up.weight": (48, 0)}, "expected a matrix"),
        ({"lora_down.weight": (48,), "lora_up.weight": (48, 1)}, "expected a matrix"),
        ({"lora_down.weight": (2, 48), "lora_up.weight": (48, 2), "alpha": (2,)}, "one number"),
        ({"diff": (48, 47)}, "does not fit the model"),
    ],
)  # fmt: skip
def test_damaged_adapters(
    base: nn.Module, tmp_path: Path, parts: dict[str, tuple[int, ...]], message: str
) -> None:
    name = "lycoris_blocks_0_attn1_to_q"
    path = save(
        tmp_path / "x.safetensors",
        {f"{name}.{part}": torch.ones(shape) for part, shape in parts.items()},
    )
    with pytest.raises(CheckpointError, match=message):
        load_lora(path, base)


SHAPES = st.lists(st.integers(0, 4), max_size=5)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["joint_blocks.0.x_block.attn.qkv", "final_layer.adaLN_modulation.1"]),
    parts=st.dictionaries(
        st.sampled_from(
            ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_B.bias", "alpha",
             "dora_scale", "diff", "diff_b", "diff_m", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
             "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b",
             "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]
        ),
        SHAPES,
        min_size=1,
    ),
)  # fmt: skip
def test_no_shape_is_a_traceback(
    sd3: nn.Module, tmp_path_factory: pytest.TempPathFactory, name: str, parts: dict[str, list[int]]
) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    save(path, {f"{name}.{part}": torch.ones(shape) for part, shape in parts.items()})
    with contextlib.suppress(CheckpointError):
        load_lora(path, sd3)


def test_a_lora_of_a_table(base: nn.Module, tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.modulation"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 48),
        f"{name}.lora_B.weight": torch.ones(6, 2),
    }
    with pytest.raises(CheckpointError, match="which is a table and not a layer"):
        load_lora(save(tmp_path / "x.safetensors", tensors), base)


def test_whole_numbers_are_no_lora(base: nn.Module, tmp_path: Path) -> None:
    tensors = {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match="is int8, expected floating-point"):
        load_lora(save(tmp_path / "x.safetensors", tensors), base)


def test_two_adapters_in_one_file(base: nn.Module, tmp_path: Path) -> None:
    name = "base_model.model.blocks.0.attn1.to_q"
    pair = {
        f"{name}.lora_{x}.{adapter}.weight": torch.ones(shape)
        for adapter in ("one", "two")
        for x, shape in (("A", (2, 48)), ("B", (48, 2)))
    }
    with pytest.raises(CheckpointError, match="several adapters"):
        load_lora(save(tmp_path / "x.safetensors", pair), base)
    twice = {
        "transformer.blocks.0.attn1.to_q.diff_b": torch.ones(48),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(48),
    }
    with pytest.raises(CheckpointError, match="twice, under two names"):
        load_lora(save(tmp_path / "x.safetensors", twice), base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_up.weight", "alpha", "dora_scale", "diff_b"])
def test_values_that_are_not_finite_are_refused_by_name(
    base: nn.Module, tmp_path: Path, part: str, value: float
) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        "lora_down.weight": torch.ones(2, 48),
        "lora_up.weight": torch.ones(48, 2),
        "alpha": torch.tensor(2.0),
        "dora_scale": torch.ones(48, 1),
        "diff_b": torch.ones(48),
    }
    tensors[part].view(-1)[0] = value
    path = save(tmp_path / "x.safetensors", {f"{name}.{k}": v for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"1 of .* values of '{name}.{part}' are NaN or inf"):
        load_lora(path, base)


def test_a_sum_beyond_the_type_is_refused_and_changes_nothing(
    base: nn.Module, tmp_path: Path
) -> None:
    half = copy.deepcopy(base).to(torch.float16)
    before = copy.deepcopy(half.state_dict())
    good, bad = "diffusion_model.blocks.0.self_attn.k", "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{good}.diff": torch.ones(48, 48),
        f"{bad}.lora_down.weight": torch.full((2, 48), 1e3),
        f"{bad}.lora_up.weight": torch.full((48, 2), 1e3),
    }
    lora = load_lora(save(tmp_path / "x.safetensors", tensors), half)
    with pytest.raises(CheckpointError, match=r"'blocks.0.attn1.to_q.weight' are NaN or infinite"):
        merge_lora(half, lora)
    for name, value in half.state_dict().items():
        assert torch.equal(value, before[name]), name
    merge_lora(half, lora, scale=1e-3)
    assert torch.isfinite(half.get_parameter("blocks.0.attn1.to_q.weight")).all()


def test_the_only_file_of_a_folder_is_its_lora(base: nn.Module, tmp_path: Path) -> None:
    tensors = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(48)}
    save(tmp_path / "style.safetensors", tensors)
    assert load_lora(tmp_path, base).differences.keys() == {"blocks.0.attn1.to_q.bias"}
    save(tmp_path / "other.safetensors", tensors)
    with pytest.raises(CheckpointError, match="several files"):
        load_lora(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save(tmp_path / "adapter_model.safetensors", tensors)
    load_lora(tmp_path, base)

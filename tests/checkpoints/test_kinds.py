"""Checkpoints as people have them: with prefixes, in 8 bits, or of kinds that errors name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.checkpoints.export import export_model
from apt.checkpoints.layouts import FAMILIES
from apt.checkpoints.load import load_model
from apt.errors import CheckpointError
from apt.models import MODELS, create_model
from tests.cli.shell import error_line, invoke
from tests.hub.tiny_pipelines import sd3_folder, wan_folder

Tensors = dict[str, Tensor]
NAMES = {"wan": "wan2.1_t2v_1.3b", "sd3": "sd3.5_medium"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {"wan": wan_folder(root / "wan"), "sd3": sd3_folder(root / "sd3")}


@pytest.fixture(scope="module")
def originals(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensors]:
    """The tensors in their authors' layout, without prefix."""
    root = tmp_path_factory.mktemp("files")
    return {
        name: {
            key.removeprefix("model.diffusion_model."): value
            for key, value in load_file(
                export_model(folder, root / f"{name}.safetensors", format="comfyui")
            ).items()
        }
        for name, folder in folders.items()
    }


@pytest.fixture(params=["wan", pytest.param("sd3", marks=pytest.mark.slow)])
def family(
    request: pytest.FixtureRequest, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A family whose tiny size is registered, so that its files are recognised."""
    register(request.param, folders, monkeypatch)
    return str(request.param)


@pytest.fixture
def wan(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    register("wan", folders, monkeypatch)


def register(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folders[name] / "transformer" / "config.json").read_text())
    tiny = FAMILIES.create(name).from_diffusers(config)
    monkeypatch.setitem(MODELS._builders, f"{name}_tiny", lambda: tiny)
    monkeypatch.setitem(MODELS._pretrained, f"{name}_tiny", {})


def state(model: object) -> Tensors:
    assert isinstance(model, nn.Module)
    return model.state_dict()


def save(path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
    return path


def assert_loads(
    path: Path, expected: Tensors, tolerance: float = 0.0, architecture: str | None = "wan_tiny"
) -> None:
    loaded = state(load_model(path, architecture=architecture))
    assert loaded.keys() == expected.keys()
    for key, value in loaded.items():
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "module.", "net.", "model.", "transformer.",
     "model.model.", "generator_ema.", "dit.", "_orig_mod.", "module._orig_mod.", "ema.module."],
)  # fmt: skip
def test_prefixes(
    prefix: str,
    family: str,
    folders: dict[str, Path],
    originals: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    expected = state(load_model(folders[family]))
    path = tmp_path / "x.safetensors"
    for tensors in (originals[family], expected):
        save(path, {prefix + key: value for key, value in tensors.items()})
        assert_loads(path, expected, architecture=f"{family}_tiny")


def test_wrappers_inside_of_names(
    wan: None, folders: dict[str, Path], originals: dict[str, Tensors], tmp_path: Path
) -> None:
    """torch.compile, FSDP and checkpointing of single blocks."""
    tensors = {
        key.replace("blocks.0.", "blocks.0._orig_mod.").replace(
            "blocks.1.", "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module."
        ): value
        for key, value in originals["wan"].items()
    }
    path = save(tmp_path / "x.safetensors", tensors)
    assert_loads(path, state(load_model(folders["wan"])))


def test_an_all_in_one_file(
    family: str, folders: dict[str, Path], originals: dict[str, Tensors], tmp_path: Path
) -> None:
    tensors = {f"model.diffusion_model.{key}": value for key, value in originals[family].items()}
    tensors |= {
        "first_stage_model.decoder.conv_in.weight": torch.ones(2),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.ones(2),
        "text_encoders.t5xxl.transformer.shared.weight_scale_2": torch.ones(()),
        "conditioner.embedders.0.weight": torch.ones(2),
        "text_encoders.clip_vision.embeddings.patch_embedding.weight": torch.ones(2),
    }
    path = save(tmp_path / "x.safetensors", tensors)
    # The size is found by the tensors.
    assert_loads(path, state(load_model(folders[family])), architecture=None)


def test_two_models_in_one_file(wan: None, originals: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = {
        prefix + key: value.clone()
        for prefix in ("generator.", "generator_ema.")
        for key, value in originals["wan"].items()
    }
    with pytest.raises(CheckpointError, match=r"prefixes generator\. and generator_ema\."):
        load_model(save(tmp_path / "x.safetensors", tensors))


def test_sd3_with_everything_at_once(
    folders: dict[str, Path],
    originals: dict[str, Tensors],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Stability's sd3.5_large_fp8_scaled: all in one, fused projections in 8 bits."""
    register("sd3", folders, monkeypatch)
    prefix = "model.diffusion_model."
    stored, by_module, values = in_8_bits(originals["sd3"], of_tensor, FP8)
    path = save(tmp_path / "values.safetensors", values)
    expected = state(load_model(path, architecture="sd3_tiny"))
    tensors = {f"{prefix}{key}": value for key, value in stored.items()}
    tensors |= {f"{prefix}{module}.scale_weight": scale for module, scale in by_module.items()}
    tensors |= {
        f"{prefix}scaled_fp8": torch.empty(2, dtype=FP8),
        "first_stage_model.decoder.conv_in.weight": torch.ones(2),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.empty(2, dtype=FP8),
    }
    assert_loads(save(tmp_path / "x.safetensors", tensors), expected, 1e-6, architecture=None)


def in_8_bits(
    tensors: Tensors, scales: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> tuple[Tensors, Tensors, Tensors]:
    """Matrices in 8 bits, their scales by module, and the values that they stand for."""
    stored, by_module, values = {}, {}, dict(tensors)
    for key, value in tensors.items():
        if not key.endswith("weight") or value.ndim != 2:
            stored[key] = value
            continue
        scale = scales(value)
        spread = scale if scale.ndim < 3 else scale.repeat_interleave(
            value.shape[1] // scale.shape[1], dim=1
        )[..., 0]  # fmt: skip
        codes = value / spread
        stored[key] = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        by_module[key.removesuffix(".weight")] = scale
        values[key] = stored[key].float() * spread
    return stored, by_module, values


def of_tensor(value: Tensor) -> Tensor:
    return value.abs().max() / 100


def of_rows(value: Tensor) -> Tensor:
    return value.abs().amax(dim=1, keepdim=True) / 100


def of_halves_of_rows(value: Tensor) -> Tensor:
    halves = value.unflatten(1, (2, -1)) if value.shape[1] % 2 == 0 else value[:, None]
    return halves.abs().amax(dim=2, keepdim=True) / 100 + 1e-9


FP8 = torch.float8_e4m3fn
PREFIXES = ["", pytest.param("model.diffusion_model.", marks=pytest.mark.slow)]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("scales", "dtype", "ending", "extra"),
    [
        (of_tensor, FP8, "scale_weight", "scale_input"),
        (of_tensor, torch.float8_e5m2, "scale_weight", None),
        (lambda value: of_tensor(value).reshape(1), FP8, "scale_weight", "scale_input"),
        (of_rows, FP8, "scale_weight", None),
        (of_halves_of_rows, FP8, "scale_weight", None),
        (of_tensor, FP8, "weight_scale", "input_scale"),
        (of_rows, FP8, "weight_scale", None),
        (of_rows, torch.int8, "weight_scale", None),
        (of_tensor, torch.int8, "weight_scale", None),
    ],
)
def test_8_bits_with_scales(
    prefix: str,
    scales: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    ending: str,
    extra: str | None,
    family: str,
    originals: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    stored, by_module, values = in_8_bits(originals[family], scales, dtype)
    name = f"{family}_tiny"
    path = save(tmp_path / "values.safetensors", values)
    expected = state(load_model(path, architecture=name))
    tensors = {f"{prefix}{key}": value for key, value in stored.items()}
    for module, scale in by_module.items():
        tensors[f"{prefix}{module}.{ending}"] = scale
        if extra is not None:
            tensors[f"{prefix}{module}.{extra}"] = torch.tensor(7.0)
    if ending == "scale_weight":
        tensors[f"{prefix}scaled_fp8"] = torch.empty(2, dtype=FP8)
    assert_loads(save(tmp_path / "x.safetensors", tensors), expected, 1e-6, name)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_8_bits_without_scales(
    dtype: torch.dtype, family: str, originals: dict[str, Tensors], tmp_path: Path
) -> None:
    tensors = {key: value.to(dtype) for key, value in originals[family].items()}
    values = {key: value.float() for key, value in tensors.items()}
    name = f"{family}_tiny"
    path = save(tmp_path / "values.safetensors", values)
    expected = state(load_model(path, architecture=name))
    assert_loads(save(tmp_path / "x.safetensors", tensors), expected, architecture=name)


def described(description: object) -> Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def test_descriptions_of_comfyui(wan: None, originals: dict[str, Tensors], tmp_path: Path) -> None:
    stored, by_module, values = in_8_bits(originals["wan"], of_tensor, FP8)
    path = save(tmp_path / "values.safetensors", values)
    expected = state(load_model(path, architecture="wan_tiny"))
    tensors = {**stored, **{f"{m}.weight_scale": s for m, s in by_module.items()}}
    module, *_ = by_module
    note = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    path = tmp_path / "x.safetensors"
    assert_loads(save(path, {**tensors, f"{module}.comfy_quant": described(note)}), expected, 1e-6)
    layers = {module: note, "text_encoders.t5xxl.shared": {"format": "nvfp4"}}
    header = {"_quantization_metadata": json.dumps({"layers": layers})}
    assert_loads(save(path, tensors, header), expected, 1e-6)
    for bad, name in (
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "int8_tensorwise", "convrot": True}, "ConvRot"),
        ("convrot_w4a4", "convrot_w4a4"),
        ({"format": "float8_e4m3fn", "params": {"convrot": True}}, "ConvRot"),
    ):
        with pytest.raises(CheckpointError, match=f"is quantised: .*{name}"):
            load_model(save(path, {**tensors, f"{module}.comfy_quant": described(bad)}))
        header = {"_quantization_metadata": json.dumps({"layers": {module: bad}})}
        with pytest.raises(CheckpointError, match=f"is quantised: .*{name}"):
            load_model(save(path, tensors, header))


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("wscales", "Nunchaku"),
        ("smooth_factor", "Nunchaku"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "nf4"),
        ("SCB", "int8"),
        ("qzeros", "GPTQ or AWQ"),
        ("qweight", "GPTQ, AWQ or Nunchaku"),
        ("weight_scale_2", "NVFP4"),
        ("weight._data", "optimum-quanto"),
        ("weight_scale_inv", "fp8 in blocks"),
    ],
)
def test_other_quantisations_are_named(
    ending: str, name: str, wan: None, originals: dict[str, Tensors], tmp_path: Path
) -> None:
    tensors = {**originals["wan"], f"blocks.0.self_attn.q.{ending}": torch.ones(2)}
    path = save(tmp_path / "x.safetensors", tensors)
    for arguments in ({}, {"architecture": "wan_tiny"}):
        with pytest.raises(CheckpointError, match=f"is quantised: .*{name}"):
            load_model(path, **arguments)  # type: ignore[arg-type]


def test_whole_numbers_without_a_scale_are_no_weights(
    wan: None, originals: dict[str, Tensors], tmp_path: Path
) -> None:
    key = "blocks.0.self_attn.q.weight"
    tensors = {**originals["wan"], key: torch.ones_like(originals["wan"][key], dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=f"'{key}' is I8 and has no scale"):
        load_model(save(tmp_path / "x.safetensors", tensors))
    for scale in (torch.ones(5), torch.ones(3, 5)):
        bad = {**tensors, "blocks.0.self_attn.q.weight_scale": scale}
        with pytest.raises(CheckpointError, match="and its scale"):
            load_model(save(tmp_path / "x.safetensors", bad))
    alone = {**originals["wan"], "blocks.0.norm9.weight_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match=r"but not its weight 'blocks.0.norm9.weight'"):
        load_model(save(tmp_path / "x.safetensors", alone))
    nan = {**tensors, "blocks.0.self_attn.q.weight_scale": torch.tensor(float("nan"))}
    with pytest.raises(CheckpointError, match=f"'{key}' are NaN"):
        load_model(save(tmp_path / "x.safetensors", nan))


def test_a_value_beyond_fp16_is_no_silent_infinity(
    wan: None, originals: dict[str, Tensors], tmp_path: Path
) -> None:
    key = "blocks.0.self_attn.q.weight"
    tensors = {**originals["wan"], key: originals["wan"][key].clone()}
    tensors[key][0, 0] = 1e6
    path = save(tmp_path / "x.safetensors", tensors)
    load_model(path, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"1 of .*'{key}' are NaN or infinite in float16"):
        load_model(path, dtype=torch.float16)


OTHER_WANS = [
    ({"vace_blocks.0.before_proj.weight": (4, 4)}, "a VACE"),
    ({"vace_patch_embedding.weight": (4, 96, 1, 2, 2)}, "a VACE"),
    ({"img_emb.proj.0.bias": (4,)}, "image-to-video"),
    ({"blocks.0.cross_attn.k_img.weight": (4, 4)}, "image-to-video"),
    ({"img_emb.emb_pos": (1, 514, 4)}, "first and a last frame"),
    ({"face_adapter.fuser_blocks.0.k_norm.weight": (4,)}, "an Animate"),
    ({"pose_patch_embedding.weight": (4, 16, 1, 2, 2)}, "an Animate"),
    ({"casual_audio_encoder.encoder.final_linear.weight": (4, 4)}, "speech-to-video"),
    ({"audio_proj.audio_proj_glob_1.layer.bias": (4,)}, "a HuMo"),
    ({"audio_proj.proj1.weight": (4, 4)}, "a MultiTalk"),
    ({"control_adapter.conv.weight": (4, 4, 2, 2)}, "camera control"),
    ({"ref_conv.weight": (4, 16, 2, 2)}, "Fun Control"),
    ({"patch_embedding_pose.weight": (4, 20, 1, 2, 2)}, "a SCAIL"),
    ({"fps_embedding.weight": (2, 4)}, "a SkyReels"),
    ({"blocks.0.self_attn.to_gate_compress.weight": (4, 4)}, "sparse attention"),
    ({"patch_embedding.weight": (24, 36, 1, 2, 2)}, "inpainting.* reads 36 channels and writes 16"),
    ({"patch_embedding.weight": (24, 48, 1, 2, 2)}, "Fun Control: it reads 48"),
    ({"patch_embedding.weight": (24, 99, 1, 2, 2)}, "of an unknown kind: it reads 99"),
]


@pytest.mark.parametrize(("extra", "kind"), OTHER_WANS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_other_wans_are_named(
    prefix: str,
    extra: dict[str, tuple[int, ...]],
    kind: str,
    wan: None,
    originals: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    tensors = originals["wan"] | {key: torch.ones(shape) for key, shape in extra.items()}
    path = save(tmp_path / "x.safetensors", {prefix + k: v for k, v in tensors.items()})
    for arguments in ({}, {"architecture": "wan_tiny"}):
        with pytest.raises(CheckpointError, match=f"is .*{kind}.*only plain text-to-video"):
            load_model(path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["vace_blocks.0.before_proj.weight"], "without the Wan"),
        (["controlnet_blocks.0.weight", "pos_embed_input.proj.weight"], "a ControlNet"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["encoder.conv1.weight", "decoder.conv1.weight"], r"autoencoder \(VAE\)"),
        (["first_stage_model.encoder.x.weight", "first_stage_model.decoder.x.weight"], "VAE"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "T5 or UMT5"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5 or UMT5"),
        (["token_embedding.weight", "blocks.0.ffn.gate.0.weight"], "UMT5 .* Wan's authors"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder"),
        (["text_encoders.clip_g.transformer.text_model.encoder.layers.0.x.weight"], "CLIP text"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight"], "an image encoder"),
        (["visual.transformer.0.attn.weight", "textual.x.weight"], "an image encoder"),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.x.weight"], "FLUX"),
        (["input_blocks.0.0.weight", "output_blocks.0.0.weight"], "a U-Net"),
        (["blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
        (["lora_unet_blocks_0_ffn_0.lora_down.weight"], "a LoRA"),
        (["lycoris_blocks_0_ffn_0.lokr_w1"], "a LoKr"),
        (["lycoris_blocks_0_ffn_0.hada_w1_a"], "a LoHa"),
        (["patch_embedding.diff_b", "blocks.0.norm_k.diff", "blocks.0.ffn.0.diff"], "cut from"),
    ],
)
def test_files_that_are_no_transformer_are_named(
    keys: list[str], kind: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "x.safetensors", {key: torch.ones(2) for key in keys})
    with pytest.raises(CheckpointError, match=f"is .*{kind}"):
        load_model(path)
    # The command line, and one line.
    assert str(path) in error_line(invoke("generate", "--model", path, "--prompt", "x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "is a web page"),
        (b"\n <html><body>log in</body></html>", "is a web page"),
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
    ],
)
def test_files_that_are_no_safetensors_are_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for arguments in ({}, {"architecture": "wan2.1_t2v_1.3b"}):
        with pytest.raises(CheckpointError, match=message):
            load_model(path, **arguments)  # type: ignore[arg-type]
    assert message in error_line(invoke("generate", "--model", path, "--prompt", "x"))
    assert message in error_line(invoke("generate", "--prompt", "a red one", "--lora", path))


def test_a_size_that_is_not_registered_is_described(
    originals: dict[str, Tensors], tmp_path: Path
) -> None:
    path = save(tmp_path / "x.safetensors", originals["wan"])
    with pytest.raises(CheckpointError, match="it has 2 blocks and is 24 wide"):
        load_model(path)


@pytest.mark.slow
def test_released_models_are_none_of_the_other_kinds() -> None:
    for name in MODELS.names():
        config = MODELS.get(name)()
        for key in FAMILIES.names():
            family = FAMILIES.create(key)
            if type(config) is family.config_class:
                with torch.device("meta"):
                    model = create_model(name)
                shapes = {k: tuple(v.shape) for k, v in state(model).items()}
                assert family.relative(shapes) is None, name


def test_one_file_generates_with_the_parts_of_the_published_model(
    folders: dict[str, Path],
    originals: dict[str, Tensors],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The repository of the entry is a folder here."""
    import dataclasses

    register("wan", folders, monkeypatch)
    entries = MODELS.pretrained("wan2.1_t2v_1.3b")
    tiny = {tag: dataclasses.replace(e, repo=str(folders["wan"])) for tag, e in entries.items()}
    monkeypatch.setitem(MODELS._pretrained, "wan_tiny", tiny)
    tensors = {f"model.diffusion_model.{key}": v for key, v in originals["wan"].items()}
    path = save(tmp_path / "x.safetensors", tensors)
    options = ["--prompt", "a red seven", "--frames", "5", "--height", "16", "--width", "16"]
    pictures = []
    for model in (path, folders["wan"]):
        out = tmp_path / f"{model.stem}.png"
        result = invoke("generate", "--model", model, *options, "--num-steps", "1", "--out", out)
        assert result.returncode == 0, result.stderr
        pictures.append(Image.open(out).tobytes())  # its tags name the model
    assert pictures[0] == pictures[1]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apt.checkpoints.reading import inert, read_json, read_pipeline
from apt.errors import CheckpointError


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"auto_map": "owner/name--evil.Model"}, "auto_map"),
        ({"text_config": {"vision": [{"auto_map": ["evil.A", None]}]}}, "text_config.vision"),
        ({"Auto_Map": {"a": "b"}}, "Auto_Map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"encoder": {"trust_remote_code": 1}}, "encoder.trust_remote_code"),
        ({"custom_pipeline": "owner/evil"}, "custom_pipeline"),
        ({"custom_generate": "owner/evil"}, "custom_generate"),
        ({"_attn_implementation": "owner/kernel"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "owner/kernel:f"}, "_attn_implementation_internal"),
        ({"attn_implementation": {"text_config": "owner/k"}}, "attn_implementation"),
        ({"sub": {"_experts_implementation": "owner/k@v1"}}, "sub._experts_implementation"),
        ({"kernel_config": {"RMSNorm": ["owner/layer_norm:N"]}}, "kernel_config"),
        ({"hub_kernels": ["owner/k"]}, "hub_kernels"),
        ({"attention_backend": "owner/k"}, "attention_backend"),
        ({"_class_name": ["pipeline", "Evil"]}, "_class_name"),
        ({"scheduler": {"_class_name": ["x", "Evil"]}}, "scheduler._class_name"),
        ({"_class_name": "owner/name--Evil"}, "_class_name"),
    ],
)
def test_what_names_code_is_refused_with_file_and_key(document: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match="code of models is never run") as caught:
        inert(document, "some/config.json")
    assert "'some/config.json'" in str(caught.value) and key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_choices_of_an_implementation_are_dropped_and_the_rest_stays() -> None:
    kept = {
        "_class_name": "AutoencoderKL",
        "_name_or_path": "google/umt5-xxl",
        "kernel_size": [3, [3, 3]],
        "conv_kernel": 4,
        "d_model": 8,
        "sub": {"list": [{"a": "b/c"}], "backend": "tokenizers"},
    }
    dropped = {
        "_attn_implementation": "flash_attention_2",
        "_attn_implementation_autoset": True,
        "attn_implementation": None,
        "use_kernels": True,
        "auto_map": {},
        "trust_remote_code": False,
    }
    document = {**kept, **dropped, "sub": {**kept["sub"], **dropped}}  # type: ignore[dict-item]
    assert inert(document, "x") == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must contain a JSON object"),
        ('{"a": ' + "[" * 100_000, "nested deeper"),
        (None, "is missing"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_a_folder_named_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .* Is a directory"):
        read_json(tmp_path / "config.json")


def test_a_pipeline_of_known_libraries(tmp_path: Path) -> None:
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "pe_sizes": [1, 2],
        "names": ["one", "two", "three"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert read_pipeline(tmp_path / "model_index.json") == (index, ["vae", "tokenizer"])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"transformer": ["evil", "Model"]}, "names code, .* under 'transformer'"),
        ({"vae": ["diffusers.evil", "Model"]}, "names code, .* under 'vae'"),
        ({"../victim": ["diffusers", "Model"]}, "'../victim', which is not the name of a folder"),
        ({"/tmp": ["diffusers", "Model"]}, "not the name of a folder"),
        ({"_class_name": ["pipeline", "Evil"]}, "names code"),
    ],
)
def test_a_pipeline_with_code_or_parts_elsewhere(
    tmp_path: Path, index: dict[str, Any], message: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_pipeline(tmp_path / "model_index.json")

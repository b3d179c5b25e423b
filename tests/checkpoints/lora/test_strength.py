"""Alpha from every place where files store it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.checkpoints.lora.files import Strength, read_strength
from apt.errors import CheckpointError

NAME = "blocks.0.attn1.to_q"
KEYS = [f"base_model.model.{NAME}.lora_A.weight"]


def scale(
    folder: Path,
    *,
    header: dict[str, str] | None = None,
    config: object = None,
    alpha: float | None = None,
    rank: int | None = 4,
    keys: list[str] = KEYS,
    file: str = "adapter_model.safetensors",
) -> float:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    strength = read_strength(folder / file, header or {}, keys)
    return strength.scale(NAME, rank, None if alpha is None else torch.tensor(alpha))


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}


def entry(**options: Any) -> dict[str, str]:
    """The header of diffusers."""
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in options.items()})
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"alpha": 2.0}, 0.5),
        ({"alpha": 0.0}, 0),
        ({"config": PEFT}, 4),
        ({"config": {"peft_type": "PeftType.LORA", "r": 4, "lora_alpha": 16}}, 4),
        ({"config": PEFT | {"use_rslora": True}}, 8),
        ({"config": PEFT | {"alpha_pattern": {"to_q": 2}}}, 0.5),
        ({"config": PEFT | {"alpha_pattern": {r"blocks\.0\..*": 2}}}, 0.5),
        ({"config": PEFT | {"alpha_pattern": {"q": 2}}}, 4),
        ({"config": PEFT | {"r": 8, "rank_pattern": {NAME: 4}}}, 4),
        ({"config": {"r": 4, "lora_alpha": None}}, 1),
        ({"config": {"peft_type": "LOKR", "r": 8, "alpha": 16}, "rank": None}, 2),
        ({"config": PEFT, "alpha": 2.0}, 0.5),
        ({"header": {"lora_alpha": "16"}}, 4),
        ({"header": {"alpha": "16.0"}}, 4),
        ({"header": {"network_alpha": "16"}}, 4),
        ({"header": {"alpha": "8", "use_rslora": "True"}}, 4),
        ({"header": {"ss_network_alpha": "16", "ss_network_dim": "4"}}, 4),
        ({"header": {"ss_network_alpha": "None"}}, 1),
        ({"header": {"ss_network_alpha": "16"}, "alpha": 2.0}, 0.5),
        ({"header": entry(r=4, lora_alpha=16)}, 4),
        ({"header": entry(r=4, lora_alpha=16, use_rslora=True)}, 8),
        ({"header": {"lora_adapter_metadata": json.dumps({"transformer": PEFT})}}, 4),
        ({"header": {"adapter_config": json.dumps(PEFT)}}, 4),
        ({"header": {"config": json.dumps({"transformer": {"image_model": "wan"}})}}, 1),
        # Whole matrices of a LoKr are what they are.
        ({"alpha": 2.0, "rank": None}, 1),
        ({"rank": None}, 1),
    ],
)
def test_where_alpha_stands(given: dict[str, Any], expected: float, tmp_path: Path) -> None:
    assert scale(tmp_path, **given) == pytest.approx(expected)


def test_a_converter_that_keeps_the_header_of_what_it_has_multiplied_in(tmp_path: Path) -> None:
    """musubi-tuner's convert_lora writes diffusion_model.*.lora_A from kohya's file with alpha
    multiplied into the factors, but copies the header."""
    header = {"ss_network_alpha": "16"}
    converted = [f"diffusion_model.{NAME}.lora_A.weight"]
    assert scale(tmp_path, header=header, keys=converted) == 1
    kohya = ["lora_unet_blocks_0_self_attn_q.lora_down.weight"]
    assert scale(tmp_path, header=header, keys=kohya) == 4


def test_a_description_of_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    assert scale(tmp_path, config=PEFT, file="mine.safetensors") == 1
    (tmp_path / "adapter_model.safetensors").unlink()
    assert scale(tmp_path, config=PEFT, file="mine.safetensors") == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": PEFT | {"r": 8}}, "states rank 8 for .*, whose factors have rank 4"),
        ({"header": entry(r=8, lora_alpha=8)}, "states rank 8"),
        ({"config": PEFT | {"lora_alpha": "many"}}, "lora_alpha must be a finite number"),
        ({"config": PEFT | {"lora_alpha": float("nan")}}, "lora_alpha must be a finite number"),
        ({"config": PEFT | {"lora_alpha": 10**400}}, "lora_alpha must be a finite number"),
        ({"config": PEFT | {"lora_alpha": True}}, "lora_alpha must be a finite number"),
        ({"config": PEFT | {"r": 0}}, "r must be an integer above 0"),
        ({"config": PEFT | {"r": 2.5}}, "r must be an integer above 0"),
        ({"config": PEFT | {"alpha_pattern": [1]}}, "alpha_pattern must be an object"),
        ({"config": PEFT | {"alpha_pattern": {"(": 1}}}, "an invalid pattern"),
        ({"config": PEFT | {"alpha_pattern": {"to_q": "x"}}}, "alpha_pattern must be a finite"),
        ({"config": {"peft_type": "OFT", "r": 4}}, "of the type OFT"),
        ({"config": PEFT | {"init_lora_weights": "pissa_niter_4"}}, "init_lora_weights = 'pissa"),
        ({"config": "{"}, "not valid JSON"),
        ({"config": "[]"}, "must contain a JSON object"),
        ({"header": {"lora_adapter_metadata": "{"}}, "not valid JSON"),
        ({"header": {"lora_adapter_metadata": "[" * 100_000}}, "not valid JSON"),
        ({"header": {"alpha": "inf"}}, "alpha must be a finite number"),
        ({"header": {"lora_alpha": "a lot"}}, "alpha must be a finite number"),
    ],
)
def test_descriptions_that_cannot_be_meant(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        scale(tmp_path, **given)


@given(alpha=st.floats(-1e6, 1e6), rank=st.integers(1, 4096), rslora=st.booleans())
def test_alpha_over_rank(alpha: float, rank: int, rslora: bool) -> None:
    strength = Strength("here", alpha=alpha, rslora=rslora)
    divisor = rank**0.5 if rslora else rank
    assert strength.scale(NAME, rank, None) == pytest.approx(alpha / divisor)

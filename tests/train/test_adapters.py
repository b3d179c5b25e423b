"""Training through LoRA adapters: what trains, what stays, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.checkpoints.load import describe, load_model
from apt.checkpoints.lora import LORA_FILE, load_lora, merge_lora
from apt.errors import ConfigError
from apt.methods.base import Method
from apt.methods.flow_matching import PretrainConfig
from apt.train.config import LoRAConfig, OptimizerConfig
from tests.train.tiny_methods import (
    adversarial,
    distill,
    export_method,
    micro_batches,
    train_config,
)

pytest.importorskip("peft")

FAST = OptimizerConfig(learning_rate=1e-2)


def settings(**lora: Any) -> dict[str, Any]:
    return {"optimizer": FAST, "lora": LoRAConfig(**{"rank": 2, "alpha": 4, **lora})}


def snapshot(stage: Method, name: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in stage.trained[name].module.state_dict().items()}


def changed(before: dict[str, Tensor], stage: Method, name: str) -> set[str]:
    after = stage.trained[name].module.state_dict()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("make", [distill, adversarial])
def test_adapters_begin_as_no_change(tmp_path: Path, make: Any) -> None:
    plain = make(tmp_path / "plain", train={"optimizer": FAST})
    lora = make(tmp_path / "lora", train=settings())
    batch = micro_batches()
    z, c = batch[0].x, plain.encode(batch[0].captions)
    t = torch.ones(len(z))
    with torch.no_grad():
        expected = plain.generator.module(z, t, c)
        assert torch.equal(lora.generator.module(z, t, c), expected)


def test_only_adapters_train(tmp_path: Path) -> None:
    stage = distill(tmp_path, train=settings())
    before = snapshot(stage, "generator")
    for update in range(2):
        stage.update(micro_batches(), update)
    moved = changed(before, stage, "generator")
    assert moved and all(".lora_" in name for name in moved)
    assert moved == {name for name in before if ".lora_" in name}
    teacher = stage.teacher.state_dict()
    assert not any(".lora_" in name for name in teacher)


def test_in_the_adversarial_stage_heads_train_in_full(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train=settings())
    before = snapshot(stage, "discriminator")
    for update in range(2):
        stage.update(micro_batches(), update)
    moved = changed(before, stage, "discriminator")
    assert {name for name in before if not name.startswith("backbone.")} <= moved
    inside = {name for name in moved if name.startswith("backbone.")}
    assert inside and all(".lora_" in name for name in inside)


def test_the_discriminator_can_train_in_full(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train=settings(discriminator=False))
    before = snapshot(stage, "discriminator")
    stage.update(micro_batches(), 0)
    assert changed(before, stage, "discriminator") == set(before)


def test_targets_choose_layers_by_the_ends_of_their_names(tmp_path: Path) -> None:
    stage = distill(tmp_path / "a", train=settings(targets=("qkv",)))
    adapters = {
        name.partition(".lora_")[0] for name in snapshot(stage, "generator") if ".lora_" in name
    }
    assert adapters and all(name.endswith(".qkv") for name in adapters)
    with pytest.raises(ConfigError, match=r"to_nowhere.*qkv"):
        distill(tmp_path / "b", train=settings(targets=("qkv", "to_nowhere")))
    with pytest.raises(ConfigError, match="negative"):
        LoRAConfig(rank=-1)
    with pytest.raises(ConfigError, match="starts from random ones"):
        train_config(PretrainConfig(), lora=LoRAConfig(rank=1))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_model_is_merged_and_the_adapters_alone_make_it_from_the_start(
    tmp_path: Path, weights: str
) -> None:
    stage = distill(tmp_path, train=settings())
    for update in range(3):
        stage.update(micro_batches(), update)
    export_method(stage, tmp_path / "out", updates=3, weights=weights)
    result, start = load_model(tmp_path / "out"), load_model(tmp_path / "generator")
    assert describe(tmp_path / "out").stage == "consistency"
    assert isinstance(start, torch.nn.Module) and isinstance(result, torch.nn.Module)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    merge_lora(start, load_lora(tmp_path / "out" / LORA_FILE, start))
    for name, value in result.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], value, msg=name)
    assert any(not torch.equal(before[name], v) for name, v in result.state_dict().items())
    batch = micro_batches()[0]
    c, t = stage.encode(batch.captions), torch.ones(len(batch.x))
    trained = stage.generator
    assert trained.ema is not None
    with torch.no_grad():
        if weights == "ema":
            with trained.ema.applied(trained.module):
                expected = trained.module(batch.x, t, c)
        else:
            expected = trained.module(batch.x, t, c)
        torch.testing.assert_close(result(batch.x, t, c), expected, rtol=1e-4, atol=1e-4)


def bases(stage: Method, name: str) -> dict[str, Tensor]:
    parameters = stage.trained[name].module.named_parameters()
    return {key: value for key, value in parameters if ".base_layer." in key}


def test_networks_from_one_file_share_what_does_not_train(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train=settings(), discriminator=str(tmp_path / "generator"))
    generator, discriminator = bases(stage, "generator"), bases(stage, "discriminator")
    shared = generator.keys() & discriminator.keys()
    # But for the rows that D's last block does not need.
    assert len(shared) > 10
    assert all(
        generator[key] is discriminator[key]
        for key in shared
        if generator[key].shape == discriminator[key].shape
    )
    before = {key: value.clone() for key, value in generator.items()}
    for update in range(2):
        stage.update(micro_batches(), update)
    assert all(torch.equal(value, before[key]) for key, value in generator.items())
    assert all(p.requires_grad for n, p in stage.generator.module.named_parameters() if "lora" in n)
    distilled = distill(tmp_path / "d", train=settings())
    teacher = dict(distilled.teacher.named_parameters())
    for key, value in bases(distilled, "generator").items():
        assert value is teacher[key.replace(".base_layer.", ".")]
        assert value is dict(distilled.target.named_parameters())[key]


def test_a_base_in_bf16_is_exported_as_the_file_has_it(tmp_path: Path) -> None:
    stage = distill(tmp_path, train={**settings(), "precision": "bf16"})
    inside = bases(stage, "generator")
    assert {value.dtype for value in inside.values()} == {torch.bfloat16}
    stage.update(micro_batches(), 0)
    export_method(stage, tmp_path / "out", updates=1, weights="raw")
    result, start = load_model(tmp_path / "out"), load_model(tmp_path / "generator")
    merge_lora(start, load_lora(tmp_path / "out" / LORA_FILE, start))
    for name, value in result.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_adapters_go_on_beside_the_model_that_they_were_trained_on(tmp_path: Path) -> None:
    distilled = distill(tmp_path, train=settings())
    for update in range(2):
        distilled.update(micro_batches(), update)
    export_method(distilled, tmp_path / "out", updates=2, weights="raw")
    base = str(tmp_path / "generator")

    def go_on(**lora: Any) -> Any:
        options = settings(base=base, **lora)
        start = {"generator": str(tmp_path / "out"), "discriminator": base}
        return adversarial(tmp_path, train=options, **start)

    stage = go_on()
    exported = load_model(tmp_path / "out")
    batch = micro_batches()[0]
    c, t = stage.encode(batch.captions), torch.ones(len(batch.x))
    with torch.no_grad():
        expected = exported(batch.x, t, c)  # type: ignore[operator]
        torch.testing.assert_close(
            stage.generator.module(batch.x, t, c), expected, rtol=1e-4, atol=1e-5
        )
    key = next(iter(bases(stage, "generator")))
    assert bases(stage, "generator")[key] is bases(stage, "discriminator")[key]
    with pytest.raises(ConfigError, match="other layers"):
        go_on(targets=("qkv",))
    with pytest.raises(ConfigError, match="rank is 3"):
        go_on(rank=3)
    with pytest.raises(ConfigError, match=r"lora\.base"):
        LoRAConfig(base=base)

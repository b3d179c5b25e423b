"""Which module, and which rank, a broken update comes from."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.errors import HardwareError
from apt.train.diagnosis import check_replay, where_not_finite
from apt.train.networks import NonFiniteGradient
from tests.processes import run_main
from tests.train.tiny_methods import micro_batches, pretrain, weights


def names_of_blocks(stage: Any) -> tuple[str, torch.nn.Module]:
    """A linear layer of the last block."""
    network = stage.generator.module
    linear = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("backbone.blocks.2.")
    ]
    return linear[0]


def test_a_gradient_that_is_not_finite_names_parameter_module_and_rank() -> None:
    stage = pretrain()
    name, module = names_of_blocks(stage)
    before = weights(stage.generator.module)

    def overflow(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * torch.inf

    module.register_forward_hook(overflow)
    part = stage.parts()["generator"]
    with pytest.raises(NonFiniteGradient) as error:
        part(micro_batches(2), 0)
    assert error.value.names
    told = where_not_finite(error.value, stage.trained, part, micro_batches(2), 0)
    assert f"first the output of generator.{name} on rank 0" in told
    assert error.value.names[0] in told
    after = weights(stage.generator.module)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_gradient_alone_that_is_not_finite() -> None:
    stage = pretrain()
    name, module = names_of_blocks(stage)

    def overflow(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    handle = module.register_forward_hook(overflow)
    part = stage.parts()["generator"]
    with pytest.raises(NonFiniteGradient) as error:
        part(micro_batches(), 0)
    told = where_not_finite(error.value, stage.trained, part, micro_batches(), 0)
    assert f"the gradient at generator.{name} on rank 0" in told
    handle.remove()
    part(micro_batches(), 0)


def test_a_replay_moves_nothing_and_finds_a_rank_that_computes_otherwise() -> None:
    stage = pretrain()
    name, module = names_of_blocks(stage)
    before = weights(stage.generator.module)
    part = stage.parts()["generator"]
    check_replay(stage.trained, part, micro_batches(2)[:1], 4)
    after = weights(stage.generator.module)
    assert all(torch.equal(before[key], after[key]) for key in before)

    numbers = count()

    def drift(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        flipped = output.clone()
        flipped.view(-1)[3] += 1e-6 * next(numbers)
        return flipped

    module.register_forward_hook(drift)
    with pytest.raises(HardwareError, match="rank 0") as error:
        check_replay(stage.trained, part, micro_batches(2)[:1], 4)
    assert f"the output of generator.{name}" in str(error.value)
    assert "update 5" in str(error.value)


@pytest.mark.slow
def test_the_rank_is_named_although_gradients_are_sums_over_ranks(tmp_path: Path) -> None:
    run_main("tests.train.diagnosed_ranks", tmp_path, folder=tmp_path)
    for rank in range(2):
        not_finite, not_the_same = json.loads((tmp_path / str(rank)).read_text())
        assert "(first the output of generator.backbone.blocks.1." in not_finite
        assert "on rank 1)" in not_finite and "rank 0" not in not_finite
        assert "rank 1 (the output of generator.backbone.blocks.1." in not_the_same
        assert "rank 0" not in not_the_same

"""The speed that a run reports: operations against those that torch counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apt.methods.apt import AdversarialConfig
from apt.methods.base import MicroBatch
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.train.logs import Update, model_flops, probe_seconds, speed
from tests.train.tiny_methods import (
    CAPTIONS,
    TINY_MODEL,
    build,
    initial_bundle,
    save_start,
    single,
    train_config,
)

# So wide that text and heads are a small share beside the backbone.
WIDE = dataclasses.replace(
    TINY_MODEL, options={**TINY_MODEL.options, "hidden_size": 192, "num_heads": 4}
)
SHAPE = (2, 16, 16)


def pretrain() -> Any:
    config = train_config(PretrainConfig(), model=WIDE)
    return build(config, initial_bundle(config))


def later(name: str, folder: Path) -> Any:
    names = save_start(folder)
    methods = {
        "distill": DistillConfig(teacher=names["generator"]),
        "apt": AdversarialConfig(**names),
    }
    return build(train_config(methods[name]))


def test_operations_of_an_update_are_those_that_torch_counts() -> None:
    made = pretrain()
    batch = MicroBatch(torch.randn(len(CAPTIONS), 12, *SHAPE), list(CAPTIONS), 0)
    with FlopCounterMode(display=False) as counted:
        made.update([batch], 0)
    told = model_flops(made.passes(), SHAPE)
    assert told is not None
    assert len(CAPTIONS) * told == pytest.approx(counted.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(("name", "forwards"), [("pretrain", 3), ("distill", 6), ("apt", 15)])
def test_passes_of_the_stages(name: str, forwards: int, tmp_path: Path) -> None:
    """By hand: APT's are G 1, D 3 x 3, G 3, D 2."""
    passes = (pretrain() if name == "pretrain" else later(name, tmp_path)).passes()
    assert sum(one.samples * (1 + one.backward) for one in passes) == forwards


def test_rates() -> None:
    made = pretrain()
    found = speed(Update(2.0, 0.5, 8, SHAPE), made.passes(), single())
    assert found["speed/samples_per_second"] == 4
    assert found["speed/tokens_per_second"] == 4 * 2 * 8 * 8
    flops = model_flops(made.passes(), SHAPE)
    assert flops is not None
    assert found["speed/model_tflops_per_rank"] == pytest.approx(4 * flops / 1e12)
    assert found["speed/data_wait_seconds"] == 0.5
    assert not {"speed/mfu", "speed/slowest_rank"} & found.keys()  # a CPU, and alone
    assert probe_seconds(torch.device("cpu")) > 0

"""Compiled blocks compute the same as eager ones, in every pass of training."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.errors import ConfigError
from apt.losses import R1
from apt.methods import AdversarialConfig
from apt.methods.terms import Terms
from apt.models.checkpointing import Checkpointing
from apt.models.transformer import DiffusionTransformer
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.logs import read_log
from apt.train.trainer import run
from tests.models.backbones import CASES, Case
from tests.train.tiny_methods import save_start

# The first model of each.
FAMILIES = [*{type(case.config): name for name, case in reversed(CASES.items())}.values()]


def passed(model: DiffusionTransformer, case: Case) -> dict[str, Tensor]:
    """The results of passes with and without gradients, and the gradients."""
    x, t, c = case.inputs()
    with torch.no_grad():
        found = {"velocity": model(x, t, c)}
    x.requires_grad_()
    rows = torch.tensor([0, 1])
    (hidden,) = model.hidden_states(x, t, c, layers=(model.depth,), rows=rows)
    hidden.square().mean().backward()
    found |= {"hidden": hidden.detach(), "x": x.grad}  # type: ignore[dict-item]
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(name: str, backend: str) -> None:
    case = CASES[name]
    model = case.build(depth=2)
    expected = passed(copy.deepcopy(model), case)
    ways: tuple[bool | Checkpointing, ...] = (False, Checkpointing())
    for how in ways:
        compiled = copy.deepcopy(model)
        compiled.set_checkpointing(how)
        compiled.compile_blocks(backend, trains=True)
        found = passed(compiled, case)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert copy.deepcopy(compiled).block_list()[0]._compiled_call_impl is None


def test_blocks_are_traced_as_they_compute() -> None:
    check(FAMILIES[0], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_blocks_compute_the_same(name: str) -> None:
    check(name, "inductor")


def settings(root: Path, name: str, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        name="tiny",
        run_dir=str(root / name),
        stage=AdversarialConfig(
            generator=str(root / "generator"), discriminator=str(root / "discriminator")
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, eps=1e-3),
        num_updates=2,
        batch_size=2,
        sample_every=0,
        sample_prompts=(),
        activation_checkpointing=True,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.slow
def test_a_compiled_run_is_the_run(tmp_path: Path) -> None:
    save_start(tmp_path)
    for name, compiled in (("plain", False), ("compiled", True)):
        run(settings(tmp_path, name, compile_blocks=compiled))
    plain, compiled_log = (read_log(tmp_path / name) for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled_log, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_what_compiled_blocks_cannot_do_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"checkpointing": Checkpointing(saves_attention=True)}, "saves_attention"),
        ({"stage": AdversarialConfig(terms=Terms(exact_r1=R1(weight=1.0)))}, "exact_r1"),
    ]
    for changes, words in cases:
        with pytest.raises(ConfigError, match=f"{words}.*--no-compile-blocks"):
            settings(tmp_path, "refused", compile_blocks=True, **changes)

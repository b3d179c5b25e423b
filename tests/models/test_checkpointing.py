"""What is kept of blocks from the forward pass to the backward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apt.kernels import attention_backend
from apt.models.checkpointing import Checkpointing
from tests.models.backbones import CASES, DEPTH

FAMILIES = ("apt_8b", "mmdit_block_modulation", "sd3.5_large", "wan2.1_t2v_1.3b")
WAYS = {
    "all": None,
    "inputs": Checkpointing(),
    "attention": Checkpointing(saves_attention=True),
    "host": Checkpointing(offloads=True),
    "both": Checkpointing(saves_attention=True, offloads=True),
}


class Ops(TorchDispatchMode):
    """Counts ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(n for name, n in self.calls.items() if "flash_attention_for_cpu" in name
                   and "backward" not in name)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_the_same_gradients_and_keeps_what_it_says(family: str) -> None:
    gradients: dict[str, list[Tensor]] = {}
    attention, kept = {}, {}
    for name, way in WAYS.items():
        model = CASES[family].build()
        model.set_checkpointing(False if way is None else way)
        x, t, c = CASES[family].inputs()
        x.requires_grad_()
        packed: list[int] = []

        def pack(tensor: Tensor, packed: list[int] = packed) -> Tensor:
            packed.append(tensor.numel())
            return tensor

        with attention_backend("_native_flash"), Ops() as ops:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(x, t, c).square().sum()
            loss.backward()
        assert x.grad is not None
        gradients[name] = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        attention[name], kept[name] = ops.attention, sum(packed)
    for name, found in gradients.items():
        for value, expected in zip(found, gradients["all"], strict=True):
            assert torch.equal(value, expected), name
    once = attention["all"]
    assert once >= DEPTH
    assert attention == {"all": once, "inputs": 2 * once, "attention": once, "host": 2 * once,
                         "both": once}  # fmt: skip
    # Hooks of their own move inputs of blocks to the host; the outer hooks see only the rest.
    assert kept["host"] < kept["inputs"] < kept["all"] / 2


@pytest.mark.parametrize(
    ("family", "wide"),
    [
        ("apt_8b", True),
        ("mmdit_block_modulation", False),
        ("sd3.5_large", False),
        ("wan2.1_t2v_1.3b", False),
    ],
)
def test_the_residual_stream_under_autocast(family: str, wide: bool) -> None:
    """fp32 in families with fp32 gates, unless it is kept narrow; then bf16 in all."""
    x, t, c = CASES[family].inputs()
    found = []
    for narrow in (False, True):
        model = CASES[family].build()
        model.narrow_residual = narrow
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found.append(model.hidden_states(x, t, c, layers=range(1, DEPTH + 1)))
    as_it_is, narrowed = found
    assert {h.dtype for h in as_it_is} == {torch.float32 if wide else torch.bfloat16}
    assert {h.dtype for h in narrowed} == {torch.bfloat16}
    for value, expected in zip(narrowed, as_it_is, strict=True):
        error = (value.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.02


def test_in_fp32_a_narrow_residual_changes_nothing() -> None:
    x, t, c = CASES["apt_8b"].inputs()
    model = CASES["apt_8b"].build()
    expected = model(x, t, c)
    model.narrow_residual = True
    assert torch.equal(model(x, t, c), expected)

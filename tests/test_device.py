from __future__ import annotations

import pytest
import torch

import apt
from apt.checkpoints.load import load_bundle
from apt.device import explained_memory, find_device, require_memory, total_memory
from apt.errors import CheckpointError, InputError
from apt.pipeline import OneStepPipeline
from tests.tiny import tiny_bundle

ABSENT = f"cuda:{torch.cuda.device_count()}"


def test_devices_that_are_there() -> None:
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert find_device("meta").type == "meta"


@pytest.mark.parametrize(
    ("name", "message"),
    [(ABSENT, "there is no device"), ("tpu!", "unknown device"), ("hpu", "cannot be used here")],
)
def test_devices_that_are_not(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_device(name)
    assert "\n" not in str(caught.value)


def test_every_way_to_a_device_that_is_not_there() -> None:
    pipeline = OneStepPipeline(tiny_bundle())
    offloading = OneStepPipeline(tiny_bundle(), offload_to=torch.device("cpu"))
    for way in (
        lambda: pipeline.to(ABSENT),
        lambda: offloading.to(ABSENT),
        lambda: OneStepPipeline.from_pretrained("digits", device=ABSENT),
        lambda: load_bundle("digits", device=ABSENT),
        lambda: apt.load_model("digits", device=ABSENT),
        lambda: apt.create_model("mmdit_digits", device=ABSENT),
    ):
        with pytest.raises(InputError, match=f"there is no device '{ABSENT}'"):
            way()
    assert pipeline.device == offloading.device == torch.device("cpu"), "nothing has moved"


CPU = torch.device("cpu")


def fill(error: Exception | None = None, *shape: int) -> None:
    with explained_memory("filling a shelf", "buy another"):
        if error is not None:
            raise error
        torch.empty(*shape)


def test_what_torch_raises_becomes_one_line() -> None:
    with pytest.raises(InputError, match=r"out of memory while filling a shelf .*; buy another"):
        fill(None, 2**60)
    with pytest.raises(InputError, match="out of memory"):
        fill(None, 2**62, 2**62)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")):
        with pytest.raises(InputError, match="out of memory"):
            fill(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), CheckpointError("x"), ValueError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        fill(error)


def test_more_than_there_is_in_all() -> None:
    there = total_memory(CPU)
    assert there is None or there > 2**28
    require_memory(1, CPU, "a byte", "")
    if there is not None:
        with pytest.raises(InputError, match=r"a year of film needs more than .* cpu has .*; less"):
            require_memory(there + 1, CPU, "a year of film", "less")

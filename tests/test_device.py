from __future__ import annotations

import pytest
import torch

import apt
from apt.checkpoints.load import load_bundle
from apt.device import find_device
from apt.errors import InputError
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

"""Paths between noises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.errors import InputError
from apt.generate_options import GenerateOptions
from apt.inside import great_circle, traverse
from apt.pipeline import OneStepPipeline
from tests.tiny import tiny_bundle


@given(angle=st.floats(1e-3, 3.1), length=st.floats(0.5, 2.0), fraction=st.floats(0, 1))
def test_a_great_circle_turns_by_shares_of_the_angle(
    angle: float, length: float, fraction: float
) -> None:
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = length * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    (point,) = great_circle(a, b, torch.tensor([fraction], dtype=torch.float64))
    turned, far = fraction * angle, 1 + fraction * (length - 1)
    expected = far * torch.tensor([[math.cos(turned), math.sin(turned)]], dtype=torch.float64)
    torch.testing.assert_close(point, expected, atol=1e-9, rtol=0)


def test_equal_noises_are_a_way_that_stays() -> None:
    a = torch.randn(3, 4)
    points = great_circle(a, a.clone(), torch.linspace(0, 1, 3))
    torch.testing.assert_close(points, a.expand(3, 3, 4))


@pytest.mark.parametrize(
    ("a", "b", "said"), [(1.0, 0.0, "is all zero"), (1.0, -2.0, "are exactly opposite")]
)
def test_noises_without_a_unique_path_are_refused(a: float, b: float, said: str) -> None:
    one = torch.ones(2, 2)
    with pytest.raises(InputError, match=said):
        great_circle(a * one, b * one, torch.tensor([0.5]))


def test_a_way_passes_through_the_samples_of_its_seeds() -> None:
    pipeline = OneStepPipeline(tiny_bundle())
    way = traverse(pipeline, "a blue two", seeds=(3, 4, 8), num_between=3, closed=True)
    assert way.pixels.shape == (10, 3, 9, 32, 32)
    own = pipeline("a blue two", seed=[3, 4, 8], output_type="pt").transpose(1, 2) * 2 - 1
    torch.testing.assert_close(way.pixels[:9:3], own, atol=1e-5, rtol=0)
    assert torch.equal(way.pixels[0], way.pixels[-1])
    step = (way.pixels[1] - way.pixels[0]).square().mean().sqrt()
    torch.testing.assert_close(way.steps[0], step)
    assert way.mean_step == pytest.approx(float(way.steps.mean()))
    assert way.peak == pytest.approx(float(way.steps.max() / way.steps.mean())) and way.peak >= 1


def test_only_the_first_noise_differs_along_a_path() -> None:
    """With two steps; the noise of the second would make every step a jump."""
    pipeline = OneStepPipeline(tiny_bundle())
    how = GenerateOptions(num_steps=2, batch_size=4)
    far = traverse(pipeline, "a", num_between=1, options=how).mean_step
    near = traverse(pipeline, "a", num_between=60, options=how)
    assert near.steps.max() < far / 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seeds": (1,)}, "at least two seeds"),
        ({"seeds": (1, 1)}, "neighbouring seeds must differ"),
        ({"num_between": 0}, "at least 1"),
        ({"options": GenerateOptions(height=64)}, "the model's own size"),
    ],
)
def test_invalid_paths_are_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        traverse(OneStepPipeline(tiny_bundle()), "a", **asked)  # type: ignore[arg-type]


def test_offloaded_parts_are_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle("diffusion")
    how = GenerateOptions(num_steps=2, cfg_scale=2.0)
    expected = traverse(OneStepPipeline(bundle), "a", num_between=1, options=how)
    # Another spelling of the same device shows where a part was last sent.
    places: dict[str, str] = {}
    worked: list[tuple[str, str]] = []

    def watch(name: str, method: str) -> None:
        part: Any = getattr(bundle, name)
        real = getattr(part, method)

        def move(device: Any) -> Any:
            places[name] = str(device)
            return torch.nn.Module.to(part, device)

        def work(*args: Any) -> Any:
            worked.append((name, places[name]))
            return real(*args)

        monkeypatch.setattr(part, "to", move)
        monkeypatch.setattr(part, method, work)

    watch("text_encoder", "forward")
    watch("backbone", "forward")
    watch("codec", "decode")
    offloaded = OneStepPipeline(bundle, offload_to=torch.device("cpu", 0))
    found = traverse(offloaded, "a", num_between=1, options=how)
    here = ("text_encoder", "backbone", "codec")
    assert set(worked) == {(name, "cpu:0") for name in here}
    assert places == dict.fromkeys(here, "cpu")
    torch.testing.assert_close(found.pixels, expected.pixels, atol=1e-5, rtol=0)

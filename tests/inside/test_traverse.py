"""Ways between noises."""

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


@pytest.mark.parametrize(("a", "b", "said"), [(1.0, 0.0, "is zero"), (1.0, -2.0, "are opposite")])
def test_where_there_is_no_one_way(a: float, b: float, said: str) -> None:
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


def test_what_differs_along_a_way_is_the_first_noise_alone() -> None:
    """In two steps: the noise of the second would make every step a jump."""
    pipeline = OneStepPipeline(tiny_bundle())
    how = GenerateOptions(num_steps=2, batch_size=4)
    far = traverse(pipeline, "a", num_between=1, options=how).mean_step
    near = traverse(pipeline, "a", num_between=60, options=how)
    assert near.steps.max() < far / 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seeds": (1,)}, "two seeds"),
        ({"seeds": (1, 1)}, "each other than the last"),
        ({"num_between": 0}, "at least 1"),
        ({"options": GenerateOptions(height=64)}, "the model's own size"),
    ],
)
def test_ways_that_are_none_are_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        traverse(OneStepPipeline(tiny_bundle()), "a", **asked)  # type: ignore[arg-type]


def test_parts_that_are_offloaded_come_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle("diffusion")
    how = GenerateOptions(num_steps=2, cfg_scale=2.0)
    expected = traverse(OneStepPipeline(bundle), "a", num_between=1, options=how)
    parts: dict[str, Any] = {
        name: getattr(bundle, name) for name in ("text_encoder", "backbone", "codec")
    }
    # Another spelling of the same device tells where a part was sent to last.
    place = dict.fromkeys(parts, "cpu")
    worked: list[tuple[str, str]] = []
    for name, part in parts.items():

        def move(device: Any, name: str = name, part: Any = part) -> Any:
            place[name] = str(device)
            return torch.nn.Module.to(part, device)

        monkeypatch.setattr(part, "to", move)
    for name, part, method in (
        ("text_encoder", parts["text_encoder"], "forward"),
        ("backbone", parts["backbone"], "forward"),
        ("codec", parts["codec"], "decode"),
    ):

        def work(*args: Any, name: str = name, real: Any = getattr(part, method)) -> Any:
            worked.append((name, place[name]))
            return real(*args)

        monkeypatch.setattr(part, method, work)
    offloaded = OneStepPipeline(bundle, offload_to=torch.device("cpu", 0))
    found = traverse(offloaded, "a", num_between=1, options=how)
    assert {name for name, _ in worked} == set(parts)
    assert {where for _, where in worked} == {"cpu:0"}
    assert set(place.values()) == {"cpu"}
    assert torch.equal(found.pixels, expected.pixels)

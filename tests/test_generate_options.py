from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.errors import InputError
from apt.generate_options import DIFFUSERS_NAMES, GenerateOptions, OptionNames


def test_keywords_are_the_fields_and_what_diffusers_calls_them() -> None:
    fields = typing.get_type_hints(GenerateOptions)
    keywords = typing.get_type_hints(OptionNames)
    assert keywords.keys() == fields.keys() | DIFFUSERS_NAMES.keys()
    assert set(DIFFUSERS_NAMES.values()) <= fields.keys()
    for name, kind in keywords.items():
        own = fields[DIFFUSERS_NAMES.get(name, name)]
        # Any sequence becomes a tuple.
        assert kind == own or name == "timesteps", name


@given(
    num_steps=st.none() | st.integers(1, 9),
    cfg_scale=st.none() | st.floats(0, 20),
    frames=st.none() | st.integers(1, 99),
)
def test_a_name_of_diffusers_is_the_option(
    num_steps: int | None, cfg_scale: float | None, frames: int | None
) -> None:
    theirs = GenerateOptions().replace(
        {"num_inference_steps": num_steps, "guidance_scale": cfg_scale, "num_frames": frames}
    )
    assert theirs == GenerateOptions(num_steps=num_steps, cfg_scale=cfg_scale, frames=frames)


def test_other_options_stay_as_they_are() -> None:
    before = GenerateOptions(height=16, num_steps=3)
    assert before.replace({"num_inference_steps": 2}) == GenerateOptions(height=16, num_steps=2)
    assert before.replace({}) == before


@pytest.mark.parametrize("grid", [[1, 0.6, 0], torch.tensor([1, 0.5, 0]), (1, 0)])
def test_a_grid_becomes_a_tuple_of_numbers(grid: typing.Any) -> None:
    made = GenerateOptions().replace({"timesteps": grid}).timesteps
    assert made == tuple(float(t) for t in grid)
    hash(dataclasses.replace(GenerateOptions(), timesteps=made))


@pytest.mark.parametrize(("theirs", "ours"), DIFFUSERS_NAMES.items())
def test_one_option_has_one_value(theirs: str, ours: str) -> None:
    for names in ((theirs, ours), (ours, theirs)):
        with pytest.raises(InputError, match=f"{names[0]} and {names[1]} are the same option"):
            GenerateOptions().replace(dict.fromkeys(names, 1))


@pytest.mark.parametrize(
    ("name", "close"),
    [("guidance", "guidance_scale"), ("num_step", "num_steps"), ("fps", "frames")],
)
def test_an_unknown_name_is_told_with_what_it_may_mean(name: str, close: str) -> None:
    with pytest.raises(InputError, match=f"no option '{name}'.*{close}"):
        GenerateOptions().replace({name: 1})

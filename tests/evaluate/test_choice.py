"""Naming models."""

from __future__ import annotations

import pytest

from apt.errors import CheckpointError, InputError
from apt.evaluate.choice import check_model, parse_model, parse_name
from apt.generate_options import GenerateOptions


def test_names_and_options() -> None:
    assert parse_name("out/apt/") == ("apt", "out/apt/")
    assert parse_name("x=out/apt") == ("x", "out/apt")
    assert parse_name("owner/name@main") == ("name@main", "owner/name@main")
    assert parse_name("diffusers:owner/name") == ("name", "diffusers:owner/name")
    assert parse_name("a/b=c/d.e") == ("d.e", "a/b=c/d.e")
    choice = parse_model("two=a,b/digits,num_steps=2,guidance_scale=1.5,fps=8")
    assert (choice.name, choice.place, choice.fps) == ("two", "a,b/digits", 8)
    assert (choice.options.num_steps, choice.options.cfg_scale) == (2, 1.5)
    for wrong in ("a b=x", "..", "=x"):
        with pytest.raises(InputError, match="cannot be the name of a model"):
            parse_name(wrong)
    with pytest.raises(InputError, match="no option 'num_step'"):
        parse_model("digits,num_step=2")
    with pytest.raises(InputError, match="fps must be above 0"):
        parse_model("digits,fps=many")


def test_a_size_of_its_own_goes_before_the_protocols() -> None:
    choice = parse_model("digits,height=64")
    sized = choice.sized(GenerateOptions(frames=1, height=32, width=32, num_steps=7))
    options = sized.options
    assert (options.frames, options.height, options.width) == (1, 64, 32)
    assert options.num_steps is None


def test_a_model_that_is_nowhere_is_one_line_with_near_names() -> None:
    check_model(parse_model("digits"))
    check_model(parse_model("flux-schnell"))
    for text, near in (("digitz", "'digits'"), ("sdxl_turbo", "'sdxl-turbo'")):
        with pytest.raises(CheckpointError, match=near):
            check_model(parse_model(text))
    for text, option in (("flux-schnell,fps=8", "no fps"), ("digits,unet=a", "no unet")):
        with pytest.raises(InputError, match=option):
            check_model(parse_model(text))
    with pytest.raises(CheckpointError, match="there is no model 'diffusers:nowhere'"):
        check_model(parse_model("diffusers:nowhere"))

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing

import pytest

from apt.errors import InputError
from apt.losses import LOSSES, create, create_loss, list_losses

NAMES = [
    "approximate_r1",
    "approximate_r2",
    "consistency",
    "feature_matching",
    "flow_matching",
    "hinge",
    "least_squares",
    "logit_centring",
    "mismatched_condition",
    "non_saturating",
    "r1",
    "relativistic",
]


def test_every_loss_of_the_plan_is_registered() -> None:
    assert list_losses() == NAMES
    assert list_losses("approximate_*") == ["approximate_r1", "approximate_r2"]


def test_every_name_has_its_type_for_checkers() -> None:
    """Read from the source: Python 3.10 keeps no overloads."""
    typed = {}
    for node in ast.walk(ast.parse(inspect.getsource(create))):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            annotation = node.args.posonlyargs[0].annotation
            assert annotation is not None and node.returns is not None
            kind = eval(ast.unparse(annotation), {"Literal": typing.Literal, "str": str})
            typed.update(dict.fromkeys(typing.get_args(kind), ast.unparse(node.returns)))
    assert typed == {name: LOSSES.get(name).__name__ for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_frozen_values_with_a_summary(name: str) -> None:
    loss = create_loss(name)
    assert loss == create_loss(name)
    assert hash(loss) == hash(create_loss(name))
    assert LOSSES.summary(name).endswith((".", ":"))
    assert "(" not in LOSSES.summary(name)[:1]  # dataclasses' own docstring is a signature
    for field in dataclasses.fields(loss):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loss, field.name, 1)


def test_the_papers_values_are_the_defaults() -> None:
    r1 = create_loss("approximate_r1")
    assert (r1.weight, r1.sigma, r1.normalize, r1.fraction) == (100.0, 0.1, None, 1.0)
    consistency = create_loss("consistency")
    assert (consistency.cfg_scale, consistency.timestep_shift) == (7.5, 1.0)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(InputError, match="approximate_r1"):
        create_loss("aproximate_r1")
    with pytest.raises(InputError, match="sigma"):
        create_loss("approximate_r1", sigm=0.1)
    with pytest.raises(InputError, match="weight"):
        create_loss("approximate_r1", weight="100")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("approximate_r1", {"weight": -1.0}),
        ("approximate_r1", {"weight": float("nan")}),
        ("approximate_r1", {"sigma": 0.0}),
        ("approximate_r1", {"sigma": float("inf")}),
        ("approximate_r1", {"fraction": 0.0}),
        ("approximate_r1", {"fraction": 1.01}),
        ("approximate_r1", {"normalize": "sigma"}),
        ("approximate_r2", {"sigma": -0.1}),
        ("r1", {"weight": -1.0}),
        ("logit_centring", {"weight": float("inf")}),
        ("feature_matching", {"weight": -1.0}),
        ("mismatched_condition", {"weight": -1.0}),
        ("mismatched_condition", {"objective": "relativistic"}),
        ("mismatched_condition", {"objective": "approximate_r1"}),
        ("mismatched_condition", {"objective": "hing"}),
        ("consistency", {"num_timesteps": 0}),
        ("consistency", {"num_timesteps": 10.0}),
        ("consistency", {"cfg_scale": -1.0}),
        ("consistency", {"timestep_shift": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        create_loss(name, **options)

"""Configurations in files: errors say what is missing or does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from apt.errors import ConfigError, InputError
from apt.train.config import ModelConfig, TrainConfig
from apt.train.config_file import plain, read_configs
from apt.train.recipe_names import stages_of
from apt.train.recipes import RECIPES
from apt.train.recipes_digits import digits_apt


def read(tmp_path: Path, document: Any) -> TrainConfig:
    (tmp_path / "c.json").write_text(json.dumps(document))
    (config,) = read_configs(tmp_path / "c.json")
    return config


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    made = RECIPES.get(name)()
    configs = [made] if isinstance(made, TrainConfig) else list(made)
    (tmp_path / "c.json").write_text(json.dumps([plain(config) for config in configs]))
    assert read_configs(tmp_path / "c.json") == configs


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_powershell_writes_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(plain(digits_apt())), encoding=encoding)
    assert read_configs(tmp_path / "c.json") == [digits_apt()]


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    short = {"name": "n", "run_dir": "r", "stage": {"method": "apt", "generator": "g"}}
    config = read(tmp_path, short)
    assert config == TrainConfig(
        name="n", run_dir="r", stage=dataclasses.replace(type(digits_apt().stage)(), generator="g")
    )


def test_what_a_stage_takes_from_elsewhere_is_null(tmp_path: Path) -> None:
    codec, pretrain, distill, _ = (plain(config) for config in stages_of(RECIPES.get("own")()))
    assert codec["model"]["codec"] == "video_ae"
    assert pretrain["stage"]["codec"] and pretrain["model"]["codec"] is None
    assert distill["model"] is None
    assert read(tmp_path, pretrain).model.codec == ModelConfig().codec
    asked = {**distill, "model": {"name": "mmdit_mini"}}  # which it does not look at
    assert plain(read(tmp_path, asked))["model"]["name"] == "mmdit_mini"
    for wrong in ({"data": None}, {"seed": None}):
        with pytest.raises(InputError, match="must be"):
            read(tmp_path, {**distill, **wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, "takes no option 'batchsize'; did you mean 'batch_size'"),
        ({"batch_size": "4"}, "option 'batch_size' must be int, got '4'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"data": {"pth": "x"}}, "data takes no option 'pth'; did you mean 'path'"),
        ({"data": 3}, "data: expected an object with fields, got 3"),
        ({"stage": {"method": "apt", "r1": {"weigth": 1.0}}}, "stage: r1 takes no option 'weigth'"),
        ({"stage": {"method": "aptt"}}, "unknown method 'aptt'; did you mean 'apt'"),
        ({"stage": {"generator": "g"}}, "which method they belong to"),
        ({"snapshot_at": [1, "x"]}, "option 'snapshot_at' must be"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, {**plain(digits_apt()), **changes})
    assert message in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "an object"),
        ("{}", "name, run_dir, stage"),
    ]:
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_configs(tmp_path / "c.json")


def test_what_is_wrong_with_one_of_several_is_told_with_its_number(tmp_path: Path) -> None:
    several = [plain(config) for config in stages_of(RECIPES.get("own")())]
    several[2]["data"] = {**several[2]["data"], "pth": "x"}
    (tmp_path / "c.json").write_text(json.dumps(several))
    with pytest.raises(InputError, match=r"c.json, stage 3: data takes no option 'pth'"):
        read_configs(tmp_path / "c.json")


def test_a_stage_without_its_method_is_known_by_its_fields(tmp_path: Path) -> None:
    document = plain(digits_apt())
    del document["stage"]["method"]  # a run of an earlier version
    assert read(tmp_path, document) == digits_apt()

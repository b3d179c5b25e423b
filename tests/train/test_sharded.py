"""Training on several ranks equals that on one: weights, metrics, averages and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import run_main
from tests.train.sharded import LAYOUTS

# What one rank does, and what several do; both passes of D, each gone back through by itself, are
# the one that all groups share.
STAGES = {"pretrain": "pretrain", "distill": "distill", "apt": "apt", "apart": "apt"}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four", "hybrid", "once")]


class Found:
    """The results of layouts of ranks, each computed when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights: dict[str, dict[str, dict[str, Tensor]]] = {}

    def weights(self, name: str) -> dict[str, dict[str, Tensor]]:
        self._need(name)
        if name not in self._weights:
            self._weights[name] = torch.load(self.folder / f"{name}.pt")
        return self._weights[name]

    def report(self, name: str, rank: int = 0) -> dict[str, Any]:
        self._need(name)
        return json.loads((self.folder / f"{name}.{rank}.json").read_text())

    def _need(self, name: str) -> None:
        if (self.folder / f"{name}.pt").is_file():
            return
        # Together, except those that quick tests ask for alone.
        alone = name in ("one", "two")
        names = [name] if alone else ["four", "hybrid", "once"]
        run_main("tests.train.sharded", self.folder, names, folder=self.folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("sharded"))


def distance(value: Tensor, expected: Tensor) -> float:
    """Relative, in the norm of the whole tensor."""
    scale = expected.double().norm().clamp_min(1e-6)
    return float((value.double() - expected.double()).norm() / scale)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_averages_and_targets_are_those_of_one_rank(
    found: Found, name: str, stage: str, precision: str
) -> None:
    expected = found.weights("one")[f"{STAGES[stage]} {precision}"]
    got = found.weights(name)[f"{stage} {precision}"]
    assert got.keys() == expected.keys()
    apart = {part: distance(value, expected[part]) for part, value in got.items()}
    worst = max(apart, key=apart.__getitem__)
    # The same bf16 gradients are added up: only the order of fp32 sums differs.
    assert apart[worst] < (1e-5 if precision == "fp32" else 2e-3), (worst, apart[worst])


def of_all_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Without those of the collapse monitor, which sees only the first rank's samples."""
    return {key: value for key, value in metrics.items() if not key.startswith("samples/")}


@pytest.mark.parametrize("name", SLOW)
def test_metrics_are_those_of_one_rank(found: Found, name: str) -> None:
    expected, got = found.report("one"), found.report(name)
    del expected["stream"]  # no training
    for key, values in expected.items():
        tolerance = 1e-5 if key.endswith("fp32") else 2e-2
        for update in ("metrics 0", "metrics 1"):
            alike, found_alike = of_all_ranks(values[update]), of_all_ranks(got[key][update])
            assert found_alike == pytest.approx(alike, rel=tolerance, abs=1e-5), key


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_that_of_one_rank(found: Found, name: str, stage: str) -> None:
    found.weights(name)
    found.weights("one")
    got, expected = (
        load_file(found.folder / who / made / "transformer.safetensors")
        for who, made in ((name, stage), ("one", STAGES[stage]))
    )
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert distance(got[key], value) < 1e-5, key


@pytest.mark.parametrize("name", ["one", *SLOW])
def test_no_rank_holds_a_whole_model_while_it_is_loaded(found: Found, name: str) -> None:
    ranks = LAYOUTS[name][0]
    copies = LAYOUTS[name][1].replicate
    for rank in range(ranks):
        stream = found.report(name, rank)["stream"]
        # Its share, rounded up to whole rows, and never a whole tensor beside it.
        assert stream["share"] <= 1.05 * stream["whole"] * copies / ranks
        assert stream["loading"] <= stream["share"] + stream["largest"]


@pytest.mark.parametrize("name", ["one", *SLOW])
def test_a_model_goes_from_its_ranks_to_a_file_one_tensor_at_a_time(
    found: Found, name: str
) -> None:
    ranks = LAYOUTS[name][0]
    for rank in range(ranks):
        stream = found.report(name, rank)["stream"]
        # Gathered, and beside it what the collective gathers into.
        assert stream["saving"] <= 3 * stream["largest"] < stream["whole"] / 8
    folder = found.folder / "deep"
    written = (folder / f"{name}.safetensors").read_bytes()
    assert written == (folder / "whole.safetensors").read_bytes()

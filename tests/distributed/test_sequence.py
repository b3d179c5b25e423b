"""Ranks that share the tokens of the same samples compute the same as one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.distributed.sequence import SequenceGroup
from apt.errors import ConfigError, InputError
from apt.kernels import attention
from tests.models.backbones import CASES
from tests.processes import run_main
from tests.train.own_classes import Mixer

BAR = 1e-5  # relative, in fp32


def distances(folder: Path, kind: str) -> dict[str, dict[str, dict[str, float]]]:
    run_main("tests.distributed.token_splits", folder, kind, folder=folder)
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """For two and four ranks, how far each rank is from one process."""
    return distances(tmp_path_factory.mktemp("splits"), "quick")


def assert_all_near(found: dict[str, dict[str, dict[str, float]]], part: str) -> None:
    assert len(found) == 2 + 4
    for rank, of_rank in found.items():
        names = [name for name in of_rank if name.startswith(part)]
        assert names
        for name in names:
            far = {what: apart for what, apart in of_rank[name].items() if not apart < BAR}
            assert not far, (rank, name, far)


@pytest.mark.parametrize("part", ["attention", "query_pooling", "velocity", "discriminator"])
def test_ranks_compute_what_one_does(found: Any, part: str) -> None:
    assert_all_near(found, part)


def test_traffic_of_a_block_is_as_documented(found: Any) -> None:
    """docs/sequence.md: D numbers of a token are H Dh."""
    for rank, of_rank in found.items():
        size = int(rank.partition("-")[0])
        for heads in (2, 6):
            counted = of_rank[f"traffic/{heads}"]
            u = math.gcd(size, heads)
            own, width = 24 // size, 4 * heads
            queries_and_output = 2 * own * width * (u - 1) / u
            keys_and_values = 2 * own * width * (size - 1) / u
            for way in ("forward", "backward"):
                assert counted[f"{way} calls"] == 4
                assert counted[f"{way} numbers"] == queries_and_output + keys_and_values


@pytest.mark.slow
def test_every_backbone_and_compiled_blocks(tmp_path: Path) -> None:
    found = distances(tmp_path, "all")
    for part in ("velocity", "discriminator", "compiled"):
        assert_all_near(found, part)


def ranks(size: int) -> list[SequenceGroup]:
    """Ranks of a group that nobody has joined: enough to ask which rank has which tokens."""
    nobody = cast("torch.distributed.ProcessGroup", None)
    return [SequenceGroup(nobody, rank, size) for rank in range(size)]


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 12))
def test_shares_are_all_tokens_in_order(size: int, visual: int, text: int) -> None:
    places = torch.arange(visual + text)[None]
    shares, ordered = [], []
    for group in ranks(size):
        split, other = group.split(visual), group.split(text)
        assert max(split.lengths) - min(split.lengths) <= 1
        shares.append(split.own(places[:, :visual]))
        mine = other.own(places[:, visual:])
        ordered.append(torch.cat([shares[-1], mine], dim=1))
        assert ordered[-1].shape[1] == split.beside(other).length
        assert torch.equal(split.beside(other).own(split.order(places, other)), ordered[-1])
    assert torch.equal(torch.cat(shares, dim=1), places[:, :visual])


@pytest.mark.parametrize(
    ("heads", "size", "rows"), [(12, 8, 2), (24, 8, 1), (40, 8, 1), (12, 4, 1), (3, 4, 4)]
)
def test_rows_are_as_few_as_heads_allow(heads: int, size: int, rows: int) -> None:
    assert ranks(size)[0].rows(heads) == rows


def test_fewer_tokens_than_ranks_are_refused() -> None:
    model = CASES["apt_8b"].build()
    model.split_tokens(ranks(9)[0])
    with pytest.raises(InputError, match="8 tokens, too few for 9 ranks"):
        model.token_split(CASES["apt_8b"].latent_shape((1, 2, 4)))


def test_a_family_that_does_not_say_how_is_refused() -> None:
    model = Mixer.__new__(Mixer)
    with pytest.raises(ConfigError, match="does not declare how its tokens can be split"):
        model.split_tokens(ranks(2)[0])


def test_attention_asks_for_both_splits_and_their_shapes() -> None:
    q = torch.zeros(1, 4, 2, 8)
    split = ranks(2)[0].split(7)
    with pytest.raises(InputError, match="both queries and keys"):
        attention(q, q, q, queries=split)
    with pytest.raises(InputError, match="4 queries and 4 keys"):
        attention(q[:, :3], q, q, queries=split, keys=split)

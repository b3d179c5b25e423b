"""What is said of ranks and batches before anything is loaded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.distributed.mesh import Layout, ParallelConfig, RankMesh
from apt.distributed.parallel import Parallel
from apt.errors import ConfigError
from apt.losses import R1
from apt.methods.apt import AdversarialConfig
from apt.methods.flow_matching import PretrainConfig
from apt.methods.terms import Terms
from apt.models.checkpointing import Checkpointing
from apt.train.resolve import rounded
from apt.train.trainer import laid_out
from tests.train.tiny_methods import single, train_config

FOUR = Parallel(1, 4, torch.device("cpu"), RankMesh(Layout(shard=4), "cpu"))


def test_exact_r1_is_for_one_process() -> None:
    config = train_config(AdversarialConfig(terms=Terms(exact_r1=R1(weight=1.0))))
    assert laid_out(config, single()).world_size == 1
    with pytest.raises(ConfigError, match=r"exact_r1\.weight works in a single process only"):
        laid_out(config, FOUR)


def test_a_run_has_a_layout_of_its_own() -> None:
    config = train_config(PretrainConfig(), parallel=ParallelConfig(replicate=2, sequence=2))
    assert laid_out(config, FOUR).layout == Layout(2, 1, 2)
    assert laid_out(config, FOUR).data_rank == 0
    with pytest.raises(ConfigError, match="does not fit 1 rank;"):
        laid_out(config, single())


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (9062, 1, 128, 9088),
        (9062, 1, 4, 9064),
        (9062, 1, 2, 9062),
        (9062, 2, 256, 9216),
        (2048, 1, 8, 2048),
        (2048, 0, 8, 2048),
        (5, 0, 2, 5),  # a fifth more or less is another run; the loader says so
        (9062, 1, 8192, 9062),
    ],
)
def test_a_batch_is_rounded_where_that_is_next_to_nothing(
    batch: int, micro: int, ranks: int, expected: int
) -> None:
    config = train_config(PretrainConfig(), batch_size=batch, micro_batch_size=micro)
    made, said = rounded(config, ranks)
    assert made.batch_size == expected
    assert (said is None) == (expected == batch)
    assert said is None or f"rounded to {expected}" in said


@given(st.integers(1, 20_000), st.integers(0, 16), st.integers(1, 1024))
def test_rounding_divides_or_leaves_the_batch_to_be_refused(
    batch: int, micro: int, groups: int
) -> None:
    config = train_config(PretrainConfig(), batch_size=batch, micro_batch_size=micro)
    found, said = rounded(config, groups)
    assert abs(found.batch_size - batch) <= 0.02 * batch
    unit = groups * max(micro, 1)
    lower = batch // unit * unit
    near = [size for size in (lower, lower + unit) if size and abs(size - batch) <= 0.02 * batch]
    assert (found.batch_size % unit == 0) == bool(near)
    assert (said is not None) == (found != config) == (bool(near) and batch % unit != 0)


def test_ways_of_recomputing_need_recomputing() -> None:
    with pytest.raises(ConfigError, match="--activation-checkpointing"):
        train_config(PretrainConfig(), checkpointing=Checkpointing(offloads=True))

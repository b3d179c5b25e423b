"""Settings that must be made before any test module is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported, which any test may do. Without a GPU its interpreter runs
# the kernels, if asked by name; with one they are compiled, and the same tests run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Many tests start processes, each of which would compile the whole package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The default suite draws the same examples each time and keeps none. `--hypothesis-profile=explore`
# draws new ones; a GPU machine may have no hypothesis, and then runs no test that needs it.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile("repeatable")

TESTS = Path(__file__).parent
# Files that take more than ten seconds, the longest first: if one of them started last, the other
# processes would wait for it.
LONG = (
    "train/test_resume.py",
    "test_whole_way.py",
    "kernels/test_triton_query_pooling.py",
    "models/test_conformance.py",
    "kernels/test_triton_draws.py",
    "benchmarks/test_gpu_command.py",
    "evaluate/test_digits.py",
    "train/test_interrupted.py",
    "train/test_torchrun.py",
    "distributed/test_watch.py",
    "kernels/test_aot.py",
    "methods/test_own_method.py",
    "methods/test_apt.py",
    "hub/test_push_pull.py",
    "cli/test_train.py",
    "train/test_sharded.py",
    "train/test_sequence.py",
    "train/test_own_recipe.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {TESTS / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))

"""The example of docs/own_parts.md does what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from apt.data.source import DATASETS
from apt.train.config import DataConfig
from apt.train.datasets import make_dataset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_parts.md"


def test_the_module_on_the_page_is_a_data_source(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# my_module.py.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)  # dataclasses look their module up
    monkeypatch.setattr(DATASETS, "_builders", dict(DATASETS._builders))
    exec(code, module.__dict__)
    clips = make_dataset(DataConfig(source="bars", options={"count": 50}), seed=0)
    assert clips[25].pixels.shape == (3, 9, 32, 32)
    assert clips[25].caption == "a grey bar"

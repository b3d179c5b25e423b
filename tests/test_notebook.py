"""The notebook runs as it is, and is kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

PATH = Path(__file__).parents[1] / "examples" / "own_parts.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient").NotebookClient
    # The kernel is a process of its own, in another folder.
    search = [str(PATH.parents[1]), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    notebook = nbformat.read(PATH, 4)
    client(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "10/10" in said and "warning" not in said.lower().replace("[ipkernelapp] warning", "")
    assert "image/png" in outputs[-1].data

"""The Python of README.md has the types that it seems to have, for a user's own checker too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REVEALED = """
reveal_type(pipe)
reveal_type(video)
reveal_type(backbone)
reveal_type(disc)
reveal_type(r1)
reveal_type(pipe("a", num_inference_steps=2, guidance_scale=2.0, output_type="np"))
reveal_type(apt.kernels.query_pooling)
"""
WRONG = ['pipe("a", num_step=2)', 'pipe("a", guidance_scale="high")', "r1.sigam"]


def python_of(page: Path) -> str:
    """All blocks of Python, which go on from each other."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return "\n".join(blocks)


@pytest.mark.slow  # reads torch's types: a minute where mypy has no cache
def test_the_readme_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    readme = python_of(ROOT / "README.md")
    assert "OneStepPipeline" in readme and "create_discriminator" in readme
    text = "\n".join([readme + REVEALED, *WRONG])
    file = tmp_path / "readme.py"
    file.write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent",
         "--no-error-summary", str(file)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert not result.stderr, result.stderr
    errors = {int(n) for n in re.findall(r"readme\.py:(\d+): error:", result.stdout)}
    assert [text.splitlines()[n - 1] for n in sorted(errors)] == WRONG, result.stdout
    shown = re.findall(r'Revealed type is "(.*)"', result.stdout)
    assert [kind.rpartition(".")[2] for kind in shown[:5]] == [
        "OneStepPipeline", "Tensor", "DiffusionTransformer", "Discriminator", "ApproximateR1"
    ]  # fmt: skip
    assert "ndarray" in shown[5] and "Tensor" in shown[6]


@pytest.mark.slow
def test_the_readme_passes_pyright_strict(tmp_path: Path) -> None:
    """With basedpyright, which brings its own node; not among the development tools."""
    pytest.importorskip("basedpyright")
    text = "\n".join([python_of(ROOT / "README.md"), *WRONG[:2]])
    (tmp_path / "readme.py").write_text(text)
    settings = {
        "include": ["readme.py"],
        "typeCheckingMode": "strict",
        "extraPaths": [str(ROOT)],
        "pythonPath": sys.executable,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    result = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(result.stdout)["generalDiagnostics"]
    lines = [text.splitlines()[problem["range"]["start"]["line"]] for problem in found]
    assert sorted(set(lines)) == sorted(WRONG[:2]), result.stdout

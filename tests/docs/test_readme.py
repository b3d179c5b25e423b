"""The Python in README.md and docs/own_parts.md passes type checkers, as it would for a user."""

from __future__ import annotations

import json
import os
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
OBJECTS = """
import apt
from apt.data.source import ClipRequest
from my_module import Bars

my_backbone = apt.create_model("mmdit_digits")
my_encoder = apt.create_text_encoder("bytes")
my_codec = apt.create_codec("patchify")
my_clips = Bars(3, ClipRequest(frames=1, height=8, width=8))
"""
"""Names that the page on own parts takes as given."""
WRONG = ['pipe("a", num_step=2)', 'pipe("a", guidance_scale="high")', "r1.sigam"]


def blocks_of(page: str) -> list[str]:
    """The blocks of Python on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def write_own_parts(folder: Path) -> list[Path]:
    """Write the module on the page on own parts, and a script of its other block."""
    module, script = blocks_of("docs/own_parts.md")
    files = {"my_module.py": module, "objects.py": OBJECTS + script}
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


@pytest.mark.slow  # reads torch's types: a minute where mypy has no cache
def test_the_readme_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    readme = "\n".join(blocks_of("README.md"))  # which go on from each other
    assert "OneStepPipeline" in readme and "create_discriminator" in readme
    text = "\n".join([readme + REVEALED, *WRONG])
    file = tmp_path / "readme.py"
    file.write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent",
         "--no-error-summary", str(file), *map(str, write_own_parts(tmp_path))],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(tmp_path)},
    )  # fmt: skip
    assert not result.stderr, result.stderr
    others = re.findall(r"^.*(?:my_module|objects)\.py:\d+: error:.*$", result.stdout, re.MULTILINE)
    assert not others
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
    text = "\n".join([*blocks_of("README.md"), *WRONG[:2]])
    (tmp_path / "readme.py").write_text(text)
    own = write_own_parts(tmp_path)
    settings = {
        "include": ["readme.py", *(file.name for file in own)],
        "typeCheckingMode": "strict",
        "extraPaths": [str(ROOT)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    result = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(result.stdout)["generalDiagnostics"]
    assert {Path(problem["file"]).name for problem in found} <= {"readme.py"}, result.stdout
    lines = [text.splitlines()[problem["range"]["start"]["line"]] for problem in found]
    assert sorted(set(lines)) == sorted(WRONG[:2]), result.stdout

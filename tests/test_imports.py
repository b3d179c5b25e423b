"""The house rules for imports: which part may use which, and what `import apt` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import apt

ROOT = Path(__file__).resolve().parents[1]

# Each part of the package, and the parts that it may import. Itself is always allowed.
BASE = {
    "checks", "condition", "device", "distributed", "errors", "files", "flow", "outputs", "pixels",
    "registry", "rng", "untrusted", "version", "words",
}  # fmt: skip
# Files of a package that form its upper layer: they build whole models, and may import models.
UPPER_FLOORS = {
    "hub": {"card", "pull", "push"},
    "checkpoints": {"export", "load", "public", "save"},
}
MODELS = {"models", "checkpoints", "checkpoints, upper floor"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "condition": {"errors", "words"},
    "version": set(),
    "words": set(),
    "files": set(),
    "registry": {"errors"},
    "rng": {"errors"},
    "philox": set(),
    "flow": {"condition", "errors"},
    "pixels": {"errors", "words"},
    "prompts": {"errors"},
    "generate_options": {"errors", "registry"},
    "outputs": {"errors"},
    "samples": {"errors", "outputs", "untrusted"},
    "untrusted": {"errors"},
    "device": {"errors"},
    "distributed": {"errors"},
    "kernels": {"errors", "rng", "philox", "distributed"},
    "media": {"errors", "device", "files", "untrusted"},
    "hub": {"distributed", "errors", "untrusted"},
    "checkpoints": {"hub"} | BASE,
    "hub, upper floor": {"hub", "checkpoints", "models"} | BASE,
    "models": {"kernels", "checkpoints"} | BASE,
    "checkpoints, upper floor": {"models", "checkpoints"} | BASE,
    "losses": {"kernels"} | BASE,
    "data": {"media"} | BASE,
    "metrics": BASE,
    "bench": {"kernels", "models"} | BASE,
    "pipeline": {"generate_options"} | MODELS | BASE,
    "methods": {"kernels", "losses", "metrics"} | MODELS | BASE,
    "train": {"kernels", "methods", "losses", "data", "metrics", "media"} | MODELS | BASE,
    "plan": {"train", "methods", "kernels", "data"} | MODELS | BASE,
    "encode": {"data"} | MODELS | BASE,
    "evaluate": {
        "generate_options",
        "inside",
        "pipeline",
        "data",
        "metrics",
        "media",
        "prompts",
        "samples",
    }
    | MODELS
    | BASE,
    "study": {"samples", "metrics", "media"} | BASE,
    "inside": {"pipeline", "generate_options", "media"} | MODELS | BASE,
}
# Only the CLI may use `train` and `pipeline` together; the public API names both, and loads none.
ARROWS["__init__"] = set(ARROWS) - {"encode", "bench", "plan"}
ARROWS["cli"] = set(ARROWS) - {"__init__"}
ARROWS["__main__"] = {"cli", "distributed"}

OPTIONAL_PACKAGES = (
    "accelerate",
    "diffusers",
    "flash_attn",
    "flip_evaluator",
    "liger_kernel",
    "peft",
    "pi_heif",
    "pycvvdp",
    "sentencepiece",
    "torchdata",
    "torchmetrics",
    "transformers",
    "triton",
    "vizdoom",
    "waitress",
    "xformers",
)
# Too slow to load just to look up a name; functions that need them import them.
LATE_PACKAGES = ("av", "huggingface_hub", "matplotlib", "sklearn", "tensorboard", "tyro")


def part_of(module: str) -> str:
    """`apt.models.mmdit` -> `models`, `apt.hub.push` -> its upper floor, `apt` -> `__init__`."""
    _, part, file = [*module.split("."), "__init__", ""][:3]
    return f"{part}, upper floor" if file in UPPER_FLOORS.get(part, ()) else part


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, importer: str, *, is_package: bool) -> Iterator[str]:
    """Absolute names of everything of apt that a syntax tree imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_apt(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = importer.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            if base == "apt":  # `from apt import flow` names a part, `from apt import X` the API
                for alias in node.names:
                    yield f"apt.{alias.name}" if alias.name in ARROWS else "apt"
            elif is_apt(base):
                yield base
                if base.removeprefix("apt.") in UPPER_FLOORS:
                    yield from (f"{base}.{alias.name}" for alias in node.names)


def is_apt(module: str) -> bool:
    return module.split(".")[0] == "apt"


def wrong_arrows(source: str, importer: str, *, is_package: bool = False) -> list[str]:
    """Return what a file's source imports although its part may not."""
    part = part_of(importer)
    allowed = ARROWS[part] | {part}
    return [
        module
        for module in imported_modules(ast.parse(source), importer, is_package=is_package)
        if part_of(module) not in allowed
    ]


SOURCES = sorted((ROOT / "apt").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_imports_follow_the_arrows(path: Path) -> None:
    name = module_name(path)
    assert part_of(name) in ARROWS, f"{name} is a new part: give it its arrows in ARROWS"
    wrong = wrong_arrows(path.read_text(), name, is_package=path.name == "__init__.py")
    assert not wrong, f"{name} must not import {wrong}; see ARROWS in {Path(__file__).name}"


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("apt.flow", "import apt.models", ["apt.models"]),
        ("apt.losses.r1", "from apt.models.wan import Wan", ["apt.models.wan"]),
        ("apt.losses.r1", "from ..train import trainer", ["apt.train"]),
        ("apt.train.trainer", "def f():\n    from apt import pipeline", ["apt.pipeline"]),
        ("apt.models.wan.model", "from apt import OneStepPipeline", ["apt"]),
        ("apt.models.lora", "from apt.checkpoints.load import x", ["apt.checkpoints.load"]),
        ("apt.models.lora", "from apt.checkpoints import load", ["apt.checkpoints.load"]),
        ("apt.checkpoints.info", "from .load import find_model", ["apt.checkpoints.load"]),
        ("apt.hub.client", "from apt.hub import push", ["apt.hub.push"]),
        ("apt.checkpoints.load", "from apt.checkpoints import info\nimport apt.models", []),
        ("apt.models.wan.model", "from apt.kernels import rms_norm\nfrom ..tokens import x", []),
        ("apt.losses.r1", "import aptly\nfrom torch import apt", []),
    ],
)
def test_a_wrong_arrow_is_seen(importer: str, source: str, wrong: list[str]) -> None:
    assert wrong_arrows(source, importer) == wrong


# What tells a process its rank.
RANKS = ("torch.distributed", "MASTER_ADDR", "TORCHELASTIC", '"RANK"', '"LOCAL_RANK"', "WORLD_SIZE")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_a_rank_is_known_to_distributed_alone(path: Path) -> None:
    if part_of(module_name(path)) != "distributed":
        source = path.read_text()
        assert not [word for word in RANKS if word in source], "ask apt.distributed"


def test_arrows_have_no_cycle() -> None:
    def visit(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, f"cycle: {' -> '.join([*path, part])}"
        for target in ARROWS[part]:
            visit(target, (*path, part))

    for part in ARROWS:
        visit(part, ())


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Not inside functions either."""
    modules = {module_name(path): path for path in SOURCES}
    targets: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        members = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        wholes = set(imported_modules(tree, name, is_package=path.name == "__init__.py"))
        # `from apt.models import codecs` is of the module, not of the package that it is in.
        packages = {member.rpartition(".")[0] for member in members & modules.keys()}
        targets[name] = (members | (wholes - packages)) & modules.keys()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in targets[name]:
                visit(target, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in modules:
        visit(name, ())


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""

USE_PUBLIC_API = """
import apt
for name in apt.__all__:
    getattr(apt, name)
assert apt.list_models() and apt.list_losses()
"""


def test_public_api_needs_no_optional_package() -> None:
    result = run_python(BLOCK + USE_PUBLIC_API, *OPTIONAL_PACKAGES)
    assert result.returncode == 0, result.stderr


VERBS = ("create", "export", "generate", "list", "load", "pull", "push", "save")


def test_public_functions_have_one_verb_for_one_thing() -> None:
    for name in apt.__all__:
        if isinstance(getattr(apt, name), types.FunctionType):
            assert name.split("_")[0] in VERBS, name
            assert getattr(apt, name).__doc__, name


def test_blocked_packages_are_really_blocked() -> None:
    result = run_python(BLOCK + "import numpy", "numpy")
    assert result.returncode == 1
    assert "No module named 'numpy'" in result.stderr


def test_import_apt_loads_nothing_heavy() -> None:
    result = run_python("import sys, apt; print(*sorted({m.split('.')[0] for m in sys.modules}))")
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "apt" in loaded
    assert not loaded & {*OPTIONAL_PACKAGES, *LATE_PACKAGES}


def test_submodules_are_there_when_they_are_used_and_not_before() -> None:
    code = """
import sys, apt
assert {"kernels", "train", "create_model"} <= set(dir(apt)), dir(apt)
early = [name for name in dir(apt) if f"apt.{name}" in sys.modules]
for name in dir(apt):
    getattr(apt, name)
print(early, apt.kernels.query_pooling.__name__, "apt.bench" in sys.modules)
"""
    result = run_python(code)
    assert result.stdout.split("\n")[0] == "[] query_pooling False", result.stdout + result.stderr


def test_a_part_that_is_not_there_is_told_as_python_does() -> None:
    result = run_python("import apt; print(hasattr(apt, 'nothing'))")
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["data"], ["no-such-command"]])
def test_command_line_answers_without_torch(args: list[str]) -> None:
    code = (
        "import sys; from apt.__main__ import main; main(sys.argv[1:]);"
        "print('torch' in sys.modules)"
    )
    result = run_python(code, *args)
    assert result.stdout.splitlines()[-1:] == ["False"], result.stdout + result.stderr

"""Modules and weights of other projects: optional imports, downloads, complete loading."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from apt.errors import CheckpointError, MissingPackageError
from apt.hub import download
from apt.hub.download import VARIANTS
from apt.hub.inert import read_json
from apt.hub.mismatch import listed
from apt.hub.weights import check_finite
from apt.models.staging import staged_component

DType = Literal["float32", "bfloat16", "float16"]

COMPONENT_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "model*.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
"""What transformers and diffusers load of a component: configuration, tokenizer, weights."""


def torch_dtype(name: DType) -> torch.dtype:
    """The torch dtype of a config's spelling."""
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def import_hub_extra(module: str) -> ModuleType:
    """Import transformers or diffusers, or raise MissingPackageError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs {module}, which does not import here ({error}); "
            "run `pip install diffusion-apt[hub]`"
        ) from error


def local_folder(repo: str, revision: str | None, subfolders: Sequence[str]) -> Path:
    """The folder of a checkpoint: `repo` itself if it is one, or else the Hub repository's copy.

    Only `COMPONENT_FILES` of `subfolders` ("" is the top) are fetched, and no second copies in
    another number type; files in the cache are not fetched again, and with HF_HUB_OFFLINE=1 nothing
    is.

    Raises:
        CheckpointError: no such folder or repository, no access, no connection and no copy.
    """
    folder = Path(repo).expanduser()
    if folder.is_dir():
        return folder
    patterns = [f"{sub}/{p}" if sub else p for sub in subfolders for p in COMPONENT_FILES]
    return download(repo, revision, patterns)


def is_component_file(file: Path) -> bool:
    """Whether `local_folder` would fetch a file of this name."""
    wanted = any(file.match(pattern) for pattern in COMPONENT_FILES)
    return wanted and not any(file.match(pattern) for pattern in VARIANTS)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of one component; its weights must be there as safetensors too.

    Raises CheckpointError for a missing or unreadable file, or one that names code.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; expected a component in {folder.parent}")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no .safetensors file; weights in other formats are not loaded, "
            "convert them with save_pretrained"
        )
    return read_json(path)


def load_complete(
    model_class: Any, folder: Path, *, dtype: torch.dtype, foreign: Iterable[str] = ()
) -> Any:
    """`model_class.from_pretrained(folder)`, or CheckpointError unless every tensor fits.

    The library sees only what `staged_component` lets through, and attends by torch's own kernels.

    Args:
        model_class: of transformers or diffusers.
        folder: of one component, with config.json and safetensors.
        dtype: to load in.
        foreign: prefixes of weights that may lie in the same file and are not ours.
    """
    options: dict[str, Any] = {"torch_dtype": dtype}
    if model_class.__module__.startswith("transformers."):
        # Reported below by name; transformers' own error does not say which tensors they are
        options = {
            "dtype": dtype,
            "ignore_mismatched_sizes": True,
            "trust_remote_code": False,
            "attn_implementation": "sdpa" if model_class._supports_sdpa else "eager",
        }
    with staged_component(folder) as stage:
        try:
            with _quiet(model_class.__module__.partition(".")[0]):
                model, info = model_class.from_pretrained(
                    stage,
                    **options,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        # Whatever a configuration of others makes the library raise.
        except Exception as error:
            reason = first_line(error).replace(str(stage), str(folder))
            raise CheckpointError(
                f"cannot load {model_class.__name__} from {folder}: {reason}"
            ) from error
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(key for key, *_ in info["mismatched_keys"]),
        "unexpected": sorted(
            key for key in info["unexpected_keys"] if not key.startswith(tuple(foreign))
        ),
    }
    if any(wrong.values()):
        problems = "; ".join(
            f"{len(keys)} {kind} ({listed(keys)})" for kind, keys in wrong.items() if keys
        )
        raise CheckpointError(
            f"the weights in {folder} do not fit {model_class.__name__}: {problems}; "
            "download them again, or choose the architecture that they belong to"
        )
    for key, value in model.state_dict().items():
        check_finite(str(folder), key, value)
    return model


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep the warnings of transformers or diffusers, and outside terminals their progress bars,
    to themselves: what matters is in our own errors. Settings are as before afterwards."""
    settings = importlib.import_module(f"{library}.utils.logging")
    verbosity = settings.get_verbosity()
    settings.set_verbosity_error()
    try:
        with _bars_in_terminals_alone(settings):
            yield
    finally:
        settings.set_verbosity(verbosity)


@contextmanager
def _bars_in_terminals_alone(settings: ModuleType) -> Iterator[None]:
    if sys.stderr.isatty() or not settings.is_progress_bar_enabled():
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    # transformers switches those of huggingface_hub with its own.
    hub_was_quiet = are_progress_bars_disabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.enable_progress_bar()
        if hub_was_quiet:
            disable_progress_bars()


def first_line(error: Exception) -> str:
    """What an error of another library says, shortly."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

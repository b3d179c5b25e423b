"""Loading of text encoders and VAEs through transformers and diffusers, fetched and checked.

Those libraries follow whatever is in a folder: adapters that point to another repository,
quantisation settings, file paths in a tokenizer's configuration, code. They therefore get a
temporary folder instead, with inert configurations and links to weights whose headers were checked.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from apt.checkpoints.reading import INDEX_SUFFIX, inert, read_document, read_json, shard_names
from apt.checkpoints.weights import check_finite
from apt.errors import CheckpointError, MissingPackageError, first_line, listed
from apt.hub.download import VARIANTS, download
from apt.untrusted import read_entries

DType = Literal["float32", "bfloat16", "float16"]

COMPONENT_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "model*.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
"""Files that transformers and diffusers load of a component: configuration, tokenizer, weights."""

_WEIGHTS = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Names of a component's weights in transformers and diffusers."""

_TOKEN_FILES = ("*.model", "*.txt")
"""Vocabularies in formats other than JSON."""
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_TOKEN_TABLES = (*_VOCABULARIES, "added_tokens.json")
"""Their keys are words, of any form, and their values are numbers."""
_TOKEN_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_TOKENIZERS = {
    "T5Tokenizer",
    "T5TokenizerFast",
    "ByT5Tokenizer",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
}
"""Tokenizers of the supported text encoders. Others may read further files, or need packages."""


def torch_dtype(name: DType) -> torch.dtype:
    """Return the torch dtype of a name in a config."""
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
            f"this needs {module}, which cannot be imported ({error}); "
            "run `pip install 'diffusion-apt[hub]'`"
        ) from error


def local_folder(repo: str, revision: str | None, subfolders: Sequence[str]) -> Path:
    """Return the folder of a checkpoint: `repo` if it is a folder, else the Hub's cached copy.

    Only `COMPONENT_FILES` of `subfolders` ("" is the top) are downloaded, without copies in other
    dtypes. Files in the cache are not downloaded again, and with HF_HUB_OFFLINE=1 none are.

    Raises:
        CheckpointError: if there is no such folder or repository, no access, or neither a
            connection nor a cached copy.
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
    """Read the config.json of a component, whose weights must be there as safetensors.

    Raises CheckpointError for a missing or unreadable file, or one that names code.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; expected a component with its config.json in {folder.parent}"
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no .safetensors file, and weights in other formats are not loaded; "
            "convert them with save_pretrained"
        )
    return read_json(path)


def load_complete(
    model_class: Any, folder: Path, *, dtype: torch.dtype, foreign: Iterable[str] = ()
) -> Any:
    """Return `model_class.from_pretrained(folder)`; CheckpointError unless every tensor fits.

    The library sees only what `staged_component` provides, and uses torch's own attention.

    Args:
        model_class: class of transformers or diffusers.
        folder: folder of one component, with config.json and safetensors.
        dtype: dtype to load the weights in.
        foreign: prefixes of weights in the same file that belong to other models.
    """
    options: dict[str, Any] = {"torch_dtype": dtype}
    if model_class.__module__.startswith("transformers."):
        # Mismatches are reported below, because transformers' error does not name the tensors.
        options = {
            "dtype": dtype,
            "ignore_mismatched_sizes": True,
            "trust_remote_code": False,
            "attn_implementation": "sdpa" if model_class._supports_sdpa else "eager",
        }
    with staged_component(folder) as stage:
        try:
            with quiet_library(model_class.__module__.partition(".")[0]):
                model, info = model_class.from_pretrained(
                    stage,
                    **options,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        # With a third-party configuration, the library may raise anything.
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
            "download them again, or choose the architecture that they are for"
        )
    for key, value in model.state_dict().items():
        check_finite(str(folder), key, value)
    return model


@contextmanager
def quiet_library(library: str) -> Iterator[None]:
    """Silence warnings of transformers or diffusers, and outside terminals their progress bars.

    Everything that matters is in our own errors. The settings are restored afterwards.
    """
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

    # transformers also switches those of huggingface_hub.
    hub_was_quiet = are_progress_bars_disabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.enable_progress_bar()
        if hub_was_quiet:
            disable_progress_bars()


@contextmanager
def staged_component(folder: Path) -> Iterator[Path]:
    """Provide a temporary folder with config.json and the safetensors of a component.

    Raises CheckpointError if it names code or quantised weights, if headers are damaged, or if an
    index names files elsewhere.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{str(folder / 'config.json')!r} has a quantization_config, but quantised text "
            "encoders and VAEs are not supported; use the same model in bf16 or fp32"
        )
    # It names another file of weights, which is not needed.
    config.pop("transformers_weights", None)
    files = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    for file in files:
        read_entries(file)
    documents = {"config.json": config}
    for pattern in _WEIGHTS:
        for index in folder.glob(pattern + INDEX_SUFFIX):
            documents[index.name] = {"metadata": {}, "weight_map": shard_names(index)}
    with _staged(documents, files) as stage:
        yield stage


@contextmanager
def staged_tokenizer(folder: Path) -> Iterator[Path]:
    """Provide a temporary folder with the files of a tokenizer.

    Raises CheckpointError if it names code or an unsupported class, or has no vocabulary.
    """
    documents = {}
    for name in _TOKEN_CONFIGS:
        if (folder / name).exists():
            documents[name] = read_json(folder / name)
    config = documents.get("tokenizer_config.json", {})
    kind = config.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind in _TOKENIZERS):
        raise CheckpointError(
            f"{str(folder / 'tokenizer_config.json')!r} has the tokenizer_class {kind!r}, expected "
            f"one of {', '.join(sorted(_TOKENIZERS))}"
        )
    for key in list(config):
        # Paths on the machine where it was saved, and chat templates.
        if key.endswith("_file") or key in ("init_inputs", "chat_template"):
            del config[key]
    files = [file for pattern in _TOKEN_FILES for file in sorted(folder.glob(pattern))]
    for name in _TOKEN_TABLES:
        if (folder / name).exists():
            table = read_document(folder / name)
            odd = {k: v for k, v in table.items() if k != "model" and not isinstance(v, int)}
            inert(odd, str(folder / name))
            files.append(folder / name)
    has_words = any(file.name in _VOCABULARIES or file.suffix == ".model" for file in files)
    if kind != "ByT5Tokenizer" and not has_words:
        # transformers would make one with only special tokens, to which all words are unknown.
        raise CheckpointError(
            f"no usable tokenizer in {folder}: expected tokenizer.json, vocab.json or a .model "
            "file; copy or download it again"
        )
    with _staged(documents, files) as stage:
        yield stage


@contextmanager
def _staged(documents: Mapping[str, Any], files: Sequence[Path]) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="apt-")
        stage = Path(folder.name)
        for file in files:
            (stage / file.name).symlink_to(file.resolve())
        for name, document in documents.items():
            (stage / name).write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write a temporary folder ({error.strerror or error}); free some space, or set "
            "TMPDIR to a folder on another disk"
        ) from error
    with folder:
        yield stage

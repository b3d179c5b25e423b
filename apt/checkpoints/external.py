"""Parts of other projects, loaded by transformers and diffusers: fetched, checked, complete.

Those libraries read whatever a folder holds: adapters that lead to another repository, settings of
quantisers, paths of files in a tokenizer's configuration, code. They are given a folder of our own
instead, with inert configurations and links to weights whose headers were checked.
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
"""What transformers and diffusers load of a component: configuration, tokenizer, weights."""

_WEIGHTS = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")
"""How transformers and diffusers name the weights of a component."""

_TOKEN_FILES = ("*.model", "*.txt")
"""Vocabularies of other formats than JSON."""
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_TOKEN_TABLES = (*_VOCABULARIES, "added_tokens.json")
"""Any word can be a key in them, with its number."""
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
"""What the text encoders here are used with. Others may read further files, or need packages."""


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
            with quiet_library(model_class.__module__.partition(".")[0]):
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
def quiet_library(library: str) -> Iterator[None]:
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


@contextmanager
def staged_component(folder: Path) -> Iterator[Path]:
    """A folder with config.json and the safetensors of a component.

    Raises CheckpointError for one that names code or quantised weights, damaged headers, or an
    index that names other places.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{str(folder / 'config.json')!r} has a quantization_config, and quantised weights of "
            "text encoders and VAEs are not loaded; take the same model in bf16 or fp32"
        )
    # A name of another file of weights, which nothing here needs.
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
    """A folder with the files of a tokenizer.

    Raises CheckpointError for one that names code or a class that no text encoder here is used
    with, and for one without a vocabulary.
    """
    documents = {}
    for name in _TOKEN_CONFIGS:
        if (folder / name).exists():
            documents[name] = read_json(folder / name)
    config = documents.get("tokenizer_config.json", {})
    kind = config.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind in _TOKENIZERS):
        raise CheckpointError(
            f"{str(folder / 'tokenizer_config.json')!r} asks for the class {kind!r}; expected one "
            f"of {', '.join(sorted(_TOKENIZERS))}"
        )
    for key in list(config):
        # Paths on the machine of whoever saved it, and templates of chats.
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
        # transformers would make one of a few special tokens, and read every prompt as unknown.
        raise CheckpointError(
            f"no usable tokenizer in {folder}: expected tokenizer.json, vocab.json or a .model; "
            "copy or download it again"
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
            "TMPDIR to a disk that has some"
        ) from error
    with folder:
        yield stage

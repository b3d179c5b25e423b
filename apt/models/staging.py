"""Parts of others as transformers and diffusers get to see them: checked, and nothing else.

Those libraries read whatever a folder holds: adapters that lead to another repository, settings of
quantisers, paths of files in a tokenizer's configuration, code. They are given a folder of our own
instead, with inert configurations and links to weights whose headers were checked.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError
from apt.hub.header import read_entries
from apt.hub.inert import inert, read_document, read_json
from apt.hub.stored import INDEX_SUFFIX, shard_names

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

"""Pull a whole model from the Hub: every file that loading, training and exporting need."""

from __future__ import annotations

from pathlib import Path

from apt.checkpoints.info import INFO_FILE, PIPELINE_FILE
from apt.checkpoints.reading import read_json, read_pipeline
from apt.checkpoints.source import DESCRIPTIONS
from apt.errors import CheckpointError
from apt.hub.download import download, find_commit

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_EXTRAS = ["*.md", "LICENSE*"]
_CONFIGURATIONS = ("*config.json", PIPELINE_FILE, INFO_FILE)
"""Files that tell other programs how to load the folder; refused if they name code to run."""


def pull_from_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    local_dir: str | Path | None = None,
    everything: bool = False,
) -> Path:
    """Download a model; return its folder, in the Hub's cache unless `local_dir` is given.

    Of a pipeline with two experts, only the one that generates in one step is downloaded, unless
    `everything` is set. Pickles never are.

    Raises:
        CheckpointError: as `download`, for a repository without a model, and for a model whose
            configuration names code to run.
    """
    # The same commit throughout, even if the branch moves.
    commit = find_commit(repo_id, revision, local_dir)
    folder = download(repo_id, commit, DESCRIPTIONS, local_dir=local_dir)
    patterns = [*_FILES, *_EXTRAS]
    if (folder / PIPELINE_FILE).is_file() and not everything:
        _, parts = read_pipeline(folder / PIPELINE_FILE)
        wanted = [part for part in parts if part != "transformer_2"]
        inside = [f"{part}/{pattern}" for part in wanted for pattern in _FILES]
        patterns = [*DESCRIPTIONS, *_EXTRAS, *inside]
    folder = download(repo_id, commit, patterns, local_dir=local_dir)
    for pattern in _CONFIGURATIONS:
        for file in sorted(folder.rglob(pattern)):
            read_json(file)
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"the Hub model {repo_id!r} has no safetensors files of a model; weights in other "
            "formats are never read"
        )
    return folder

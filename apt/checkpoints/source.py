"""Find the folder of a model (built-in names, folders, Hub ids) and its weights."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.checkpoints.info import INFO_FILE, PIPELINE_FILE
from apt.checkpoints.reading import INDEX_SUFFIX
from apt.checkpoints.runs import model_folder
from apt.errors import CheckpointError, InputError
from apt.hub.download import download

ASSETS = Path(__file__).parents[1] / "assets"

WEIGHTS_STEM = "diffusion_pytorch_model"
"""Name of a transformer's weights in diffusers."""
_ENDS = 2**20
"""Bytes at each end of a weights file that go into its digest."""
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")

DESCRIPTIONS = [INFO_FILE, PIPELINE_FILE, "config.json", "*/config.json", "*.index.json"]
"""Small files that describe a repository, downloaded before anything large."""


@dataclass(frozen=True)
class Source:
    """The place of a model: a folder, and the Hub repository that it is a snapshot of, if any.

    Attributes:
        folder: the folder with its files; for a repository, only those that were downloaded.
        repo: Hub id, or None for a local folder.
        revision: the commit.
    """

    folder: Path
    repo: str | None = None
    revision: str | None = None

    def fetch(self, patterns: Sequence[str]) -> None:
        """Download files that match these patterns. Raises CheckpointError; see `download`."""
        if self.repo is not None:
            download(self.repo, self.revision, patterns)

    def fetch_component(self, subfolder: str) -> None:
        """Download configuration and weights of one component; "" is the one at the top.

        Raises CheckpointError; see `download`.
        """
        if subfolder:
            self.fetch([f"{subfolder}/*.json", f"{subfolder}/*.safetensors"])
        else:
            # "*" also matches "/" in these patterns, so "*.safetensors" would match all components.
            self.fetch(["*.json", f"{WEIGHTS_STEM}*.safetensors"])

    def file(self, name: str) -> Path:
        """Return the path of a file of the model.

        Built-in models of one family ("digits", "digits-diffusion") share a codec, which is only in
        the folder of the built-in "digits-codec".
        """
        path = self.folder / name
        if path.exists() or self.folder.parent != ASSETS:
            return path
        shared = ASSETS / f"{self.folder.name.partition('-')[0]}-codec" / name
        return shared if shared.exists() else path

    @property
    def name(self) -> str:
        """A name to load it by: the repository, or the absolute path of the folder."""
        return self.repo or str(self.folder.resolve())


def list_pretrained() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INFO_FILE}"))


def is_here(name: str) -> bool:
    """Whether a name is that of a built-in model, or of an existing file or folder."""
    return name in list_pretrained() or Path(name).expanduser().exists()


def locate(name_or_folder: str | Path, revision: str | None = None) -> Source:
    """Find a model by name; for a Hub repository, download only `DESCRIPTIONS`.

    A built-in name takes precedence over a folder of the same name, which is "./name". The folder
    of a training run stands for its model; see `apt.checkpoints.runs.model_folder`.

    Args:
        name_or_folder: a built-in name, a folder, or "owner/name[@revision]".
        revision: revision of a Hub repository, if not given after "@".

    Raises:
        CheckpointError: for an unknown name; see also `download`.
        InputError: for a revision of something other than a Hub repository, or two revisions.
    """
    name = str(name_or_folder)
    folder = Path(name_or_folder).expanduser()
    built_in = isinstance(name_or_folder, str) and name in list_pretrained()
    if built_in or folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{name!r} is not a Hub repository, so it has no revision {revision!r}; leave it "
                "out"
            )
        return Source(ASSETS / name if built_in else model_folder(folder))
    if folder.exists():
        raise CheckpointError(f"{name!r} is a file; pass the folder that contains {INFO_FILE}")
    hub_id = split_hub_id(name) if isinstance(name_or_folder, str) else None
    if hub_id is not None:
        repo, asked = hub_id
        if asked and revision and asked != revision:
            raise InputError(
                f"{name!r} and revision {revision!r} name different revisions; pass only one"
            )
        snapshot = download(repo, revision or asked, DESCRIPTIONS)
        return Source(snapshot, repo, snapshot.name)
    builtin = list_pretrained()
    close = difflib.get_close_matches(name, builtin, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(
        f"there is no model {name!r}: {hint}pass a built-in name "
        f"({', '.join(builtin) or 'none is installed'}), the folder of a training run, a folder "
        f"with {INFO_FILE} or {PIPELINE_FILE}, or a Hub id (owner/name or owner/name@revision)"
    )


def split_hub_id(name: str) -> tuple[str, str | None] | None:
    """Split "owner/name@revision", whose revision may be None; None for any other text."""
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)
    return None if found is None else (found[1], found[2])


def find_weights(folder: Path) -> Path:
    """Find a transformer's file or index of shards in its folder: diffusers' name, or the only one.

    Raises CheckpointError if there is none, several, or only pickles.
    """
    for name in (f"{WEIGHTS_STEM}.safetensors{INDEX_SUFFIX}", f"{WEIGHTS_STEM}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    found = indices or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{str(folder)!r} has several checkpoints ({names}); name one")
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        raise CheckpointError(
            f"{str(folder)!r} has pickles, but no .safetensors file; pickles can run code and are "
            "never loaded: convert them with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{str(folder)!r} has no .safetensors file; copy or download it again")


def weights_digest(place: Path) -> str:
    """Return a "sha256:..." digest of a weights file, or of those in a folder.

    It covers names and sizes of the safetensors files, and both ends of each: training changes
    every weight, and reading all of a large model takes minutes. For a single file, the name does
    not count.
    """
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()}"

"""From the name of a model to a folder (built-in names, folders, Hub ids) and to its weights."""

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
"""How diffusers names the weights of a transformer."""
_ENDS = 2**20
"""Bytes at either end of a file of weights that tell it from others."""
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")

DESCRIPTIONS = [INFO_FILE, PIPELINE_FILE, "config.json", "*/config.json", "*.index.json"]
"""Small files that tell what a repository is, before anything large is fetched."""


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder, and the Hub repository that it is a snapshot of, if it is one.

    Attributes:
        folder: its files; of a repository, those that were fetched.
        repo: Hub id, or None for a local folder.
        revision: the commit.
    """

    folder: Path
    repo: str | None = None
    revision: str | None = None

    def fetch(self, patterns: Sequence[str]) -> None:
        """Have the files that match these patterns too. Raises CheckpointError; see `download`."""
        if self.repo is not None:
            download(self.repo, self.revision, patterns)

    def fetch_component(self, subfolder: str) -> None:
        """Have configuration and weights of one component; "" is the top, and no other component.

        Raises CheckpointError; see `download`.
        """
        if subfolder:
            self.fetch([f"{subfolder}/*.json", f"{subfolder}/*.safetensors"])
        else:
            # "*" also stands for "/" in these patterns, so "*.safetensors" would be all components.
            self.fetch(["*.json", f"{WEIGHTS_STEM}*.safetensors"])

    def file(self, name: str) -> Path:
        """Where a file of the model is.

        Built-in models of one family ("digits", "digits-diffusion") share its codec, which lies in
        the folder of the built-in "digits-codec" alone.
        """
        path = self.folder / name
        if path.exists() or self.folder.parent != ASSETS:
            return path
        shared = ASSETS / f"{self.folder.name.partition('-')[0]}-codec" / name
        return shared if shared.exists() else path

    @property
    def name(self) -> str:
        """What others can load it by: the repository, or the absolute path of the folder."""
        return self.repo or str(self.folder.resolve())


def list_pretrained() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INFO_FILE}"))


def is_here(name: str) -> bool:
    """Whether a name stands for a model of the package, or for a file or folder that is there."""
    return name in list_pretrained() or Path(name).expanduser().exists()


def locate(name_or_folder: str | Path, revision: str | None = None) -> Source:
    """Where the model of a name is; of a Hub repository only `DESCRIPTIONS` are fetched.

    A built-in name wins over a folder of the same name, which "./name" reaches. The folder of a
    training run stands for its model; see `apt.checkpoints.runs.model_folder`.

    Args:
        name_or_folder: a built-in name, a folder, or "owner/name[@revision]".
        revision: of a Hub repository, if it is not behind "@".

    Raises:
        CheckpointError: for a name that is nowhere; see also `download`.
        InputError: for a revision of what has none, or a second one behind "@".
    """
    name = str(name_or_folder)
    folder = Path(name_or_folder).expanduser()
    built_in = isinstance(name_or_folder, str) and name in list_pretrained()
    if built_in or folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{name!r} is no Hub repository, so it has no revision {revision!r}; leave it out"
            )
        return Source(ASSETS / name if built_in else model_folder(folder))
    if folder.exists():
        raise CheckpointError(f"{name!r} is a file; pass the folder that holds {INFO_FILE}")
    hub_id = split_hub_id(name) if isinstance(name_or_folder, str) else None
    if hub_id is not None:
        repo, asked = hub_id
        if asked and revision and asked != revision:
            raise InputError(f"{name!r} and revision {revision!r} name two revisions; name one")
        snapshot = download(repo, revision or asked, DESCRIPTIONS)
        return Source(snapshot, repo, snapshot.name)
    builtin = list_pretrained()
    close = difflib.get_close_matches(name, builtin, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(
        f"there is no model {name!r}: {hint}it can be a built-in name "
        f"({', '.join(builtin) or 'none is installed'}), the folder of a training run, one with "
        f"{INFO_FILE} or {PIPELINE_FILE}, or a Hub id (owner/name or owner/name@revision)"
    )


def split_hub_id(name: str) -> tuple[str, str | None] | None:
    """ "owner/name@revision" in two, the latter None if it is not there; None for another text."""
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)
    return None if found is None else (found[1], found[2])


def find_weights(folder: Path) -> Path:
    """A transformer's file or index of shards in its folder: diffusers' name, or the only one.

    Raises CheckpointError for none, several to choose from, or pickles alone.
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
        raise CheckpointError(f"{str(folder)!r} holds several checkpoints ({names}); name one")
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        raise CheckpointError(
            f"{str(folder)!r} holds pickles and no .safetensors file; pickles can run code and are "
            "never loaded: convert them with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{str(folder)!r} holds no .safetensors file; copy or download it again")


def weights_digest(place: Path) -> str:
    """The "sha256:..." of a file of weights, or of those of a folder.

    Of the names and sizes of the safetensors files, and of both ends of each: training moves every
    weight, and reading all of a large model takes minutes. A single file counts without its name.
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

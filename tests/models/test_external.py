"""Finding checkpoints of other projects without a connection."""

from __future__ import annotations

import pytest

from apt.errors import CheckpointError
from apt.models.external import local_folder

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The Hub's cache as a download leaves it, and no connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    part = repo / "snapshots" / COMMIT / "vae"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return part.parent


def test_a_folder_is_itself(tmp_path):
    assert local_folder(str(tmp_path), None, ["vae"]) == tmp_path


def test_a_cached_repository_is_found_offline(offline_cache):
    assert local_folder("owner/name", None, ["vae"]) == offline_cache
    assert local_folder("owner/name", COMMIT, ["vae"]) == offline_cache


def test_a_repository_that_is_not_cached(offline_cache):
    with pytest.raises(CheckpointError, match="nor whole in the local cache"):
        local_folder("owner/other", None, ["vae"])
    with pytest.raises(CheckpointError, match="nor whole in the local cache"):
        local_folder("owner/name", "another", ["vae"])


def test_neither_a_folder_nor_an_id(offline_cache):
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        local_folder("/no/such/folder", None, ["vae"])

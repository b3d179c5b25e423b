"""Finding checkpoints of other projects without a connection."""

from __future__ import annotations

import json

import pytest
import torch

from apt.checkpoints.external import load_complete, local_folder
from apt.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The Hub's cache after a download, without a connection."""
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
    with pytest.raises(CheckpointError, match="nor complete in the local cache"):
        local_folder("owner/other", None, ["vae"])
    with pytest.raises(CheckpointError, match="nor complete in the local cache"):
        local_folder("owner/name", "another", ["vae"])


def test_neither_a_folder_nor_an_id(offline_cache):
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        local_folder("/no/such/folder", None, ["vae"])


def test_only_what_loads_is_fetched_of_a_component(monkeypatch):
    """Weights of other names, and second copies in another type, would double the download."""
    asked = {}

    def spy(repo, **options):
        asked.update(options)
        raise OSError("seen")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    with pytest.raises(CheckpointError, match="seen"):
        local_folder("owner/name", None, ["text_encoder", ""])
    names = [
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/open_clip.safetensors",
        "diffusion_pytorch_model.safetensors",
        "all_in_one.safetensors",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == [*names[:3], names[7]]


def test_bars_are_shown_in_terminals_alone_and_settings_stay(tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    settings = transformers.utils.logging
    capfd.readouterr()
    for enabled in (True, False):
        (settings.enable_progress_bar if enabled else settings.disable_progress_bar)()
        try:
            load_complete(transformers.T5EncoderModel, tmp_path, dtype=torch.float32)
            assert settings.is_progress_bar_enabled() == enabled
        finally:
            settings.enable_progress_bar()
    assert "Loading weights" not in capfd.readouterr().err


def test_shards_and_a_config_that_the_library_cannot_build(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=800, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    saved = transformers.T5EncoderModel(config)
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_complete(transformers.T5EncoderModel, tmp_path, dtype=torch.float32)
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    document = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"num_heads": []}, {"num_layers": "two"}, {"vocab_size": 2**62}):
        (tmp_path / "config.json").write_text(json.dumps(document | wrong))
        with pytest.raises(CheckpointError, match="T5EncoderModel") as caught:
            load_complete(transformers.T5EncoderModel, tmp_path, dtype=torch.float32)
        assert "\n" not in str(caught.value) and "/apt-" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(document))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="cannot write a temporary folder"):
        load_complete(transformers.T5EncoderModel, tmp_path, dtype=torch.float32)

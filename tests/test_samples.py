"""Folders of generated samples and their manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt.errors import InputError
from apt.samples import MANIFEST, read_samples
from tests.study.folders import KEYS, write_samples


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = write_samples(tmp_path / "a")
    assert list(found.samples) == list(KEYS)
    assert found.settings == {"model": "model 0"}
    assert all(sample.path.is_file() for sample in found.samples.values())


def test_manifests_of_several_processes_are_one(tmp_path: Path) -> None:
    write_samples(tmp_path / "a", KEYS[:2])
    write_samples(tmp_path / "b", KEYS[2:4])
    text = (tmp_path / "b" / MANIFEST).read_text().replace("model 1", "model 0")
    (tmp_path / "a" / "other.jsonl").write_text(text.replace('"0.mp4"', '"9.mp4"'))
    assert set(read_samples(tmp_path / "a").samples) == set(KEYS[:4])


def test_a_truncated_sample_does_not_count(tmp_path: Path) -> None:
    write_samples(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    # In the middle of a letter.
    manifest.write_bytes(manifest.read_bytes()[:-10] + "猫".encode()[:2])
    assert list(read_samples(tmp_path / "a").samples) == list(KEYS[:-1])


def test_a_hostile_or_foreign_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_samples(folder)
    manifest = folder / MANIFEST
    lines = manifest.read_text().splitlines()

    def fails(*changed: str, match: str) -> None:
        manifest.write_text("".join(line + "\n" for line in changed))
        with pytest.raises(InputError, match=match):
            read_samples(folder)

    line = json.loads(lines[1])
    fails(lines[0], json.dumps(line | {"file": "../../etc/passwd"}), match="out of its folder")
    fails(lines[0], json.dumps(line | {"file": "/etc/passwd"}), match="absolute")
    fails(lines[0], json.dumps(line | {"seed": "three"}), match="an invalid line")
    fails(lines[0], lines[1], json.dumps(line | {"file": "b.mp4"}), match="two samples of")
    fails(lines[0], "nonsense", match="damaged")
    fails(lines[0], match="no manifest of samples")
    (folder / "other.jsonl").write_text('{"settings": {"model": "another"}}\n')
    fails(*lines, match="other settings")
    with pytest.raises(InputError, match="cannot read samples"):
        read_samples(tmp_path / "nowhere")

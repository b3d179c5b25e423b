"""Samples of a model in a folder with their manifest."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch

from apt.checkpoints.save import save_bundle
from apt.errors import InputError
from apt.evaluate.choice import parse_model
from apt.evaluate.generate import gather_manifests, generate_samples, make_share, plan_outputs
from apt.evaluate.models import SampleModel, load_model
from apt.samples import MANIFEST, SampleKey, read_samples
from tests.tiny import tiny_bundle

KEYS: list[SampleKey] = [(text, seed) for text in ("a red one", "a blue two") for seed in (0, 5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_bundle(folder, tiny_bundle())
    return str(folder)


@pytest.fixture(scope="module")
def model(place: str) -> SampleModel:
    return load_model(parse_model(place), device="cpu")


@pytest.fixture(scope="module")
def whole(model: SampleModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples, made in one go by one rank."""
    return generate_samples(tmp_path_factory.mktemp("whole") / "samples", model, KEYS)


def lines_of(folder: Path) -> list[str]:
    """The manifest, in any order; the files are in it by their digests."""
    return sorted((folder / MANIFEST).read_text().splitlines())


def test_an_interrupted_folder_is_made_whole(
    tmp_path: Path, model: SampleModel, whole: Path
) -> None:
    folder = tmp_path / "samples"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_samples(folder, model, KEYS, progress=stop)
    found = read_samples(folder)
    assert len(found.samples) == 3
    times = {sample.path: sample.path.stat().st_mtime_ns for sample in found.samples.values()}
    generate_samples(folder, model, KEYS)
    found = read_samples(folder)
    assert set(found.samples) == set(KEYS)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert found.settings["num_steps"] == 1 and found.settings["cfg_scale"] == 1
    assert lines_of(folder) == lines_of(whole)


def test_two_ranks_make_what_one_makes_and_one_goes_on_with_theirs(
    tmp_path: Path, model: SampleModel, whole: Path
) -> None:
    outputs = plan_outputs(tmp_path, model, KEYS)
    make_share(tmp_path, model, outputs, rank=1, world=2)
    # Rank 0 was killed: what rank 1 made is found by whoever comes next.
    assert len(read_samples(tmp_path).samples) == 2
    made: list[int] = []
    generate_samples(tmp_path, model, KEYS, progress=lambda done, total: made.append(done))
    assert made[0] == 2 and made[-1] == 4
    assert lines_of(tmp_path) == lines_of(whole)
    # Both, side by side; the manifests become one.
    both = tmp_path / "both"
    outputs = plan_outputs(both, model, KEYS)
    for rank in (0, 1):
        make_share(both, model, outputs, rank=rank, world=2)
    assert len(list(both.glob("*.jsonl"))) == 2
    gather_manifests(both, model)
    assert [path.name for path in both.glob("*.jsonl")] == [MANIFEST]
    assert lines_of(both) == lines_of(whole)


def test_a_broken_file_is_made_again(tmp_path: Path, model: SampleModel, whole: Path) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(whole, folder)
    broken = read_samples(folder).samples[KEYS[1]]
    broken.path.write_bytes(broken.path.read_bytes()[:-100])
    generate_samples(folder, model, KEYS)
    assert read_samples(folder).samples[KEYS[1]].sha256 == broken.sha256
    assert broken.path.read_bytes() == (whole / broken.path.name).read_bytes()


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, model: SampleModel, whole: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            generate_samples(tmp_path, model, KEYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    generate_samples(tmp_path, model, KEYS)
    assert lines_of(tmp_path) == lines_of(whole)


def test_samples_of_other_prompts_are_not_overwritten(
    tmp_path: Path, model: SampleModel, whole: Path
) -> None:
    """As of another protocol, whose prompts are numbered alike."""
    folder = tmp_path / "samples"
    shutil.copytree(whole, folder)
    generate_samples(folder, model, KEYS[:2])
    with pytest.raises(InputError, match=r"was made from 'a red one' with seed 0, and would be"):
        generate_samples(folder, model, [("a green six", 0)])
    with pytest.raises(InputError, match=r"with seed 0, which would now be 'prompt0-seed0.mkv'"):
        generate_samples(folder, model, KEYS, lossless=True)
    assert lines_of(folder) == lines_of(whole)


def test_other_settings_are_refused(tmp_path: Path, place: str) -> None:
    keys = KEYS[:1]
    generate_samples(tmp_path, load_model(parse_model(f"{place},frames=1"), device="cpu"), keys)
    (sample,) = read_samples(tmp_path).samples.values()
    assert sample.path.suffix == ".png"
    other = load_model(parse_model(f"{place},frames=1,num_steps=2"), device="cpu")
    with pytest.raises(InputError, match=r"num_steps was 1 and is 2; .* choose another folder"):
        generate_samples(tmp_path, other, keys)


def test_other_weights_of_the_same_size_are_refused(tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "model", tiny_bundle())
    choice = parse_model(str(folder))
    generate_samples(tmp_path / "samples", load_model(choice, device="cpu"), KEYS[:1])
    other = tiny_bundle()
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.neg_()
    save_bundle(tmp_path / "other", other)
    shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match="made with other settings: model_content"):
        generate_samples(tmp_path / "samples", load_model(choice, device="cpu"), KEYS[:1])


def test_clips_without_a_rate_ask_for_one(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    object.__setattr__(bundle.info.sample, "fps", 0)
    folder = save_bundle(tmp_path / "model", bundle)
    with pytest.raises(InputError, match="fps=24"):
        load_model(parse_model(str(folder)), device="cpu")
    assert load_model(parse_model(f"{folder},fps=12"), device="cpu").fps == 12

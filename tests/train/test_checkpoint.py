from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.distributed import storage
from apt.errors import CheckpointError, InputError
from apt.train import checkpoint, manifest
from tests.processes import run_main


def make_state(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "net": {
            "weight": torch.nn.Parameter(torch.randn(5, 3, generator=g)),
            "half": torch.randn(4, generator=g).to(torch.bfloat16),
            "transposed": torch.randn(3, 4, generator=g).t(),
            "channels_last": torch.randn(2, 3, 4, 4, generator=g).to(
                memory_format=torch.channels_last
            ),
        },
        "optimizer": {"net.weight": {"step": torch.tensor(float(seed)), "square_avg": special}},
        "empty": torch.zeros(0, 4),
        "count": torch.arange(seed, seed + 3),
        "flags": torch.tensor([True, False]),
        "position": {"step": seed, "epoch": 2, "done": False, "rate": 0.1, "name": "ü", "no": None},
        "list": [1, 2.5, "x"],
    }


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in state.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            same = found[name].detach().contiguous().view(-1).view(torch.uint8)
            assert torch.equal(same, value.detach().contiguous().view(-1).view(torch.uint8)), name
        else:
            assert found[name] == value and type(found[name]) is type(value), name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_what_is_loaded_is_what_was_saved_in_place(root: Path):
    path = checkpoint.save(root, 7, make_state(7), {"config": {"lr": 1e-4, "names": ["a"]}})
    assert path == root / "step_00000007" and checkpoint.step_of(path) == 7
    state = make_state(1)
    tensors = {k: v for k, v in flat(state).items() if isinstance(v, torch.Tensor)}
    assert checkpoint.load(path, state) == {"config": {"lr": 1e-4, "names": ["a"]}}
    assert_same(state, make_state(7))
    assert all(flat(state)[k] is v for k, v in tensors.items())
    assert checkpoint.read_meta(path) == {"config": {"lr": 1e-4, "names": ["a"]}}
    assert not list(root.glob(".*"))


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    values=st.dictionaries(
        st.text(min_size=1).filter(lambda k: k != "tensors"),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        max_size=3,
    ),
)
def test_any_shapes_and_values(tmp_path_factory, shapes, dtype, values):
    root = tmp_path_factory.mktemp("any")

    def state(fill: int) -> dict[str, Any]:
        return {"tensors": {str(i): torch.full(s, fill).to(dtype) for i, s in enumerate(shapes)}}

    path = checkpoint.save(root, 0, state(3) | values, {})
    found = state(0) | dict.fromkeys(values, 0)
    checkpoint.load(path, found)
    assert_same(found, state(3) | values)


def test_large_states_are_split_into_files(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "FILE_BYTES", 100)
    path = checkpoint.save(root, 1, make_state(1), {})
    assert len(list(path.glob("*.safetensors"))) > 3
    state = make_state(2)
    checkpoint.load(path, state)
    assert_same(state, make_state(1))


def test_nothing_is_pickled(root: Path):
    path = checkpoint.save(root, 1, make_state(1), {})
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    with pytest.raises(TypeError, match=r"'when' is a PosixPath"):
        checkpoint.save(root, 2, {"when": root}, {})
    with pytest.raises(ValueError, match="two entries"):
        checkpoint.save(root, 2, {"a/b": 1, "a": {"b": 2}}, {})


def test_latest_is_the_newest_by_number(root: Path):
    assert checkpoint.latest(root) is None
    for step in (9, 123456789, 10):
        checkpoint.save(root, step, {"step": step}, {})
    newest = checkpoint.latest(root)
    assert newest is not None and checkpoint.step_of(newest) == 123456789


def test_a_checkpoint_of_the_same_step_is_replaced(root: Path):
    checkpoint.save(root, 3, {"value": 1}, {})
    path = checkpoint.save(root, 3, {"value": 2}, {})
    state = {"value": 0}
    checkpoint.load(path, state)
    assert state == {"value": 2}
    assert os.listdir(root) == ["step_00000003"]


def test_a_kill_while_replacing_leaves_the_old_one_in_use(root: Path):
    path = checkpoint.save(root, 3, {"value": 1}, {})
    path.rename(path.with_name("step_00000003.old"))
    newest = checkpoint.latest(root)
    assert newest is not None
    state = {"value": 0}
    checkpoint.load(newest, state)
    assert state == {"value": 1}
    checkpoint.save(root, 3, {"value": 2}, {})
    assert os.listdir(root) == ["step_00000003"]


@pytest.mark.parametrize("before", ["the second rename", "the deletion"])
def test_the_next_save_finishes_a_replacement_that_a_kill_cut_short(root: Path, before: str):
    path = checkpoint.save(root, 3, {"value": 1}, {})
    path.rename(path.with_name("step_00000003.old"))
    if before == "the deletion":
        shutil.copytree(path.with_name("step_00000003.old"), path)
    checkpoint.save(root, 4, {"value": 2}, {})
    assert sorted(os.listdir(root)) == ["step_00000003", "step_00000004"]
    state = {"value": 0}
    checkpoint.load(path, state)
    assert state == {"value": 1}


def only_tensor_file(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def flip(file: Path, position: float) -> None:
    data = bytearray(file.read_bytes())
    data[min(int(position * len(data)), len(data) - 1)] ^= 0x01
    file.write_bytes(bytes(data))


def damages() -> dict[str, tuple[Callable[[Path], object], str]]:
    found: dict[str, tuple[Callable[[Path], object], str]] = {
        "missing tensors": (lambda p: only_tensor_file(p).unlink(), "is missing"),
        "missing manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        "cut tensors": (
            lambda p: os.truncate(only_tensor_file(p), only_tensor_file(p).stat().st_size - 1),
            "bytes, expected",
        ),
        "foreign manifest": (lambda p: (p / "manifest.json").write_text("[]"), "is damaged"),
    }
    for share in (0.0, 0.3, 0.6, 1.0):
        found[f"byte of tensors {share}"] = (
            lambda p, share=share: flip(only_tensor_file(p), share),
            "is corrupt",
        )
        found[f"byte of manifest {share}"] = (
            lambda p, share=share: flip(p / "manifest.json", share),
            "is damaged",
        )
    for length in (0, 1, 500, -2, -1):
        found[f"cut manifest {length}"] = (
            lambda p, n=length: (p / "manifest.json").write_bytes(
                (p / "manifest.json").read_bytes()[:n]
            ),
            "is damaged",
        )
    return found


@pytest.mark.parametrize("damage", damages())
def test_every_damage_is_noticed_and_the_one_before_is_used(root: Path, damage: str):
    harm, message = damages()[damage]
    good = checkpoint.save(root, 1, make_state(1), {"good": True})
    bad = checkpoint.save(root, 2, make_state(2), {})
    harm(bad)
    state = make_state(5)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(bad, state)
    assert_same(state, make_state(5))
    with pytest.warns(UserWarning, match="step_00000002"):
        assert checkpoint.latest(root) == good


def test_unknown_format_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "FORMAT", 99)
    path = checkpoint.save(root, 1, {"a": 1}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(path, {"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["net"].pop("weight"), "net/weight is not part of this run"),
        (lambda s: s.update(new=torch.zeros(1)), "it lacks new"),
        (lambda s: s.update(new=1), "it lacks new"),
        (lambda s: s.update(count=torch.arange(4)), r"its count is \['int64', \[3\]\]"),
        (lambda s: s.update(count=torch.zeros(3)), r"expected \['float32', \[3\]\]"),
        (lambda s: s.update(count=1), "expected a plain value"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_untouched(root: Path, change, message):
    path = checkpoint.save(root, 1, make_state(1), {})
    state, before = make_state(2), make_state(2)
    change(state)
    change(before)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, state)
    assert_same(state, before)


def test_folders_that_are_no_checkpoints(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a folder"):
        checkpoint.read_meta(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoint.read_meta(tmp_path)
    with pytest.raises(CheckpointError, match="step_<number>"):
        checkpoint.step_of(tmp_path)


def test_prune_keeps_the_newest_and_the_chosen(root: Path):
    for step in range(1, 7):
        checkpoint.save(root, step, {"step": step}, {})
    checkpoint.prune(root, keep=2, always={1, 4, 99})
    assert sorted(os.listdir(root)) == [f"step_{step:08d}" for step in (1, 4, 5, 6)]
    with pytest.raises(InputError, match="at least 1"):
        checkpoint.prune(root, keep=0, always=set())


def test_a_save_that_runs_out_of_room_keeps_the_last_good_one(root: Path):
    good = checkpoint.save(root, 1, make_state(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 .*File too large.*Earlier"):
            checkpoint.save(root, 2, {"net": torch.zeros(100_000)}, {})
        # The tensors fit, the manifest does not.
        with pytest.raises(CheckpointError, match=r"step 2 .*File too large"):
            checkpoint.save(root, 2, {"net": torch.zeros(10)}, {"long": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(root) == ["step_00000001"]
    assert checkpoint.latest(root) == good
    checkpoint.save(root, 2, {"net": torch.zeros(100_000)}, {})


def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (not root)")
    try:
        good = checkpoint.save(disk, 1, {"net": torch.ones(40_000)}, {})
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=r"No space left on device.*Free some space"):
                checkpoint.save(disk, step, {"net": torch.ones(40_000)}, {})
        assert os.listdir(disk) == ["step_00000001"]
        assert checkpoint.latest(disk) == good
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpoint.save(tmp_path / "file" / "root", 1, {"a": 1}, {})


def test_kill_at_any_moment_leaves_a_verified_checkpoint(tmp_path: Path):
    saves, said = tmp_path / "saves", tmp_path / "said"
    saves.mkdir(), said.mkdir()
    done = run_main("tests.train.kill_saves", saves, folder=said)
    report = json.loads(done.stdout)
    assert report["kills"] > 20  # a change each: files, folders, renames, deletions
    assert report["left"] == ["old", "temporary"]  # also between the two renames of a replacement
    last = report["last"]
    assert report["listing"] == [f"step_{step:08d}" for step in (1, last - 1, last)]

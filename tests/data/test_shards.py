"""WebDataset shards hold the same clips as the folder that they were packed from."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.data.builtin_sources import Shards
from apt.data.check import check_folder
from apt.data.decode import probe
from apt.data.folder import VideoFolder
from apt.data.loader import make_loader
from apt.data.shards import VideoShards, scan_shards
from apt.data.statistics import read_captions, read_statistics
from apt.data.tar import Member, open_member, read_index
from apt.errors import DataError
from tests.data.media import noise, write_image, write_video

BUCKETS = [(9, 24, 40), (1, 24, 24)]


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos and an image as files, and as two shards, of which one has them in a folder."""
    root = tmp_path_factory.mktemp("shards")
    files = root / "files"
    files.mkdir()
    for i in range(3):
        write_video(files / f"v{i}.mp4", noise(14, 30, 50, i), 8, faststart=True, gop=3)
    write_image(files / "v3.png", noise(1, 30, 30, 50)[0])
    media = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
    for name in media:
        (files / name).with_suffix(".txt").write_text(f"about {name[:2]}")
    packed = root / "packed"
    packed.mkdir()
    first = {"v0.mp4": media["v0.mp4"], "v0.txt": b"about v0\n", "v1.mp4": media["v1.mp4"]}
    pack(packed / "a.tar", {**first, "v1.json": json.dumps({"caption": "about v1"}).encode()})
    second = {f"clips/{name}": media[name] for name in ("v2.mp4", "v3.png")}
    texts = {f"clips/v{i}.json": json.dumps({"text": f"about v{i}"}).encode() for i in (2, 3)}
    pack(packed / "b.tar", {**second, **texts})
    return root


def test_shards_give_the_clips_of_the_files(root: Path) -> None:
    files = VideoFolder(root / "files", buckets=BUCKETS, fps=8, strict=True)
    shards = VideoShards(root / "packed", buckets=BUCKETS, fps=8, strict=True)
    assert [item.entry.name for item in shards.items] == [
        "a.tar/v0.mp4", "a.tar/v1.mp4", "b.tar/clips/v2.mp4", "b.tar/clips/v3.png",
    ]  # fmt: skip
    assert shards.bucket_sizes() == files.bucket_sizes()
    for index in range(8):
        assert shards[index].caption == files[index].caption
        assert torch.equal(shards[index].pixels, files[index].pixels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resume_continues_at_the_exact_sample(root: Path, num_workers: int) -> None:
    def take(start: int, number: int) -> list[tuple[list[str], torch.Tensor]]:
        shards = VideoShards(root / "packed", buckets=BUCKETS, fps=8)
        loader = make_loader(
            shards, batch_size=2, seed=3, start_batch=start, num_workers=num_workers
        )
        return [(batch.captions, batch.pixels) for batch in islice(loader, number)]  # type: ignore[misc]

    for one, other in zip(take(0, 6)[3:], take(3, 3), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_what_is_wrong_is_named(root: Path, tmp_path: Path) -> None:
    whole = (root / "packed" / "a.tar").read_bytes()
    pack(tmp_path / "good.tar", {"x.mp4": (root / "files" / "v0.mp4").read_bytes(), "x.txt": b"x"})
    pack(tmp_path / "bare.tar", {"y.mp4": b"", "z.png": b"no picture", "z.txt": b"z"})
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    shards = VideoShards(tmp_path, buckets=BUCKETS, fps=8)
    assert [item.entry.name for item in shards.items] == ["good.tar/x.mp4"]
    problems = {problem.file: problem for problem in shards.report.problems}
    assert problems["bare.tar/y.mp4"].kind == "missing caption"
    assert problems["bare.tar/z.png"].kind == "unreadable"
    assert "/tmp" not in str(problems["bare.tar/z.png"])
    assert "not an uncompressed tar" in str(problems["broken.tar"])
    (tmp_path / "good.tar").write_bytes(whole[:2000])
    with pytest.raises(DataError, match="ends in the middle of a member"):
        shards[0]


def test_captions_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    texts = {
        "a.txt": b"\xef\xbb\xbfone",
        "b.txt": "é".encode("utf-16"),
        "c.json": b'\xef\xbb\xbf{"caption": "two"}',
        "d.json": b'{"caption": "half of a letter \\ud83d"}',
        "e.txt": "no mark".encode("utf-16-le"),
    }
    pack(tmp_path / "a.tar", {**texts, **{f"{name[0]}.png": b"" for name in texts}})
    found = scan_shards(tmp_path)
    assert [entry.caption for entry in found.entries] == ["one", "é", "two"]
    assert [problem.file for problem in found.problems] == ["a.tar/d.png", "a.tar/e.png"]


def test_shards_are_found_as_files_of_a_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root / "packed")
    (tmp_path / "._a.tar").write_bytes(b"what a Mac leaves on other disks")
    found = scan_shards(tmp_path)
    assert len(found.entries) == 4 and not found.problems


def test_a_file_of_two_names_is_two_samples(root: Path, tmp_path: Path) -> None:
    media = root / "files" / "v0.mp4"
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("a.mp4", "b.mp4"):
            (tmp_path / name).hardlink_to(media)
            (tmp_path / name).with_suffix(".txt").write_text(f"about {name[0]}")
            for kind in (".mp4", ".txt"):
                shard.add((tmp_path / name).with_suffix(kind), f"{name[0]}{kind}")
        assert shard.getmember("b.mp4").islnk()
    shards = VideoShards(tmp_path, buckets=BUCKETS, fps=8)
    assert [shards[index].caption for index in range(2)] == ["about a", "about b"]


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"uncompressed \.tar files"):
        VideoShards(tmp_path, buckets=BUCKETS)
    with pytest.raises(DataError, match="no such folder"):
        VideoShards(tmp_path / "nowhere", buckets=BUCKETS)


def test_a_check_of_shards_finds_what_one_of_the_files_does(root: Path) -> None:
    files, shards = check_folder(root / "files"), check_folder(root / "packed", scan=scan_shards)
    assert shards.ok and shards.decoded
    for name in ("num_files", "num_videos", "num_images", "resolutions", "durations", "captions"):
        assert getattr(shards, name) == getattr(files, name)


def test_a_check_names_broken_members(root: Path, tmp_path: Path) -> None:
    video = (root / "files" / "v0.mp4").read_bytes()
    pack(tmp_path / "a.tar", {"x.mp4": video[: len(video) // 2], "x.txt": b"x", "y.png": b"none"})
    found = check_folder(tmp_path, scan=scan_shards)
    assert not found.ok and found.num_files == 2
    assert {(problem.file, problem.kind) for problem in found.problems} == {
        ("a.tar/x.mp4", "unreadable"),
        ("a.tar/y.png", "missing caption"),
        ("a.tar/y.png", "unreadable"),
    }
    assert str(tmp_path) not in str(found.problems)


def test_of_a_member_only_what_is_asked_for_is_read(root: Path, tmp_path: Path) -> None:
    """Data far behind the header and the first frame may as well be missing."""
    video = (root / "files" / "v0.mp4").read_bytes()
    pack(tmp_path / "a.tar", {"x.mp4": video + bytes(10**6)})
    at = read_index(tmp_path / "a.tar")["x"]["mp4"]
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(at.offset + len(video) + 2**17)
    with open_member(tmp_path / "a.tar", at, "x.mp4") as member:
        assert probe(member) == probe(root / "files" / "v0.mp4")


@settings(max_examples=30)
@given(offset=st.integers(0, 40), size=st.integers(0, 40), steps=st.data())
def test_a_member_reads_as_a_file_of_its_own(offset: int, size: int, steps: st.DataObject) -> None:
    content = bytes(range(100))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        path.write_bytes(content)
        own = io.BytesIO(content[offset : offset + size])
        with open_member(path, Member(offset, size), "x") as member:
            for _ in range(4):
                whence = steps.draw(st.sampled_from([io.SEEK_SET, io.SEEK_END]))
                step = steps.draw(st.integers(0, 50)) * (1 if whence == io.SEEK_SET else -1)
                assert member.seek(step, whence) == own.seek(step, whence) == member.tell()
                number = steps.draw(st.integers(-1, 50))
                assert member.read(number) == own.read(number)


def test_shards_tell_which_clips_they_can_give(root: Path) -> None:
    files = read_statistics(root / "files")
    shards = read_statistics(root / "packed", scan=Shards.scan)
    assert (shards.videos, shards.images) == (files.videos, files.images)
    assert shards.captions == files.captions == read_captions(root / "packed", scan=Shards.scan)

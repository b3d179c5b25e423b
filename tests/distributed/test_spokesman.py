from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from apt.distributed.spokesman import claim, report


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """What a launcher gives its ranks."""
    made = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return made


def test_only_the_first_rank_that_fails_prints_its_error(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    claim()
    monkeypatch.setenv("RANK", "0")
    claim()
    monkeypatch.setenv("RANK", "1")
    report("the disk is full")
    monkeypatch.setenv("RANK", "0")
    report("rank 0 lost its peer")
    assert capfd.readouterr().err == "the disk is full\n"


def test_no_rank_exits_before_the_error_is_printed(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    silent = threading.Thread(target=report, args=[None])
    silent.start()
    silent.join(0.05)
    assert silent.is_alive()
    report("the disk is full")
    silent.join(10)
    assert not silent.is_alive()
    assert capfd.readouterr().err == "the disk is full\n"


def test_restarted_ranks_print_an_error_of_their_own(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for attempt, rank in (("0", "1"), ("1", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        report(f"error {attempt}")
    assert capfd.readouterr().err == "error 0\nerror 1\n"


def test_without_a_store_every_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    report("one")
    report(None)
    assert capfd.readouterr().err == "one\n"

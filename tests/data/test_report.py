from __future__ import annotations

import logging

import pytest

from apt.data.report import DataReport, Problem


def test_a_file_counts_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    report = DataReport(num_videos=2)
    with caplog.at_level(logging.WARNING):
        assert report.add(Problem("unreadable", "a.mp4", "bits lost"))
        assert not report.add(Problem("unreadable", "a.mp4", "bits lost again"))
        assert report.add(Problem("too short", "a.mp4", "5 frames"))
        assert report.add(Problem("unreadable", "b.mp4", "empty"))
    assert len(caplog.records) == 3
    assert "skipped a.mp4: unreadable (bits lost)" in caplog.text
    assert report.counts() == {"unreadable": 2, "too short": 1}
    assert report.text().splitlines() == [
        "2 videos and 0 images in use; 3 skipped",
        "  unreadable: 2",
        "    a.mp4: bits lost",
        "    b.mp4: empty",
        "  too short: 1",
        "    a.mp4: 5 frames",
    ]


def test_long_lists_are_cut_with_a_count() -> None:
    report = DataReport()
    for i in range(50):
        report.add(Problem("missing caption", f"{i}.mp4", "no text"))
    lines = report.text().splitlines()
    assert len(lines) == 23
    assert lines[-1] == "    and 30 more"
    assert len(report.problems) == 50

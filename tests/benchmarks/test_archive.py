"""Committed records can be read, name no local folder, and have their page beside them."""

from __future__ import annotations

import pytest

from apt.bench.records import read_records
from benchmarks.archive import CPU_NOTE, RESULTS


@pytest.mark.parametrize("topic", ["kernels", "dit"])
def test_committed_records(topic):
    records = read_records(RESULTS, topic)
    assert records
    for record in records:
        page = (RESULTS / f"{record.stem}.md").read_text(encoding="utf-8")
        assert record.machine.device in page
        assert record.provenance.commit != "unknown"
        assert record.machine.kind == "cuda" or record.note == CPU_NOTE
        assert " /" not in record.provenance.command

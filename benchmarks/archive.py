"""Turn measurements into records, judge them by the gates, and write them down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from apt.bench.ceilings import Ceilings
from apt.bench.gate import Verdict, check_record
from apt.bench.kernels import is_ours
from apt.bench.machine import Provenance, describe_machine, describe_run
from apt.bench.ops import OPS
from apt.bench.records import Measurement, Record, read_records, write_record
from apt.bench.tables import markdown, record_table, verdict_table
from apt.bench.targets import read_targets

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
TARGETS = FOLDER / "targets.toml"

CPU_NOTE = (
    "The CPU form: a test of the harness on torch's reference ops. It says nothing about the "
    "kernels, which need a GPU. Small inputs stay in the processor's caches, so that shares of the "
    "copy rate above 100 % are possible."
)


class Judged:
    """A record, the verdicts of the gates on it, and whether its run must fail."""

    def __init__(self, record: Record, verdicts: Sequence[Verdict]) -> None:
        failed = tuple(sorted({v.subject for v in verdicts if v.fails}))
        self.record = replace(record, failed=failed)
        self.verdicts = list(verdicts)
        self.wrong = [
            m for m in record.measurements if m.status == "wrong" and _is_our_mistake(record, m)
        ]

    @property
    def fails(self) -> bool:
        return bool(self.wrong or self.record.failed)

    def report(self) -> str:
        """Return a table of the times and one of the gates, for a terminal."""
        record = self.record
        title = f"{record.topic} on {record.machine.device}"
        note = [record.note] if record.note else []
        return "\n\n".join(
            [title, *note, record_table(record), "Gates:", verdict_table(self.verdicts)]
        )

    def page(self) -> str:
        """Return the record and its gates in Markdown."""
        return markdown(self.record, self.verdicts)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write the raw samples and the page; return the path of the page."""
        page = write_record(self.record, folder).with_suffix(".md")
        page.write_text(self.page(), encoding="utf-8")
        return page


def judge(
    topic: str,
    measurements: Sequence[Measurement],
    ceilings: Ceilings,
    device: torch.device,
    *,
    provenance: Provenance | None = None,
) -> Judged:
    """Make a record of a run's measurements, and judge it by the targets and by older records.

    Args:
        topic: topic of the record.
        measurements: all measurements of the topic.
        ceilings: rates measured in the same run.
        device: the device that was measured.
        provenance: shared by all records of a run, and by later versions of one; None takes this
            run at this time.
    """
    record = Record(
        topic=topic,
        note=CPU_NOTE if device.type == "cpu" else "",
        provenance=provenance or describe_run(),
        machine=describe_machine(device),
        ceilings=ceilings.as_dict(),
        measurements=tuple(measurements),
    )
    targets = read_targets(TARGETS)
    archive = [r for r in read_records(RESULTS, topic) if r.stem != record.stem]
    return Judged(record, check_record(record, archive, targets.budgets, targets.policies))


def _is_our_mistake(record: Record, m: Measurement) -> bool:
    if record.topic != "kernels":
        return True
    return is_ours(OPS[str(m.case["op"])], str(m.case["variant"]))

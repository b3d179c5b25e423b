"""Records: files of raw samples with everything that they depend on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from apt.bench.machine import Machine, Provenance
from apt.bench.timing import median
from apt.errors import InputError

SCHEMA = 1

Status = Literal["measured", "wrong", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurement of one variant of one case.

    Attributes:
        case: what was measured, in names and numbers: op, shape, dtype, variant and so on.
        status: "wrong" and "skipped" have no samples: a wrong result has no speed.
        reason: why there are no samples.
        samples_ms: milliseconds of each run.
        metrics: derived figures: bytes, gb_s, share_of_copy, error and so on.
        facts: observations in words, such as "attention_kernel"; runs that differ only in these
            are comparable.
    """

    case: Mapping[str, str | int]
    status: Status = "measured"
    reason: str = ""
    samples_ms: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.status == "measured") != bool(self.samples_ms):
            raise InputError(f"{self.status} with {len(self.samples_ms)} samples: {self.case}")

    @property
    def median_ms(self) -> float:
        """Median of the samples in milliseconds; there must be samples."""
        return median(self.samples_ms)

    @property
    def label(self) -> str:
        """The case in one line."""
        return " ".join(str(value) for value in self.case.values())


@dataclass(frozen=True, kw_only=True)
class Record:
    """The measurements of one topic in one run on one machine.

    Attributes:
        topic: "kernels", "dit".
        note: what a reader must know first ("the CPU form: a test of the harness").
        provenance, machine: where the measurements come from.
        ceilings: rates measured in the same run, as `apt.bench.ceilings.Ceilings.as_dict` gives
            them.
        measurements: all measurements, also wrong and skipped ones.
        failed: labels of measurements that failed a gate; they are kept but are never a baseline
            for later ones.
        schema: version of the format.
    """

    topic: str
    note: str
    provenance: Provenance
    machine: Machine
    ceilings: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    failed: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def stem(self) -> str:
        """DATE_DEVICE_TOPIC, the name of the record's files without suffix."""
        date = re.sub(r"[-:]", "", self.provenance.date)
        device = re.sub(r"[^a-z0-9]+", "-", self.machine.device.lower()).strip("-")
        return f"{date}_{device}_{self.topic}"


def write_record(record: Record, folder: Path) -> Path:
    """Write DATE_DEVICE_TOPIC.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.stem}.json"
    text = json.dumps(_rounded(asdict(record)), indent=1)
    # Put each list of numbers on one line: only programs read the samples
    text = re.sub(r"\[\s+([-0-9.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> Record:
    """Read a record. Raises InputError for a file that is not a record of this schema."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise InputError(
                f"{path.name} has schema {data['schema']}, expected {SCHEMA}: measure again"
            )
        data["provenance"] = Provenance(**data["provenance"])
        data["machine"] = Machine(**data["machine"])
        data["measurements"] = tuple(
            Measurement(**m | {"samples_ms": tuple(m["samples_ms"])}) for m in data["measurements"]
        )
        return Record(**data | {"failed": tuple(data["failed"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path.name} is not a benchmark record: {error}") from error


def read_records(folder: Path, topic: str) -> list[Record]:
    """Read all records of a topic in a folder, oldest first; none if the folder is missing."""
    return [read_record(path) for path in sorted(folder.glob(f"*_{topic}.json"))]


def first_line(error: Exception) -> str:
    """Return an unexpected error as one line, as the reason why something was not measured."""
    text = (str(error).splitlines() or [""])[0]
    return f"raised {type(error).__name__}: {text}"


def _rounded(value: Any) -> Any:
    """Round floats to six digits, which is more than any clock has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value

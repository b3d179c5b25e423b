"""The machine and software of a measurement, without which a time means nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from apt.errors import InputError
from apt.kernels.attention_choice import cudnn_version

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and its software. Times are comparable between equal machines only.

    Attributes:
        device: product name, from its driver or the operating system.
        kind: "cuda" or "cpu".
        capability: compute capability, such as "9.0"; empty on a CPU.
        threads: threads that torch uses on a CPU; 0 on a GPU, where they do not matter.
        memory_gb: memory of the device, rounded.
        python, torch, triton, cuda, cudnn, liger: versions; empty if absent.
        system: operating system and architecture.
    """

    device: str
    kind: str
    capability: str
    threads: int
    memory_gb: int
    python: str
    torch: str
    triton: str
    cuda: str
    liger: str
    system: str
    cudnn: str = ""  # older records do not have it

    def describe(self) -> str:
        """Return the device and the versions that matter, in one line."""
        versions = {
            "torch": self.torch, "triton": self.triton, "CUDA": self.cuda, "cuDNN": self.cudnn,
        }  # fmt: skip
        return ", ".join([self.device, *(f"{k} {v}" for k, v in versions.items() if v)])


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a record comes from.

    Attributes:
        date: UTC date in ISO 8601, to the second.
        command: the command line, without folders.
        commit: commit of the checkout, with "+changes" if tracked files differ from it; "unknown"
            outside a checkout.
        apt: version of the package.
    """

    date: str
    command: str
    commit: str
    apt: str


def describe_machine(device: torch.device) -> Machine:
    """Return the machine as torch sees it. Raises InputError if a GPU is missing."""
    if device.type == "cuda":
        check_cuda()
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
    else:
        name, memory, capability = cpu_name(), _host_memory(), ""
    return Machine(
        device=name,
        kind=device.type,
        capability=capability,
        threads=0 if device.type == "cuda" else torch.get_num_threads(),
        memory_gb=round(memory / 2**30),
        python=".".join(map(str, sys.version_info[:2])),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=(torch.version.cuda or "") if device.type == "cuda" else "",
        liger=_version("liger-kernel"),
        system=f"{platform.system()} {platform.machine()}",
        cudnn=cudnn_version() if device.type == "cuda" else "",
    )


def find_device(name: str | None) -> torch.device:
    """Return cpu or cuda; None takes a GPU if there is one. Raises InputError for other names."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"benchmarks run on cpu or cuda, not on {name!r}")
    if name == "cuda":
        check_cuda()
    return torch.device(name)


def check_cuda() -> None:
    """Raise InputError unless torch sees a GPU."""
    if not torch.cuda.is_available():
        raise InputError(
            "PyTorch sees no CUDA GPU here; use the CPU, or `--floor --gpu NAME` for an estimate"
        )


def describe_run(command: str | None = None) -> Provenance:
    """Return the current time, this command line, and the commit of this checkout."""
    from apt.version import __version__

    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None unless run by `python -m`
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        command=command or command_line(sys.argv, getattr(spec, "name", None)),
        commit=find_commit(_PACKAGE),
        apt=__version__,
    )


def command_line(argv: list[str], module: str | None = None) -> str:
    """Return a command as a reader can type it, without folders of this machine.

    Args:
        argv: `sys.argv`.
        module: the module that `python -m` runs; None for a script.
    """
    first, *rest = argv
    if module is not None:
        first = f"python -m {module.removesuffix('.__main__')}"
    return " ".join([first.rpartition("/")[2], *map(_without_folder, rest)])


def find_commit(folder: Path) -> str:
    """Return the commit of the git checkout that a folder is in; see `Provenance.commit`."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    # No git, or no checkout (an installed package, or a copy without history)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+changes" if changes else "")


def cpu_name() -> str:
    """Return the processor's product name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if value.startswith("/") else word


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

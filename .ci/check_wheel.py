"""Fail unless a wheel holds every file of the package, the shipped models included, and no more."""

from __future__ import annotations

import subprocess
import sys
import zipfile


def main(wheel: str) -> str | None:
    """Return what is wrong with the wheel at this path, or None."""
    tracked = subprocess.run(
        ["git", "ls-files", "apt"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    missing, extra = sorted(set(tracked) - packed), sorted(packed - set(tracked))
    if missing or extra:
        return f"the wheel lacks {missing} and has, without being part of apt, {extra}"
    print(f"{len(packed)} files of the package are in the wheel")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

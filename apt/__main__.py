"""Entry point of `python -m apt` and of the installed command `diffusion-apt`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from apt.cli import app
from apt.distributed.launch import is_one_of_many


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; with several ranks, exit with it instead."""
    code = app.main(argv)
    if is_one_of_many():
        # Gloo's threads outlive destroy_process_group. One that frees a tensor while Python shuts
        # down aborts the process, although all work is done (pytorch issue 190489; 5 of 12 runs
        # with two ranks on two busy cores). So ranks exit without that shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

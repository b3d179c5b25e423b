"""`python -m apt`, and the installed command `diffusion-apt`."""

from __future__ import annotations

import sys

from apt.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

"""A script that forks processes on request, with torch and our package already loaded.

Loading torch, and what diffusers and transformers load beside it, takes longer than most tests. The
script computes nothing, so its children may start threads. huggingface_hub reads its settings when
it is imported, so each process imports it, and what depends on it, by itself.

A request is a line of JSON on stdin: the code, its arguments, its environment, and a folder for its
`stdout`, `stderr` and, when it has ended, `code`. The answer is the process's id.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import apt.checkpoints.load
import apt.cli.app
import apt.hub
import apt.pipeline
import apt.train.trainer

for name in ("av", "matplotlib.figure", "scipy.stats", "sklearn.datasets", "tyro"):
    importlib.import_module(name)
importlib.import_module("torch.utils.tensorboard")


def run(request: dict[str, Any]) -> NoReturn:
    """Become the requested process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    folder = Path(request["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["-c", *request["args"]]
    code = 0
    try:
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "code.partial").write_text(str(code))
    (folder / "code.partial").rename(folder / "code")
    os._exit(code)


if __name__ == "__main__":
    assert apt.cli.app and apt.hub and apt.checkpoints.load and apt.pipeline and apt.train.trainer
    assert "huggingface_hub" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the children
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(child, flush=True)

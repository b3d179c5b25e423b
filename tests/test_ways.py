"""The package's files that a prompt, a checkpoint and a sample pass through are no more than
docs/architecture.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# Counts files with a function that runs on the main thread, once all is imported and warm.
COUNT = """
import sys
from pathlib import Path
import apt

root = str(Path(apt.__file__).parent)
seen = set()

def note(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(root) and code.co_name != "<module>":
        seen.add(code.co_filename.removeprefix(root + "/"))

def count(do):
    do()
    seen.clear()
    sys.setprofile(note)
    do()
    sys.setprofile(None)
    return sorted(seen)

folder = sys.argv[1]
"""

GENERATE_AND_LOAD = """
from apt.cli.app import main

args = ["--model", "digits", "--prompt", "a red seven moving left", "--out", f"{folder}/seven.mp4"]
print("prompt", *count(lambda: main(["generate", *args])))
print("loading", *count(lambda: apt.OneStepPipeline.from_pretrained("digits")))
"""

TRAIN = """
from apt.data.digits import FPS, MovingDigits
from apt.data.write import write_video_folder
from apt.cli.app import main
from apt.train.logs import RunLog

write_video_folder(MovingDigits(0), Path(folder) / "clips", 4, FPS)
write = RunLog.write

def once_per_update(log, *args, **figures):
    write(log, *args, **figures)
    sys.setprofile(None if seen else note)  # the second update alone

RunLog.write = once_per_update
main(
    "train digits_pixels_pretrain --num-updates 3 --batch-size 2 --sample-every 0 --precision fp32 "
    "--optimizer.warmup-updates 0 --optimizer.decay-updates 0 --data.source folder "
    "--model.options hidden_size 24 depth 2 num_heads 2".split()
    + ["--run-dir", f"{folder}/run", "--data.path", f"{folder}/clips"]
)
print("sample", *sorted(seen))
"""


def files_of(code: str, folder: Path) -> dict[str, list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", COUNT + code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[-1].endswith(".py")}


def stated(way: str) -> int:
    """The figure in the line that begins with the way's name."""
    found = re.search(rf"^\| {way} \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
    assert found, f"docs/architecture.md has no figure for {way!r}"
    return int(found[1])


def test_a_prompt_and_loading_pass_through_as_few_files_as_told(tmp_path: Path) -> None:
    files = files_of(GENERATE_AND_LOAD, tmp_path)
    for way in ("prompt", "loading"):
        assert "pipeline.py" in files[way]
        assert len(files[way]) <= stated(way), f"join what belongs together: {files[way]}"


@pytest.mark.slow
def test_a_sample_passes_through_as_few_files_as_told(tmp_path: Path) -> None:
    files = files_of(TRAIN, tmp_path)["sample"]
    assert "train/loop.py" in files and "data/decode.py" in files
    assert len(files) <= stated("sample"), f"join what belongs together: {files}"

"""Run VBench over a folder of videos, in VBench's own environment, without this package.

    python vbench_run.py VIDEOS RESULTS

Each dimension writes its own file when it is done, so a stopped run can be continued with the same
command. docs/vbench.md describes the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
"""All dimensions that the scores need."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate the dimensions that have no results yet; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("videos", type=Path, help="folder of PROMPT-0.mp4 to PROMPT-4.mp4")
    parser.add_argument("results", type=Path, help="folder for the figures")
    parser.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=DIMENSIONS)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args(argv)
    if not asked.videos.is_dir():
        print(f"error: {asked.videos} is not a folder", file=sys.stderr)
        return 2
    waiting = [name for name in asked.dimensions if not _done(asked.results, name)]
    if not waiting:
        print(f"all {len(asked.dimensions)} dimensions are in {asked.results}")
        return 0

    import torch
    import vbench

    full_info = Path(vbench.__file__).parent / "VBench_full_info.json"
    runner = vbench.VBench(torch.device(asked.device), str(full_info), str(asked.results))
    for number, name in enumerate(waiting, 1):
        print(f"{name} ({number} of {len(waiting)})", flush=True)
        runner.evaluate(
            videos_path=str(asked.videos),
            name=name,
            dimension_list=[name],
            local=False,
            read_frame=False,
            mode="vbench_standard",
            imaging_quality_preprocessing_mode="longer",
        )
    return 0


def _done(results: Path, dimension: str) -> bool:
    try:
        text = (results / f"{dimension}_eval_results.json").read_text(encoding="utf-8")
        return dimension in json.loads(text)
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())

"""VBench's prompts, names and results. VBench itself does not run here: weights, CUDA, old pins."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from apt.errors import DataError, InputError
from apt.evaluate.vbench import arrange_videos, read_vbench_prompts, read_vbench_results
from apt.evaluate.vbench_run import DIMENSIONS, main
from apt.metrics.vbench import QUALITY_DIMENSIONS, SEMANTIC_DIMENSIONS
from apt.samples import Sample, SampleKey

ENTRIES = [
    {"prompt_en": "a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "a bird", "dimension": ["color"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency"]},
]
PROMPTS = {
    "a stop sign": ("temporal_flickering",),
    "The bund Shanghai, oil painting": ("appearance_style", "overall_consistency"),
    "a bird": ("color",),
}


def samples(folder: Path, number: int = 6, suffix: str = ".mp4") -> dict[SampleKey, Sample]:
    found: dict[SampleKey, Sample] = {}
    for place, prompt in enumerate(PROMPTS):
        for seed in reversed(range(number)):
            path = folder / f"{place}-{seed}{suffix}"
            path.write_text(f"{prompt} {seed}")
            found[prompt, seed] = Sample(path=path, prompt=prompt, seed=seed, sha256="")
    return found


def test_the_dimensions_are_those_of_the_scores() -> None:
    names = {*QUALITY_DIMENSIONS, *SEMANTIC_DIMENSIONS}
    assert sorted(name.replace("_", " ") for name in DIMENSIONS) == sorted(names)


def test_prompts_from_a_wheel_a_folder_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(ENTRIES))
    with zipfile.ZipFile(tmp_path / "vbench-1.whl", "w") as wheel:
        wheel.write(path, "vbench/VBench_full_info.json")
    for source in (path, tmp_path, tmp_path / "vbench-1.whl"):
        assert read_vbench_prompts(source) == PROMPTS


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"prompt_en": "x"}]', "[3]"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "info.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"info\.json"):
        read_vbench_prompts(path)
    (tmp_path / "broken.whl").write_text(content)
    with pytest.raises(DataError, match="pip download --no-deps vbench"):
        read_vbench_prompts(tmp_path / "broken.whl")


def test_a_prompt_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text(json.dumps([{"prompt_en": "../x", "dimension": ["color"]}]))
    with pytest.raises(DataError, match="cannot be file names"):
        read_vbench_prompts(path)


def test_five_videos_of_each_prompt_in_the_order_of_seeds(tmp_path: Path) -> None:
    made = samples(tmp_path)
    for _ in range(2):  # a second time replaces them
        files = arrange_videos(made, list(PROMPTS), tmp_path / "videos")
    assert sorted(files) == sorted((tmp_path / "videos").iterdir())
    assert {path.name: path.read_text() for path in files} == {
        f"{prompt}-{seed}.mp4": f"{prompt} {seed}" for prompt in PROMPTS for seed in range(5)
    }


def test_samples_that_vbench_would_miss(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 of 3 prompts have fewer than 5 samples: a stop sign"):
        arrange_videos(samples(tmp_path, 4), list(PROMPTS), tmp_path / "videos")
    with pytest.raises(DataError, match="only MP4"):
        arrange_videos(samples(tmp_path, suffix=".gif"), list(PROMPTS), tmp_path / "videos")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        arrange_videos(samples(tmp_path), list(PROMPTS), tmp_path / "file")


class TestRun:
    """The script, with a stand-in that takes and leaves what vbench 0.1.5 does."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        asked: list[str] = []

        class VBench:
            def __init__(self, device: Any, full_info_dir: str, output_path: str) -> None:
                self.out = Path(output_path)
                self.out.mkdir(parents=True, exist_ok=True)

            def evaluate(
                self, videos_path: str, name: str, dimension_list: list[str], **options: Any
            ) -> None:
                asked.append(name)
                results = {
                    d: [0.5, [{"video_path": "x", "video_results": 1}]] for d in dimension_list
                }
                (self.out / f"{name}_eval_results.json").write_text(json.dumps(results))

        module = types.ModuleType("vbench")
        module.__file__ = __file__
        module.VBench = VBench  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vbench", module)
        return asked

    def test_goes_on_where_it_was_and_is_read_back(self, tmp_path: Path, asked: list[str]) -> None:
        results = tmp_path / "results"
        arguments = [str(tmp_path), str(results), "--device", "cpu"]
        assert main([*arguments, "--dimensions", "color", "scene"]) == 0
        (results / "scene_eval_results.json").write_text("{cut o")
        assert main(arguments) == 0
        assert sorted(asked) == sorted([*DIMENSIONS, "scene"])
        assert main(arguments) == 0 and len(asked) == len(DIMENSIONS) + 1
        values, scores = read_vbench_results(results)
        assert values == dict.fromkeys(DIMENSIONS, 0.5)
        assert scores.total == pytest.approx((4 * scores.quality + scores.semantic) / 5)

    def test_a_folder_that_is_not_there(self, tmp_path: Path, asked: list[str]) -> None:
        assert main([str(tmp_path / "none"), str(tmp_path)]) == 2
        assert not asked


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no VBench results"):
        read_vbench_results(tmp_path)
    (tmp_path / "a_eval_results.json").write_text('{"color": [0.5, []]}')
    with pytest.raises(InputError, match="each of the 16 dimensions"):
        read_vbench_results(tmp_path)
    (tmp_path / "b_eval_results.json").write_text('{"color": [0.4, []]}')
    with pytest.raises(DataError, match="color more than once"):
        read_vbench_results(tmp_path)
    (tmp_path / "b_eval_results.json").write_text("[0.4]")
    with pytest.raises(DataError, match=r"b_eval_results\.json' cannot be read"):
        read_vbench_results(tmp_path)

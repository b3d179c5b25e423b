"""The whole way: models and a protocol in; samples, figures and a page out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from apt.checkpoints.save import save_bundle
from apt.data.decode import probe, read_clip
from apt.errors import CheckpointError, DataError, InputError
from apt.evaluate.choice import ModelChoice, parse_model
from apt.evaluate.harness import evaluate
from apt.evaluate.protocol import SEED_STRIDE, Figure, Figures, Protocol, Request
from apt.generate_options import GenerateOptions
from apt.samples import Sample, read_samples
from tests.cli.shell import ROOT
from tests.tiny import tiny_bundle


def brightness_of(sample: Sample) -> float:
    info = probe(sample.path)
    return float(read_clip(sample.path, start=Fraction(0), num_frames=1, fps=info.fps).mean())


@dataclass
class Brightness:
    """Measures the first frames, and counts how often it is asked."""

    calls: list[tuple[int, ...]] = field(default_factory=list)
    breaks: bool = False

    def build(self, request: Request) -> Protocol:
        return Protocol(
            name="brightness",
            about="How *bright* first frames are.",
            prompts=("a red | one", "a blue two"),
            samples_per_prompt=2,
            seeds=(1, 4),
            options=GenerateOptions(frames=5),
            figures={
                "mean": Figure("brightness", "higher"),
                "change": Figure("change", "lower", "log"),
            },
            measures=(self.measure,),
            pair_measures=(self.compare,),
        )

    def measure(self, samples: Sequence[Sample]) -> Figures:
        self.calls.append(tuple(sample.seed for sample in samples))
        if self.breaks:
            self.breaks = False
            other = samples[0].path.parent / f"prompt1-seed{4 * SEED_STRIDE + 2}.mp4"
            other.write_bytes(other.read_bytes()[:-50])
        return {"mean": float(np.mean([brightness_of(sample) for sample in samples]))}

    def compare(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Figures:
        assert [s.seed for s in samples] == [s.seed for s in others]
        changes = [
            brightness_of(a) - brightness_of(b) for a, b in zip(samples, others, strict=True)
        ]
        return {"change": float(np.abs(changes).mean())}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelChoice]:
    folder = save_bundle(tmp_path_factory.mktemp("model") / "tiny", tiny_bundle())
    return [parse_model(str(folder)), parse_model(f"two={folder},num_steps=2")]


@pytest.fixture(scope="module")
def protocol() -> Brightness:
    return Brightness(breaks=True)


@pytest.fixture(scope="module")
def page(
    models: list[ModelChoice], protocol: Brightness, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of a call that met a broken file, and was repeated."""
    out = tmp_path_factory.mktemp("evaluation")
    with pytest.raises(DataError, match=r"prompt1-seed4000002.mp4' was truncated .*evaluate again"):
        evaluate(protocol, models, out, device="cpu")
    found = evaluate(protocol, models, out, device="cpu", command="diffusion-apt evaluate it")
    assert found is not None
    return found


def test_what_was_measured_is_not_measured_again(
    page: Path, protocol: Brightness, models: list[ModelChoice]
) -> None:
    first = tuple(SEED_STRIDE + i for i in range(4))
    fourth = tuple(4 * SEED_STRIDE + i for i in range(4))
    # The first call measured one seed of one model; both models draw the same noise.
    assert protocol.calls == [first, fourth, first, fourth]
    before = page.read_bytes()
    again = evaluate(
        protocol, models, page.parent, device="cpu", command="diffusion-apt evaluate it"
    )
    assert again == page and page.read_bytes() == before
    assert len(protocol.calls) == 4


def test_the_figures_are_those_of_the_samples(page: Path, models: list[ModelChoice]) -> None:
    data = json.loads(page.with_suffix(".json").read_text())
    assert [model["name"] for model in data["models"]] == ["tiny", "two"]
    for model in data["models"]:
        samples = read_samples(page.parent / "samples" / model["name"]).samples
        assert len(samples) == 8
        assert model["settings"]["frames"] == 5
        for seed in (1, 4):
            values = [brightness_of(s) for s in samples.values() if s.seed // SEED_STRIDE == seed]
            assert len(values) == 4
            assert model["figures"][f"seed {seed}"]["mean"] == pytest.approx(np.mean(values))
        found = [model["figures"][f"seed {seed}"]["mean"] for seed in (1, 4)]
        summary = model["summary"]["mean"]
        assert summary["mean"] == pytest.approx(np.mean(found))
        assert summary["std"] == pytest.approx(np.std(found, ddof=1))
    one, two = data["models"]
    assert "change" not in one["summary"] and two["summary"]["change"]["mean"] > 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert rows[0].endswith("| – |") and "±" in rows[0]
    assert data["command"] == "diffusion-apt evaluate it"


def test_the_html_page_is_whole_in_itself(page: Path) -> None:
    text = page.with_suffix(".html").read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert sum(source.startswith("data:video/mp4;base64,") for source in sources) == 4
    assert all(source.startswith("data:") for source in sources)
    bare = re.sub(r'src="[^"]*"', "", text)
    assert "http" not in bare and "url(" not in bare and "@import" not in bare
    assert "<em>bright</em>" in text and "<td>" in text
    assert "a red | one" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_what_is_wrong_is_one_line_before_anything_is_made(
    models: list[ModelChoice], tmp_path: Path
) -> None:
    protocol = Brightness()
    with pytest.raises(InputError, match="different names"):
        evaluate(protocol, [models[0], models[0]], tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no model 'digit'"):
        evaluate(protocol, [models[0], parse_model("digit")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a folder"):
        evaluate(protocol, models, tmp_path / "file")


@pytest.mark.slow
def test_two_ranks_of_torchrun_write_the_page_of_one(
    models: list[ModelChoice], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red one\na blue two\na green three\n")
    manifests, pages = [], []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        out = tmp_path / name
        options = ["--model", models[0].place, "--out", out, "--prompts", tmp_path / "prompts.txt"]
        command = [sys.executable, *launcher, "-m", "apt", "evaluate", "prompts", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == [f"{out}/prompts.md", f"{out}/prompts.html"]
        manifests.append(sorted((out / "samples/tiny/samples.jsonl").read_text().splitlines()))
        pages.append((out / "prompts.md").read_text().replace(str(out), "OUT"))
    assert manifests[0] == manifests[1] and len(manifests[0]) == 4
    assert pages[0] == pages[1]

"""`diffusion-apt generate` with a small untrained model in a folder."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("tyro")

import av
import torch
from PIL import Image
from safetensors.torch import save_file

import apt.media
from apt.checkpoints.info import ModelInfo, SampleInfo
from apt.checkpoints.load import ModelBundle, component_info, load_bundle
from apt.checkpoints.save import save_bundle
from apt.cli.generate import output_paths, read_prompts, what_ran
from apt.kernels.attention_choice import AttentionUse
from apt.models import create_codec, create_model, create_text_encoder
from apt.rng import generator_for
from tests.cli.shell import ROOT, Result, error_line, invoke, run_cli

PROMPT = "a red seven moving left"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = create_text_encoder("bytes", width=16, depth=1, num_heads=2)
    codec = create_codec("patchify", spatial=8)
    backbone = create_model(
        "mmdit_digits",
        hidden_size=24,
        depth=1,
        num_heads=2,
        text_dim=16,
        pooled_dim=16,
        in_channels=codec.channels,
    )
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator_for("weights"))
    info = ModelInfo(
        stage="apt",
        model=component_info("mmdit_digits", backbone),
        text_encoder=component_info("bytes", encoder),
        codec=component_info("patchify", codec),
        sample=SampleInfo(frames=5, height=16, width=16, fps=8),
    )
    folder = tmp_path_factory.mktemp("model")
    return save_bundle(folder, ModelBundle(backbone, encoder, codec, info))


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_one_video(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.mp4"
    result = run_cli("generate", "--model", model, "--prompt", PROMPT, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}  {PROMPT!r}, seed 0\n"
    assert num_frames(out) == 5


def test_verbose_says_what_computed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    args = ("generate", "--model", model, "--prompt", PROMPT, "--out", out, "--device", "cpu")
    lines = invoke(*args, "--verbose").stdout.splitlines()
    norms = r"modulated_norm: reference: inputs on cpu, \d+ calls"
    assert lines[0] == f"{out}  {PROMPT!r}, seed 0"
    assert f"torch {torch.__version__}" in lines[1]
    assert any(line.startswith("attention: native: torch's flash, ") for line in lines)
    assert any(re.fullmatch(norms, line) for line in lines)
    assert "WARNING" not in "".join(lines)  # which is for GPUs


def test_what_ran_ends_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.kernels.attention_choice.attention_warning", lambda *_: "not cuDNN")
    seen = Counter([AttentionUse("native", "torch's flash", (1, 2, 2, 1, 8), "bfloat16")] * 2)
    lines = what_ran(torch.device("cpu"), seen, Counter())
    assert lines[1:] == [
        "attention: native: torch's flash, 2 calls of (1, 2, 2, 1, 8) bfloat16",
        "WARNING: not cuDNN",
    ]


def test_prompts_times_seeds_and_contact_sheet(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\na blue one moving up\n\n", encoding="utf-8")
    sheet = tmp_path / "sheet.png"
    arguments = [
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--prompt-file",
        prompts,
        "--seeds",
        "3",
        "4",
    ]
    result = invoke(
        "generate", *arguments, "--out", tmp_path / "x.gif", "--contact-sheet", sheet,
        "--num-steps", "2", "--frames", "1", "--height", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = {f"x-prompt{p}-seed{s}.gif" for p in (0, 1) for s in (3, 4)}
    others = {"sheet.png", "prompts.txt", "x.gif.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, *others}
    with Image.open(tmp_path / "x-prompt1-seed4.gif") as image:
        assert image.height == 2 * image.width
        assert getattr(image, "n_frames", 1) == 1
    assert [line.split("  ")[-1] for line in result.stdout.splitlines()[:4]] == [
        f"{PROMPT!r}, seed 3",
        f"{PROMPT!r}, seed 4",
        "'a blue one moving up', seed 3",
        "'a blue one moving up', seed 4",
    ]


def test_same_seed_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        invoke("generate", "--model", model, "--prompt", PROMPT, "--out", tmp_path / name)
    seed = ["--seed", "1", "--out", tmp_path / "c.png"]
    invoke("generate", "--model", model, "--prompt", PROMPT, *seed)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_output_paths() -> None:
    out = Path("d/x.mp4")
    assert output_paths(out, num_prompts=1, seeds=[7]) == [out]
    assert output_paths(out, num_prompts=1, seeds=[7, 8]) == [
        Path("d/x-seed7.mp4"),
        Path("d/x-seed8.mp4"),
    ]
    assert output_paths(out, num_prompts=2, seeds=[7]) == [
        Path("d/x-prompt0.mp4"),
        Path("d/x-prompt1.mp4"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", ""], "a prompt must be non-empty text"),
        (["--prompt", "a \udcff"], "contains bytes that are not UTF-8"),
        (["--prompt-file", "missing.txt"], "cannot read prompts from 'missing.txt'"),
        (["--prompts", "missing.txt"], "cannot read prompts from 'missing.txt'"),
        (["--prompt", "x", "--out", "x.avi"], "its ending must be .mp4 or"),
        (["--prompt", "x", "--contact-sheet", "x.mp4"], "its ending must be .png"),
        (["--prompt", "x", "--seeds", "1", "1"], "seeds must differ"),
        (["--prompt", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["--prompt", "x", "--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--prompt", "x", "--frames", "6"], "frames = 6 does not fit this model; use 5 or 9"),
        (["--prompt", "x", "--height", "17"], "height = 17 does not fit this model"),
        (["--prompt", "x", "--num-steps", "0"], "num_steps must be a whole number of at least 1"),
        (["--prompt", "x", "--num-steps", "1000000000"], "num_steps must be at most 1000"),
        (["--prompt", "x", "--batch-size", "0"], "batch_size must be a whole number"),
        (["--prompt", "x", "--fps", "nan"], "fps must be above 0 and at most 1000"),
        (["--prompt", "x", "--fps", "-3"], "fps must be above 0 and at most 1000"),
        (["--prompt", "x", "--scale", "0"], "scale must be a whole number of at least 1"),
        (["--prompt", "x", "--scale", "5000"], ".mp4 holds at most 16384 pixels a side"),
        (["--prompt", "x", "--out", "x.png", "--scale", "100000"], "needs more than"),
        (["--prompt", "x", "--cfg-scale", "nan"], "cfg_scale must be finite"),
        (["--prompt", "x", "--frames", "4000000000001"], "needs more than"),
        (["--prompt", "x", "--out", "tests"], "its ending must be .mp4 or"),
        (["--prompt", "x", "--out", "README.md/x.mp4"], "'README.md' is a file"),
        (
            ["--prompt", "x", "--resume", "--contact-sheet", "x.png"],
            "leave out one of the two",
        ),
        (
            ["--prompt", "x", "--out", "x.png", "--contact-sheet", "x.png"],
            "would be both a",
        ),
        (["--prompt", "x", "--lora", "README.md"], "is not a safetensors file"),
        (["--prompt", "x", "--lora", "docs"], "there is no LoRA in 'docs'"),
        (["--prompt", "x", "--timesteps", "0", "1"], "timesteps must fall strictly from 1"),
        (["--prompt", "x", "--model", "no-such-model"], "there is no model 'no-such-model'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, model: Path) -> None:
    model_arguments = [] if "--model" in arguments else ["--model", model]
    assert message in error_line(invoke("generate", *model_arguments, *arguments))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        (b"one\rtwo", ["one", "two"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfone", ["one"]),
        ("\ufeffone\n\ufefftwo\n".encode(), ["one", "two"]),
        ("a red\u2028seven\u2029left\n".encode(), ["a red seven left"]),
        ("a\x0bred\x0cseven\x85left\x1c.\nb".encode(), ["a red seven left .", "b"]),
        ("one\r\ntwo\r\n".encode("utf-16"), ["one", "two"]),
        ("one\ntwo".encode("utf-16-be").join([b"\xfe\xff", b""]), ["one", "two"]),
        ("\u00e9t\u00e9\u3000\u6625".encode(), ["\u00e9t\u00e9\u3000\u6625"]),
    ],
)
def test_prompt_files_of_every_system(content: bytes, prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_prompts(path) == prompts


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b" \n\n", b"\xef\xbb\xbf", b"\xff\xfea"])
def test_bad_prompt_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    message = error_line(invoke("generate", "--prompt-file", path))
    assert "write one per line" in message or "is not UTF-8" in message


def test_truncated_weights(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[: len(content) // 2] if file.name == "transformer.safetensors" else content
        )
    message = error_line(invoke("generate", "--prompt", "x", "--model", tmp_path))
    assert "transformer.safetensors" in message


def test_wrong_types_and_unknown_options_name_the_option() -> None:
    for arguments in (["--num-steps", "two"], ["--num-stepz", "2"]):
        result = invoke("generate", "--prompt", "x", *arguments)
        assert result.returncode == 2
        assert "--num-steps" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_output_place_is_checked_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "x-prompt1.mp4").mkdir()
    arguments = ["--model", "no-such-model", "--prompt", "a", "b", "--out", tmp_path / "x.mp4"]
    assert "it is a folder" in error_line(invoke("generate", *arguments))
    arguments[-1] = tmp_path / "new" / "x.mp4"
    assert "there is no model" in error_line(invoke("generate", *arguments))
    assert not (tmp_path / "new").exists()


def listed(model: Path, out: Path, *more: str | Path) -> Result:
    prompts = [PROMPT, "a blue one", "a green two moving up"]
    return invoke(
        "generate", "--model", model, "--prompt", *prompts, "--seeds", "1", "2", "--out", out, *more
    )


def test_a_list_goes_on_where_it_was_interrupted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole" / "x.png", tmp_path / "cut" / "x.png"
    assert listed(model, whole).returncode == 0
    write, written = apt.media.write_media, []

    def interrupted(path: Path, *arguments: Any, **options: Any) -> Path:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(apt.media, "write_media", interrupted)
        result = listed(model, out)
    assert result.returncode == 130
    assert result.stderr == "3 of 6 files are finished; --resume generates the rest\ninterrupted\n"
    assert {path.name for path in out.parent.iterdir()} == {*written, "x.png.jsonl"}
    # One is damaged since, and one is there that the record does not know.
    (out.parent / written[1]).write_bytes(b"half a pic")
    (out.parent / "x-prompt2-seed2.png").write_bytes(b"something else")
    result = listed(model, out, "--resume")
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert first == "2 of 6 files exist already"
    assert [line.split("  ")[0] for line in lines] == [
        str(out.parent / name)
        for name in (
            written[1],
            "x-prompt1-seed2.png",
            "x-prompt2-seed1.png",
            "x-prompt2-seed2.png",
        )
    ]
    for path in whole.parent.glob("*.png"):
        assert (out.parent / path.name).read_bytes() == path.read_bytes()
    # Nothing is left to do, and nothing is loaded for it.
    assert listed(model, out, "--resume").stdout == "6 of 6 files exist already\n"
    assert "num_steps was None and is now 2" in error_line(
        listed(model, out, "--resume", "--num-steps", "2")
    )


def test_a_model_after_further_training_is_another_model(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    out = tmp_path / "x.png"
    assert listed(copy, out).returncode == 0
    info = (copy / "apt.json").read_text()
    (copy / "apt.json").write_text(info.replace('"fps": 8', '"fps": 9'))
    assert "model_content was" in error_line(listed(copy, out, "--resume"))
    (copy / "apt.json").write_text(info)
    assert listed(copy, out, "--resume").returncode == 0
    bundle = load_bundle(copy)
    next(bundle.backbone.parameters()).data += 1
    save_bundle(copy, bundle)
    assert (copy / "apt.json").read_text() == info
    assert "model_content was" in error_line(listed(copy, out, "--resume"))


def test_one_file_needs_no_record(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    for _ in range(2):
        result = invoke("generate", "--model", model, "--prompt", PROMPT, "--resume", "--out", out)
        assert result.stdout == f"{out}  {PROMPT!r}, seed 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_no_black_file_from_a_lora_beyond_the_type(model: Path, tmp_path: Path) -> None:
    name = "transformer.blocks.0.streams.0.mlp_out"
    backbone = load_bundle(model).backbone
    assert isinstance(backbone, torch.nn.Module)
    out_, in_ = backbone.get_parameter("blocks.0.streams.0.mlp_out.weight").shape
    pair = {
        f"{name}.lora_A.weight": torch.full((2, in_), 1e4),
        f"{name}.lora_B.weight": torch.full((out_, 2), 1e4),
    }
    lora, out = tmp_path / "lora.safetensors", tmp_path / "x.png"
    save_file(pair, lora)
    arguments = ["--model", model, "--prompt", PROMPT, "--lora", lora, "--out", out]
    message = error_line(invoke("generate", *arguments, "--dtype", "float16"))
    assert "NaN or infinite in float16" in message
    assert not out.exists()


@pytest.mark.slow
def test_a_signal_leaves_whole_files_and_a_clear_exit(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red one\n" * 2000)
    out = tmp_path / "out" / "x.png"
    command = [sys.executable, "-m", "apt", "generate", "--model", model, "--prompt-file", prompts]
    process = subprocess.Popen(
        [*command, "--out", out], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (out.parent / "x-prompt3.png").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("interrupted\n") and "--resume generates the rest" in stderr
    for path in out.parent.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    assert not list(out.parent.glob(".*"))

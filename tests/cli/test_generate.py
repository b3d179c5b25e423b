"""`diffusion-apt generate` with a small untrained model in a folder."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from apt.cli.generate import output_paths
from apt.hub import ModelInfo, SampleInfo
from apt.models import create_codec, create_model, create_text_encoder
from apt.models.bundle import ModelBundle, component_info, save_pretrained
from apt.rng import generator_for
from tests.cli.shell import error_line, invoke, run_cli

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
    return save_pretrained(folder, ModelBundle(backbone, encoder, codec, info))


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_one_video(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.mp4"
    result = run_cli("generate", "--model", model, "--prompt", PROMPT, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}  {PROMPT!r}, seed 0\n"
    assert num_frames(out) == 5


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
    result = run_cli(
        "generate", *arguments, "--out", tmp_path / "x.gif", "--contact-sheet", sheet,
        "--num-steps", "2", "--frames", "1", "--height", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = {f"x-prompt{p}-seed{s}.gif" for p in (0, 1) for s in (3, 4)}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "sheet.png", "prompts.txt"}
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
        (["--prompt", ""], "a prompt must be text that is not empty"),
        (["--prompt", "a \udcff"], "has bytes that are not UTF-8"),
        (["--prompt-file", "missing.txt"], "cannot read prompts from 'missing.txt'"),
        (["--prompt", "x", "--out", "x.avi"], "its ending must be .mp4 or"),
        (["--prompt", "x", "--contact-sheet", "x.mp4"], "its ending must be .png"),
        (["--prompt", "x", "--seeds", "1", "1"], "seeds must differ"),
        (["--prompt", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["--prompt", "x", "--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--prompt", "x", "--frames", "6"], "frames = 6 does not fit this model; use 5 or 9"),
        (["--prompt", "x", "--height", "17"], "height = 17 does not fit this model"),
        (["--prompt", "x", "--num-steps", "0"], "num_steps must be a whole number of at least 1"),
        (["--prompt", "x", "--timesteps", "0", "1"], "timesteps must fall strictly from 1"),
        (["--prompt", "x", "--model", "no-such-model"], "there is no model 'no-such-model'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, model: Path) -> None:
    model_arguments = [] if "--model" in arguments else ["--model", model]
    assert message in error_line(invoke("generate", *model_arguments, *arguments))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b" \n\n"])
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

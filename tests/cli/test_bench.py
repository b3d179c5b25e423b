"""`diffusion-apt bench`: estimates without a GPU, and times of this machine."""

from __future__ import annotations

import pytest

from tests.cli.shell import error_line, invoke


def test_the_floor_of_the_papers_model():
    result = invoke("bench", "dit", "--floor", "--gpu", "h200")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "46,800 tokens and 256 of text, 1363 TFLOP" in text
    assert "the model was not run" in text
    floor = next(line for line in text.splitlines() if line.startswith("| floor"))
    assert floor.split("|")[-2].strip() == "1726"  # 1,363 TFLOP at 790 TFLOP/s
    for figure in ("2.65 s on 1", "0.73 s on 4", "0.50 s on 8", "Real time: 2.04 s"):
        assert figure in text


def test_an_image_has_no_real_time_and_no_papers_figure():
    options = ("--frames", "1", "--height", "1024", "--width", "1024")
    text = invoke("bench", "dit", "--floor", "--gpu", "b200", *options).stdout
    assert "1 frame of 1024x1024" in text
    assert "4,096 tokens" in text
    assert "Real time" not in text
    assert "Table 8" not in text
    assert "attention by" not in text  # published rates are of another chip


def test_the_floor_of_a_public_model_is_at_its_own_sizes():
    options = ("--frames", "81", "--height", "480", "--width", "832")
    text = invoke(
        "bench", "dit", "--model", "wan2.1_t2v_1.3b", "--floor", "--gpu", "h100", *options
    ).stdout
    assert "32,760 tokens and 512 of text, 283 TFLOP" in text
    assert "Real time: 5.06 s at 16 frames per second" in text
    assert "Table 8" not in text


def test_attention_is_slower_with_narrow_heads():
    """At published rates; a vendor's peak is labelled as a peak."""
    large = invoke("bench", "dit", "--model", "sd3.5_large", "--floor", "--gpu", "h100").stdout
    assert "16k tokens, head dimension 64" in large
    fastest = next(line for line in large.splitlines() if line.startswith("| flash-attn 3"))
    assert [cell.strip() for cell in fastest.split("|")[2:5]] == ["497", "51.88", "47.77"]
    wan = invoke("bench", "dit", "--model", "wan2.1_t2v_1.3b", "--floor", "--gpu", "h200").stdout
    assert "head dimension 128" in wan
    assert "No kernel reaches the peak" not in wan  # its rates were measured
    other = invoke("bench", "dit", "--model", "sd3.5_large", "--floor", "--gpu", "a100").stdout
    assert "on an H200, large products reach 80% and copies 90% of it" in other
    assert "measured rates (h100, h200)" in other


DIGITS = (
    "bench", "dit", "--model", "mmdit_digits", "--frames", "9", "--height", "32", "--width", "32",
    "--compression", "4", "8", "8", "--dtype", "float32", "--device", "cpu", "--rounds", "3",
)  # fmt: skip


def test_a_forward_pass_here():
    result = invoke(*DIGITS, "--no-compile")
    assert result.returncode == 0, result.stderr
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("| mmdit_digits")]
    assert [cell.strip() for cell in row.split("|")[2:7]] == [
        "9x32x32", "reference", "native", "eager", "48",
    ]  # fmt: skip
    assert "measured copy" in result.stdout


def test_the_size_of_the_digits_is_its_models():
    result = invoke("bench", "dit", "--model", "mmdit_digits", "--floor", "--gpu", "h100")
    assert result.returncode == 0, result.stderr
    assert "9 frames of 32x32, batch 1, bfloat16: 48 tokens and 32 of text" in result.stdout
    assert "attention by" not in result.stdout  # what is published is about thousands of tokens


def test_kernels_here():
    result = invoke(
        "bench", "kernels", "--op", "modulated_norm", "--shape", "digits", "--variant", "eager",
        "triton", "--rounds", "3", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| modulated_norm")]
    assert [row.split("|")[4].strip() for row in rows] == ["forward", "backward"]
    assert "skipped (2): needs a CUDA GPU" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("dit", "--floor"), "--floor and --gpu must be used together"),
        (("dit", "--gpu", "h100"), "--floor and --gpu must be used together"),
        (("dit", "--floor", "--gpu", "h100", "--dtype", "float32"), "use --dtype bfloat16"),
        (("dit", "--floor", "--gpu", "h1000"), "unknown GPU 'h1000'; choose from: a100, h100"),
        (
            ("dit", "--floor", "--gpu", "h100", "--frames", "48"),
            "48 frames do not fit a compression of 4",
        ),
        (("dit", "--floor", "--gpu", "h100", "--height", "728"), "not a multiple of the patch, 2"),
        (("dit", "--model", "sd3.5_large", "--frames", "5"), "Stable Diffusion 3 makes images"),
        (
            ("dit", "--model", "wan2.1_t2v_1.3b", "--text-tokens", "600"),
            "accepts at most 512 text tokens, got 600",
        ),
        (("dit", "--floor", "--gpu", "h100", "--model", "apt_9b"), "apt_9b"),
        (("dit", "--model", "apt_9b"), "apt_9b"),
        (("dit", "--rounds", "2"), "at least 3 rounds, got 2"),
        (("dit", "--floor", "--gpu", "h100", "--text-tokens", "0"), "got 1, 0 and (4, 8, 8)"),
        (("kernels", "--rounds", "2"), "at least 3 rounds, got 2"),
        (("kernels", "--op", "softmax"), "unknown op 'softmax'; choose from: modulated_norm"),
        (("kernels", "--shape", "8k"), "unknown shape '8k'; choose from: digits"),
        (("kernels", "--variant", "cuda"), "unknown variant 'cuda'; choose from: triton"),
    ],
)
def test_mistakes(args, message):
    assert message in error_line(invoke("bench", *args))

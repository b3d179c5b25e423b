"""Timing a forward pass: sizes, variants, and no time for a variant with another result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from apt.bench.ceilings import Ceilings
from apt.bench.dit import (
    PreparedVariant,
    RandomNetwork,
    Variant,
    Workload,
    default_variants,
    figures,
    fill_zeros,
    measure_dit,
    usual_workload,
)
from apt.bench.machine import describe_machine
from apt.bench.tables import real_time
from apt.bench.timing import HostClock
from apt.errors import InputError
from apt.models import MODELS, TEXT_ENCODERS
from apt.models.sd3 import SD3Config
from apt.models.wan import WanConfig

CPU = torch.device("cpu")
DIGITS = Workload(
    model="mmdit_digits",
    frames=9,
    height=32,
    width=32,
    text_tokens=8,
    compression=(4, 8, 8),
    dtype="float32",
)
EAGER = Variant(kernels="reference")
CEILINGS = Ceilings(copy_gb_s=10.0, matmul_tflops=0.1)


def measure(*variants: Variant, workload: Workload = DIGITS, split: bool = False):
    return measure_dit(
        workload, variants, device=CPU, clock=HostClock(), ceilings=CEILINGS, rounds=3, split=split
    )


@pytest.mark.parametrize(
    ("frames", "height", "width", "tokens"),
    [(49, 720, 1280, 46_800), (49, 480, 832, 20_280), (1, 1024, 1024, 4096)],
)
def test_tokens_of_the_papers_sizes(frames, height, width, tokens):
    workload = usual_workload("apt_8b", frames=frames, height=height, width=width)
    t, h, w = workload.latent_shape()
    assert t * (h // 2) * (w // 2) == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 48}, "48 frames do not fit a compression of 4"),
        ({"height": 721}, "721x1280 is not a multiple of the compression, 8x8"),
        ({"width": 0}, "720x0"),
        ({"batch": 0}, "at least 1, got 0, 256 and"),
        ({"model": "apt_9b"}, "unknown model 'apt_9b'"),
        ({"dtype": "int8"}, "'int8' is not one of: bfloat16"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        usual_workload(**{"model": "apt_8b"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "wan2.2_ti2v_5b", "height": 712}, "712x1280 is not a multiple .*, 16x16"),
        ({"model": "wan2.1_t2v_14b", "height": 728}, "latent height 91 is not a multiple of the"),
        ({"model": "wan2.1_t2v_14b", "text_tokens": 513}, "at most 512 text tokens, got 513"),
        ({"model": "sd3.5_large", "frames": 5}, "makes images: .*got 5 frames"),
        ({"model": "sd3.5_large", "width": 4096}, "at most 192 along each, 384 latents"),
    ],
)
def test_what_a_public_model_cannot_take(change, message):
    with pytest.raises(InputError, match=message):
        usual_workload(**change)


@pytest.mark.parametrize(
    ("model", "size", "latents", "text", "fps"),
    [
        ("wan2.1_t2v_1.3b", "81x480x832", (21, 60, 104), 512, 16),
        ("wan2.2_t2v_a14b", "81x720x1280", (21, 90, 160), 512, 16),
        ("wan2.2_ti2v_5b", "121x704x1280", (31, 44, 80), 512, 24),  # a VAE of 16x16 pixels
        ("sd3.5_medium", "1x1024x1024", (1, 128, 128), 333, 1),
        ("apt_8b", "49x720x1280", (13, 90, 160), 256, 24),
        ("mmdit_digits", "9x32x32", (3, 4, 4), 32, 8),
    ],
)
def test_what_a_model_is_usually_given(model, size, latents, text, fps):
    workload = usual_workload(model)
    assert (workload.size, workload.latent_shape()) == (size, latents)
    assert (workload.text_tokens, workload.fps) == (text, fps)


def test_lengths_of_text_are_those_of_the_text_encoders():
    for name in MODELS.names():
        for published in MODELS.pretrained(name).values():
            encoder = TEXT_ENCODERS.get(published.text_encoder)()
            clip = 77 if published.text_encoder == "sd3" else 0  # before T5's tokens
            assert published.text_tokens == encoder.max_length + clip
            config = MODELS.get(name)()
            assert getattr(config, "text_length", published.text_tokens) == published.text_tokens


def test_gates_are_not_left_at_zero():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(module[0].weight)
    before = module[1].weight.clone()
    fill_zeros(module)
    assert module[0].weight.all()
    assert torch.equal(module[1].weight, before)


def test_weights_are_made_in_their_own_type():
    network = RandomNetwork(replace(DIGITS, dtype="bfloat16"), CPU)
    assert {p.dtype for p in network.backbone.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert network().isfinite().all()


TINY_WAN = WanConfig(
    in_channels=4, hidden_size=24, depth=2, num_heads=2, mlp_size=20, text_dim=10, text_length=9,
    time_dim=16,
)  # fmt: skip
TINY_SD3 = SD3Config(
    in_channels=4, depth=3, num_heads=2, head_dim=8, text_dim=20, pooled_dim=6, max_positions=8,
    dual_attention_layers=(0,),
)  # fmt: skip


@pytest.fixture(params=["wan_tiny", "sd3_tiny"])
def public(request, monkeypatch) -> Workload:
    """A family of public checkpoints, at a size that a test can run."""
    config, frames, compression = {
        "wan_tiny": (TINY_WAN, 5, (4, 8, 8)),
        "sd3_tiny": (TINY_SD3, 1, (1, 8, 8)),
    }[request.param]
    monkeypatch.setitem(MODELS._builders, request.param, lambda: config)
    monkeypatch.setitem(MODELS._pretrained, request.param, {})
    return Workload(
        model=request.param,
        frames=frames,
        height=32,
        width=48,
        text_tokens=7,
        compression=compression,
        dtype="float32",
        fps=16,
    )


def test_public_families_are_measured(public):
    variants = EAGER, Variant(kernels="reference", attention="_native_math")
    for found in measure(*variants, workload=public, split=True):
        assert found.status == "measured", found.reason
        assert found.metrics["tokens"] == (12 if public.frames == 5 else 6)
        assert found.metrics["difference"] < 1e-5
        assert min(found.metrics[f"{part}_ms"] for part in ("attention", "linear")) > 0
        clip = 5 / 16 if public.frames == 5 else None
        expected = "" if clip is None else f"{found.median_ms / 1e3 / clip:.2f}"
        assert real_time(found) == expected


@pytest.mark.parametrize("public", ["wan_tiny"], indirect=True)
def test_what_a_model_keeps_in_fp32_is_fp32(public):
    network = RandomNetwork(replace(public, dtype="bfloat16"), CPU)
    cast = TINY_WAN.build().to(torch.bfloat16)
    types = {name: p.dtype for name, p in cast.named_parameters()}
    assert set(types.values()) == {torch.bfloat16, torch.float32}
    assert {name: p.dtype for name, p in network.backbone.named_parameters()} == types
    assert network().isfinite().all()


@pytest.mark.slow
def test_compiled_blocks_of_public_families_agree(public):
    eager, compiled = measure(*default_variants(CPU), workload=public)
    assert eager.status == compiled.status == "measured", compiled.reason
    assert compiled.metrics["difference"] < 1e-5


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    small = replace(describe_machine(CPU), memory_gb=8)
    monkeypatch.setattr("apt.bench.dit.describe_machine", lambda device: small)
    workload = usual_workload("apt_8b", frames=1, height=64, width=64)
    with pytest.raises(
        InputError, match=r"apt_8b take 15 GB in bfloat16, but cpu has 8 GB; .*--floor"
    ):
        RandomNetwork(workload, CPU)


def test_the_output_depends_on_the_blocks():
    network = RandomNetwork(DIGITS, CPU)
    before = network()
    block = network.backbone.block_list()[2]
    for parameter in block.parameters():
        parameter.mul_(2)
    assert not torch.allclose(network(), before, rtol=1e-3)


def test_a_measurement():
    (found,) = measure(EAGER, split=True)
    assert found.status == "measured"
    assert len(found.samples_ms) == 3
    assert found.case["size"] == "9x32x32"
    figures = found.metrics
    assert figures["tokens"] == 48
    assert figures["tflop"] > 0
    assert figures["share_of_floor"] > 0
    assert "share_of_sustained_floor" not in figures  # these ceilings have none
    assert found.facts == {"attention_kernel": "torch's flash (by selection)"}
    assert figures["tflops"] == pytest.approx(figures["tflop"] / found.median_ms * 1e3)
    for name in ("attention_ms", "linear_ms", "elementwise_ms"):
        assert figures[name] > 0


def test_what_cannot_run_is_skipped_with_the_reason():
    graph, cudnn, eager = measure(Variant(mode="graph"), Variant(attention="_native_cudnn"), EAGER)
    assert (graph.status, graph.reason) == ("skipped", "CUDA graphs need a CUDA GPU")
    assert cudnn.status == "skipped"
    assert "needs a CUDA GPU" in cudnn.reason
    assert eager.status == "measured"


def test_a_variant_that_computes_something_else_has_no_time(monkeypatch):
    honest = PreparedVariant.output

    def planted(self: PreparedVariant) -> Tensor:
        output = honest(self)
        return output * 1.1 if self.variant.attention == "_native_math" else output

    monkeypatch.setattr(PreparedVariant, "output", planted)
    right, wrong = measure(EAGER, Variant(kernels="reference", attention="_native_math"))
    assert right.status == "measured"
    assert (wrong.status, wrong.samples_ms) == ("wrong", ())
    assert wrong.reason == "differs by 0.1, allowed 0.001"


def test_one_place_of_a_frame_that_is_wrong_has_no_time(monkeypatch):
    honest = PreparedVariant.output

    def planted(self: PreparedVariant) -> Tensor:
        output = honest(self)
        if self.variant.attention == "_native_math":
            output = output.clone()
            output[:, :, 0, -1, -1] *= 1.0055
        return output

    monkeypatch.setattr(PreparedVariant, "output", planted)
    _, wrong = measure(EAGER, Variant(kernels="reference", attention="_native_math"))
    assert wrong.reason == "differs by 0.0055 in a row, allowed 0.004"


def test_an_output_that_nobody_writes_has_no_time(monkeypatch):
    honest = RandomNetwork.__call__

    def planted(self: RandomNetwork) -> Tensor:
        velocity = honest(self)
        out = torch.empty_like(velocity)
        out[:, :, 1:] = velocity[:, :, 1:]
        return out

    monkeypatch.setattr(RandomNetwork, "__call__", planted)
    (found,) = measure(EAGER)
    assert (found.status, found.reason) == ("wrong", "the output is not finite")


def test_an_output_that_is_not_finite_has_no_time(monkeypatch):
    monkeypatch.setattr(PreparedVariant, "output", lambda self: torch.full((2,), float("nan")))
    (found,) = measure(EAGER)
    assert (found.status, found.reason) == ("wrong", "the output is not finite")


def test_a_crash_leaves_the_others_their_times(monkeypatch):
    honest = RandomNetwork.__call__
    calls = []

    def planted(self: RandomNetwork) -> Tensor:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return honest(self)

    monkeypatch.setattr(RandomNetwork, "__call__", planted)
    crashed, right = measure(EAGER, Variant(attention="_native_math"))
    assert (crashed.status, crashed.reason) == ("wrong", "raised RuntimeError: out of memory")
    assert right.status == "measured"


def test_attention_backends_agree():
    right, other = measure(EAGER, Variant(kernels="reference", attention="_native_math"))
    assert right.metrics["difference"] == 0
    assert other.status == "measured"
    assert 0 < other.metrics["difference"] <= other.metrics["row_difference"] < 1e-5
    assert other.facts == {"attention_kernel": "torch's plain softmax (by selection)"}


@pytest.mark.slow
def test_compiled_blocks_agree_and_leave_the_other_variants_eager():
    eager, compiled = measure(*default_variants(CPU))
    assert eager.status == compiled.status == "measured"
    assert compiled.metrics["difference"] < 1e-5


def test_what_a_user_gets_is_measured_on_a_gpu_with_the_kernel_by_name():
    assert Variant(kernels="auto", attention="native", mode="graph") in default_variants(
        torch.device("cuda")
    )


def test_work_that_lasts_has_a_floor_of_its_own():
    cost = DIGITS.cost()
    found = figures(cost, 2.0, replace(CEILINGS, sustained_tflops=0.05))
    assert found["share_of_sustained_floor"] == pytest.approx(2 * found["share_of_floor"], rel=0.2)

"""Time one forward pass of a diffusion transformer with random weights: a one-step model's step."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apt.bench.accuracy import Deviation, deviation
from apt.bench.ceilings import Ceilings
from apt.bench.clocks import GpuWatch
from apt.bench.facts import attention_facts
from apt.bench.machine import describe_machine
from apt.bench.poison import poisoned_memory
from apt.bench.records import Measurement, first_line
from apt.bench.split import Split, profile_split
from apt.bench.tables import FRAMES_PER_SECOND
from apt.bench.timing import Clock, Timing, Work, median, time_interleaved
from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.kernels import attention_backend, kernel_backend, watch_attention
from apt.kernels.roofline import Rates
from apt.models import MODELS, create_model
from apt.models.costs import DiTCost, dit_cost
from apt.models.transformer import DiffusionTransformer

Mode = Literal["graph", "eager", "compile"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# A bf16 rounding error is 0.002 of a value. The roundings of 36 blocks in another order stay well
# below this limit, and a wrong kernel is far above it.
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rounding errors spread evenly over a velocity: of 200,000 places with 16 channels each, the worst
# has about twice the error of the whole. A wrong place has an error as large as its values.
ROW_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Model and sizes of a forward pass. `usual_workload` returns those a model is meant for.

    Attributes:
        model: name of a registered backbone.
        options: fields of its config that differ from the registered ones.
        frames, height, width: size of the video in pixels; 1 frame is an image.
        text_tokens: length of the encoded prompt; the paper does not give one.
        compression: pixels per latent along time (after the first frame), height and width.
        batch: number of videos.
        dtype: dtype of weights and activations.
        fps: frames per second of the video, to compare the time with real time.

    Raises:
        InputError: for a value out of range, sizes or text that the model cannot take, and a model
            that does not exist or whose cost is not known.
    """

    model: str
    frames: int
    height: int
    width: int
    text_tokens: int
    compression: tuple[int, int, int]
    batch: int = 1
    dtype: str = "bfloat16"
    fps: float = FRAMES_PER_SECOND
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}")
        if min(self.batch, self.text_tokens, *self.compression) < 1:
            raise InputError(
                "batch, text_tokens and compression must be at least 1, got "
                f"{self.batch}, {self.text_tokens} and {self.compression}"
            )
        self.cost()

    @property
    def name(self) -> str:
        """The model, and what is other in it, as tables and records have it."""
        others = ", ".join(f"{name} {value}" for name, value in sorted(self.options.items()))
        return f"{self.model} ({others})" if others else self.model

    @property
    def size(self) -> str:
        """FRAMESxHEIGHTxWIDTH."""
        return f"{self.frames}x{self.height}x{self.width}"

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (T, H, W). Raises InputError if the compression does not divide the sizes."""
        t, h, w = self.compression
        if self.frames < 1 or (self.frames - 1) % t:
            raise InputError(
                f"{self.frames} frames do not fit a compression of {t}; take 1 more than a "
                f"multiple of {t}"
            )
        if self.height < h or self.height % h or self.width < w or self.width % w:
            raise InputError(
                f"{self.height}x{self.width} is not a multiple of the compression, {h}x{w}"
            )
        return (self.frames - 1) // t + 1, self.height // h, self.width // w

    def config(self) -> Any:
        """Return the model's config. Raises InputError for a model that does not exist."""
        return MODELS.configured(self.model, self.options)

    def cost(self) -> DiTCost:
        """Return the cost of one forward pass. Raises InputError as `dit_cost` does."""
        return dit_cost(
            self.config(),
            self.batch,
            self.latent_shape(),
            text_tokens=self.text_tokens,
            dtype=DTYPES[self.dtype],
        )


# What the digits model generates: one clip of 9 frames of 32x32, in pixel patches
DIGITS = Workload(
    model="mmdit_digits",
    frames=9,
    height=32,
    width=32,
    text_tokens=32,
    compression=(4, 8, 8),
    fps=8,
    dtype="float32",
)


PAPER_SAMPLE = {
    "frames": 49,
    "height": 720,
    "width": 1280,
    "text_tokens": 256,
    "compression": (4, 8, 8),
}


def usual_workload(model: str, **changes: Any) -> Workload:
    """Return the workload that a model is meant for.

    A model with published weights gets their best size, VAE and text length; the digits model a
    clip of digits; any other model the paper's 49 frames of 1280x720. All but digits are in bf16.

    Args:
        model: name of a registered backbone.
        changes: fields of `Workload` to replace.

    Raises:
        InputError: as `Workload`.
    """
    if model == DIGITS.model:
        return replace(DIGITS, **changes)
    published = next(iter(MODELS.pretrained(model).values()), None)
    if published is None:
        usual = PAPER_SAMPLE
    else:
        usual = asdict(published.sample) | {
            "text_tokens": published.text_tokens,
            "compression": published.compression,
        }
    return Workload(**{"model": model, **usual, **changes})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to run a forward pass.

    Attributes:
        kernels: "auto" (the default for users), or a name of `apt.kernels.kernel_backend`.
        attention: a name of `apt.kernels.attention_status`.
        mode: "graph" replays a CUDA graph, "eager" runs op by op, "compile" runs torch.compile on
            each block, in a CUDA graph on a GPU.
    """

    kernels: str = "auto"
    attention: str = "native"
    mode: Mode = "eager"

    @property
    def label(self) -> str:
        return f"{self.kernels}/{self.attention}/{self.mode}"


def default_variants(device: torch.device) -> list[Variant]:
    """Return the variants worth comparing on a device; the others are checked against the first."""
    if device.type == "cpu":
        return [Variant(kernels="reference"), Variant(kernels="reference", mode="compile")]
    return [
        Variant(kernels="reference", attention="_native_flash", mode="graph"),
        Variant(kernels="triton", attention="_native_cudnn", mode="graph"),
        Variant(attention="native", mode="graph"),  # the default for users
        Variant(kernels="reference", attention="_native_cudnn", mode="graph"),
        Variant(kernels="reference", attention="_native_cudnn", mode="compile"),
        Variant(kernels="triton", attention="_native_cudnn", mode="compile"),
        Variant(kernels="triton", attention="_flash_3", mode="graph"),
    ]


class RandomNetwork:
    """A backbone with random weights, and random inputs that fit it."""

    def __init__(self, workload: Workload, device: torch.device, *, seed: int = 0) -> None:
        """Build network and inputs. Raises InputError if the weights do not fit into memory."""
        self.workload, self.device, self.dtype = workload, device, DTYPES[workload.dtype]
        self.cost = workload.cost()
        check_memory(workload, device)
        torch.manual_seed(seed)
        self.backbone = build(workload, device)
        fill_zeros(self.backbone.eval().requires_grad_(False))
        self.inputs = self._draw_inputs(torch.Generator(device).manual_seed(seed))

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.backbone(*self.inputs)

    def _draw_inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Condition]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        w, config = self.workload, self.workload.config()
        x = normal(w.batch, self.backbone.in_channels, *w.latent_shape())
        pooled_dim = getattr(config, "pooled_dim", 0)  # not every family has a pooled vector
        pooled = normal(w.batch, pooled_dim) if pooled_dim else None
        text = EncodedText(normal(w.batch, w.text_tokens, config.text_dim), None, pooled)
        return x, torch.ones(w.batch, device=self.device), Condition(text)


def build(workload: Workload, device: torch.device) -> DiffusionTransformer:
    """Return the model, with weights created on the device and in the workload's dtype.

    Creating 8 B parameters in fp32 first would need twice the memory. Tensors that the model keeps
    in fp32 when it is cast are fp32 here, too.
    """
    with created_in(device, DTYPES[workload.dtype]):
        backbone = create_model(workload.model, **workload.options)
    kept = {name: tensor.dtype for name, tensor in _tensors(cast_on_meta(workload))}
    for name, tensor in _tensors(backbone):
        tensor.data = tensor.data.to(kept[name])
    return backbone


@contextmanager
def created_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create weights in the block on this device and in this dtype, never in fp32 on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def cast_on_meta(workload: Workload) -> nn.Module:
    """Return the model without storage, cast as a user's model would be."""
    dtype = DTYPES[workload.dtype]
    with torch.device("meta"):
        return create_model(workload.model, dtype=dtype, device="meta", **workload.options)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def check_memory(workload: Workload, device: torch.device) -> None:
    """Raise InputError unless the weights fit into the memory of a device."""
    module = cast_on_meta(workload)
    needed = sum(p.numel() * p.element_size() for p in module.parameters())
    there = describe_machine(device).memory_gb * 2**30
    if needed > there:
        raise InputError(
            f"the weights of {workload.name} take {needed / 2**30:.0f} GB in {workload.dtype}, "
            f"but {device.type} has {there / 2**30:.0f} GB; use `bench dit --floor --gpu NAME` for "
            "an estimate"
        )


def fill_zeros(module: nn.Module) -> None:
    """Replace parameters that are all zero by small random values.

    Zero gates would hide wrong blocks, and products with zeros are faster than with real data.
    """
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


class PreparedVariant:
    """A network ready to run in one way: in a CUDA graph on a GPU, op by op on a CPU."""

    def __init__(self, network: RandomNetwork, variant: Variant, pool: Any = None) -> None:
        """Warm up, and capture.

        Args:
            network: the network, shared by all variants.
            variant: how to run it.
            pool: memory pool for the graph; graphs can share one if they never replay at the same
                time.

        Raises:
            InputError: if the variant cannot run here, with the reason.
        """
        self.network, self.variant = network, variant
        self.graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        on_gpu = network.device.type == "cuda"
        if variant.mode == "graph" and not on_gpu:
            raise InputError("CUDA graphs need a CUDA GPU")
        # First op by op in poisoned memory: a graph shares its memory with the graph before, whose
        # results are still in it
        poison = nullcontext() if variant.mode == "compile" else poisoned_memory()
        with self.backends(), watch_attention() as seen:
            with poison:
                self.first = network()
            self.attention_kernels = {use.kernel for use in seen}
            if on_gpu and variant.mode != "eager":
                self._capture(pool)

    def work(self) -> Work:
        """Return the work for `time_interleaved`."""
        if self.graph is not None:
            graph = self.graph
            return Work(lambda _: graph.replay())

        def run(entered: ExitStack) -> None:
            with entered:
                self.network()

        return Work(run, prepare=self.backends)

    def output(self) -> Tensor:
        """Return the velocity of one run."""
        if self.graph is not None and self._output is not None:
            self._output.fill_(float("nan"))
            self.graph.replay()
            return self._output.clone()
        with self.backends():
            return self.network()

    def split(self) -> Split:
        """Profile one run op by op."""
        with self.backends():
            return profile_split(self.network, self.network.device)

    def backends(self) -> ExitStack:
        """Enter the variant's backends; they apply until the returned stack is closed."""
        with ExitStack() as stack:
            if self.variant.kernels != "auto":
                stack.enter_context(kernel_backend(self.variant.kernels))
            stack.enter_context(attention_backend(self.variant.attention))
            if self.variant.mode != "compile":
                # The network's blocks may have been compiled for another variant
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return stack.pop_all()

    def _capture(self, pool: Any) -> None:
        stream = torch.cuda.Stream(self.network.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.network()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._output = self.network()


def measure_dit(
    workload: Workload,
    variants: Sequence[Variant],
    *,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    rounds: int,
    max_seconds: float | None = None,
    split: bool = True,
) -> list[Measurement]:
    """Measure every variant of one forward pass, all with the same network.

    Outputs must be finite, and agree with that of the first variant that runs to within
    `LARGEST_DIFFERENCE`; variants that do not are not timed.

    Args:
        workload: model and sizes.
        variants: ways to run it, for instance `default_variants`.
        device, clock: the device and its clock.
        ceilings: rates of this device, which determine the floor.
        rounds, max_seconds: as in `time_interleaved`.
        split: also profile where the time goes.

    Raises:
        InputError: for sizes that the model cannot take.
    """
    # In a function of its own, so that network and graphs are gone when their memory is released
    try:
        return _measure(
            workload,
            variants,
            device=device,
            clock=clock,
            ceilings=ceilings,
            rounds=rounds,
            max_seconds=max_seconds,
            split=split,
        )
    finally:
        _release(device)


def _measure(
    workload: Workload,
    variants: Sequence[Variant],
    *,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    rounds: int,
    max_seconds: float | None,
    split: bool,
) -> list[Measurement]:
    network = RandomNetwork(workload, device)
    if any(variant.mode == "compile" for variant in variants):
        # Block by block: all blocks are alike, so only one is compiled.
        for block in network.backbone.block_list():
            block.compile(fullgraph=True, dynamic=False)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    ready: dict[Variant, PreparedVariant] = {}
    failed: dict[Variant, tuple[Literal["wrong", "skipped"], str]] = {}
    differences: dict[Variant, Deviation] = {}
    expected: Tensor | None = None
    for variant in variants:
        try:
            prepared = PreparedVariant(network, variant, pool)
            outputs = [prepared.first.double(), prepared.output().double()]
        except InputError as error:
            failed[variant] = ("skipped", str(error))
            continue
        # An error of a compiler or driver in one variant must not cost the times of the others
        except Exception as error:
            failed[variant] = ("wrong", first_line(error))
            continue
        if not all(output.isfinite().all() for output in outputs):
            failed[variant] = ("wrong", "the output is not finite")
            continue
        expected = outputs[0] if expected is None else expected
        found = Deviation(
            *map(max, zip(*(_difference(output, expected) for output in outputs), strict=True))
        )
        too = found.exceeds(allowed_difference(network.dtype))
        if too:
            failed[variant] = ("wrong", f"differs by {too}")
        else:
            ready[variant], differences[variant] = prepared, found
    timings: dict[str, Timing] = {}
    if ready:
        works = {variant.label: prepared.work() for variant, prepared in ready.items()}
        with GpuWatch(device) as watch:
            timings = time_interleaved(
                works, clock, rounds=rounds, warmup=1, max_seconds=max_seconds
            )
        state = watch.state()
    measurements = []
    for variant in variants:
        case = case_of(workload, variant)
        if variant in failed:
            status, reason = failed[variant]
            measurements.append(Measurement(case=case, status=status, reason=reason))
            continue
        timing = timings[variant.label]
        metrics = figures(network.cost, median(timing.samples_ms), ceilings) | {
            "difference": differences[variant].whole,
            "row_difference": differences[variant].row,
            "fps": workload.fps,
        }
        metrics |= timing.metrics(device) | state.metrics()
        parts = ready[variant].split() if split else None
        if parts is not None:
            metrics |= {f"{name}_ms": value for name, value in parts.milliseconds().items()}
        facts = attention_facts(device, variant.attention, ready[variant].attention_kernels, parts)
        measurements.append(
            Measurement(case=case, samples_ms=timing.samples_ms, metrics=metrics, facts=facts)
        )
    return measurements


def _difference(output: Tensor, expected: Tensor) -> Deviation:
    """Compare velocities (B, C, T, H, W); a row is the channels at one place of one frame."""
    return deviation(output.movedim(1, -1), expected.movedim(1, -1))


def allowed_difference(dtype: torch.dtype) -> Deviation:
    """Return the largest allowed difference of a variant's velocity from the first variant's."""
    allowed = LARGEST_DIFFERENCE[dtype]
    return Deviation(allowed, ROW_FACTOR * allowed)


def figures(cost: DiTCost, milliseconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Return the figures that follow from a time: TFLOP/s, and the ratios of two floors to it.

    A floor is the time of matrix products and attention alone, at the rate of this machine's large
    matrix products; no implementation in this dtype is faster. "floor_ms" uses the rate of single
    products, at high clocks; the sustained floor uses the rate of products that go on for seconds.
    """
    rates = Rates(matmul_tflops=ceilings.matmul_tflops, memory_gb_s=ceilings.copy_gb_s)
    tflop, floor = cost.flops / 1e12, cost.floor(rates).matmul * 1e3
    sustained = {}
    if ceilings.sustained_tflops is not None:
        steady = replace(rates, matmul_tflops=ceilings.sustained_tflops)
        sustained["share_of_sustained_floor"] = cost.floor(steady).matmul * 1e3 / milliseconds
    return sustained | {
        "tokens": float(cost.visual_tokens),
        "tflop": tflop,
        "tflops": tflop / milliseconds * 1e3,
        "floor_ms": floor,
        "share_of_floor": floor / milliseconds,
    }


def _release(device: torch.device) -> None:
    """Free the memory of networks, graphs and compiled code for the next measurement."""
    torch.compiler.reset()
    gc.collect()  # compiled modules refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()


def case_of(workload: Workload, variant: Variant) -> dict[str, str | int]:
    """Return the case as records hold it."""
    return {
        "model": workload.name,
        "size": workload.size,
        "batch": workload.batch,
        "text_tokens": workload.text_tokens,
        "dtype": workload.dtype,
        "kernels": variant.kernels,
        "attention": variant.attention,
        "mode": variant.mode,
    }

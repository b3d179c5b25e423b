"""Adversarial post-training (APT Sec. 3): the objective as functions, then the training method.

    generate              Eqs. 3-5      one step from noise to a sample
    timestep_ensemble     Eqs. 6-7      D's timestep inputs
    discriminator_loss    Eqs. 1, 9, 10 D's loss, including the approximated R1
    generator_loss        Eq. 2         G's loss

x are real latents (B, C, T, H, W), z is noise of the same shape, c are B conditions, and t (B,) is
in [0, 1], where the paper uses [0, T]. The networks are callables, G(z, t, c) -> velocity and
D(x, t, c, rows=) -> logits, and c is whatever they accept. The exact R1 of Eq. 8, which the paper
replaces with Eq. 9, is in `apt.methods.terms`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from apt.checkpoints.info import ModelInfo, SamplingInfo
from apt.checkpoints.load import ModelBundle
from apt.checks import check_positive
from apt.condition import Condition
from apt.errors import ConfigError, InputError
from apt.flow import shift_timesteps, to_sample
from apt.kernels import (
    attention_backend,
    kernel_backend,
    perturbed_batch,
    sample_shifted_timesteps,
)
from apt.losses import (
    LOSSES,
    AdversarialObjective,
    ApproximateR1,
    NonSaturating,
    create_loss,
    list_losses,
)
from apt.methods.backward_apart import BackwardApart
from apt.methods.base import (
    Host,
    Method,
    MethodConfig,
    Metrics,
    MicroBatch,
    Part,
    Pass,
    even_timesteps,
    mean_logs,
)
from apt.methods.spread import Spread, compared
from apt.methods.terms import DiscriminatorTerm, FeatureMatching, Terms
from apt.models.discriminator import (
    Discriminator,
    LogitNetwork,
    discriminate_groups,
)
from apt.rng import Draw, sample_noise

Logs = dict[str, Tensor]

SURE_SIGMA = 0.1
"""The paper's sigma for videos, at which the approximated R1 measures slope even in bf16."""


def generate(network: Any, z: Tensor, c: Any) -> Tensor:
    """Return G(z, c), one sample per noise (Eqs. 3-5), with gradients to the network and z."""
    t = torch.ones(len(z), dtype=torch.float32, device=z.device)
    v = network(z, t, c)  # Eq. 3: the velocity at pure noise
    return to_sample(z, v, t)  # Eqs. 4-5: z - v


def timestep_ensemble(num: int, shift: float, draw: Draw) -> Tensor:
    """Draw D's timestep inputs (num,): t ~ U[0, 1] (Eq. 6), shifted by s (Eq. 7)."""
    return sample_shifted_timesteps(num, draw, shift=shift)


def discriminator_loss(
    discriminator: LogitNetwork,
    x: Tensor,
    x_fake: Tensor,
    t: Tensor,
    c: Any,
    draw: Draw,
    *,
    objective: AdversarialObjective = NonSaturating(),
    r1: ApproximateR1 = ApproximateR1(),
    terms: Sequence[DiscriminatorTerm] = (),
    forwards: int = 1,
) -> tuple[Tensor, Logs]:
    """Return D's loss (Eq. 10) and its parts, from one forward pass of D over all samples.

    Args:
        discriminator: takes clean latents; sample i of a group uses row i of t and c.
        x_fake: G's samples for the same c, detached.
        draw: the key of the perturbation noise.
        objective: the paper's is softplus(-D(x, c)) + softplus(D(G(z, c), c)).
        r1: lambda (D(x, c) - D(x + sigma epsilon, c))^2.
        terms: additional terms, which the paper does not have.
        forwards: 2 runs generated samples through D in a separate forward pass.
    """
    rows = torch.arange(len(x), device=x.device)
    num_perturbed = r1.num_perturbed(len(x)) if r1.weight else 0
    # A perturbed copy shares its sample's t and c; otherwise Eq. 9 would also penalise how D
    # depends on them.
    samples = [perturbed_batch(x, x_fake, r1.sigma, draw, num_perturbed=num_perturbed)]
    groups = {"real": rows, "perturbed": rows[:num_perturbed], "fake": rows}
    for term in terms:
        samples += term.samples
        groups |= term.groups
    apart = "fake" if forwards == 2 else None
    output = discriminate_groups(discriminator, torch.cat(samples), t, c, groups, apart=apart)
    logits = {name: group.logits for name, group in output.items()}

    loss = objective.discriminator(logits["real"], logits["fake"])  # Eq. 1
    penalties: Logs = {}
    if num_perturbed:
        penalties["approximate_r1"] = r1(logits["real"], logits["perturbed"])  # lambda x Eq. 9
    penalties |= {term.name: term(logits) for term in terms}
    total = loss + sum(penalties.values())  # Eq. 10
    return total, {
        "loss": loss,
        "logit_gap": logits["real"].mean() - logits["fake"].mean(),
        "logit_real": logits["real"].mean(),
        "logit_fake": logits["fake"].mean(),
        **penalties,
    }


def generator_loss(
    discriminator: LogitNetwork,
    x_fake: Tensor,
    t: Tensor,
    c: Any,
    *,
    x: Tensor | None = None,
    objective: AdversarialObjective = NonSaturating(),
    matching: FeatureMatching | None = None,
) -> tuple[Tensor, Logs]:
    """Return G's loss (Eq. 2; the paper's is softplus(-D(G(z, c)))) and its parts.

    D also sees x if the objective or feature matching compares generated samples with real ones.
    Raises InputError if x is then missing.
    """
    rows = torch.arange(len(x_fake), device=x_fake.device)
    groups = {"fake": rows}
    samples = x_fake
    if matching or objective.needs_real:
        if x is None:
            raise InputError("the objective or feature matching needs real samples; pass x")
        groups["real"] = rows
        samples = torch.cat([x_fake, x])
    output = discriminate_groups(discriminator, samples, t, c, groups)
    fake, real = output["fake"], output.get("real")

    loss = objective.generator(fake.logits, real.logits if real else None)  # Eq. 2
    if matching is None or real is None:
        return loss, {"loss": loss}
    distance = matching(fake.features, real.features)
    return loss + distance, {"loss": loss, "feature_matching": distance}


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(MethodConfig):
    """Adversarial post-training (APT Secs. 3.3-3.5). A weight of 0 turns a term off.

    Attributes:
        generator: the distilled model that initialises G: a built-in name, a folder or a Hub id.
        discriminator: the diffusion model that initialises D's backbone.
        generator_trains: "all" trains all of G, as in the paper; "blocks" trains only its
            transformer blocks. A small D sees little of the finest detail, and its gradients can
            turn the output layers' weights into grain.
        head: registered discriminator head.
        layers: blocks that the heads read, counted from 1; empty scales the paper's choice to the
            depth.
        discriminator_learning_rate: D's learning rate; 0 uses the optimizer's, as the paper does.
            With small batches D needs a higher rate than G (Heusel et al. 2017).
        discriminator_backbone_rate: learning rate of D's backbone, as a fraction of D's.
        freeze_discriminator_backbone: train only D's heads (worse, APT App. F).
        generator_captions: "shared" trains G on the captions and sizes of the clips that D was just
            trained on, which are read and encoded once; "own" uses those of the next batch, so an
            update takes twice as many clips. The paper does not say which it did.
        discriminator_forwards: 2 runs generated samples through D in forward and backward passes of
            their own: the same logits and, with activation checkpointing, less peak memory, but a
            sharded D is gathered, and its gradients are reduced, twice.
        discriminator_precision: "run" computes D in the precision of the run; "tf32" and "fp32"
            compute it without autocast, with matrix products in TF32 or fp32. In bf16, the
            approximated R1 with a small sigma is mostly rounding error (docs/training.md).
        rounding_every: updates between measurements of how much of the approximated R1 is rounding
            error, each with one more forward pass of D on a micro-batch; 0 for none.
        timestep_ensemble: give D a random timestep for each sample (Eq. 6); otherwise t = 0, the
            timestep of clean input.
        timestep_shift: s of Eq. 7 for D's timestep input; 1 for images, 12 for videos.
        objective: registered adversarial objective.
        r1: the approximated R1 (Eq. 9); its weight is lambda.
        terms: additional terms, which the paper does not have; their weights default to 0.
    """

    exports_as: ClassVar[str] = "apt"
    summary: ClassVar[str] = (
        "a one-step generator made by Adversarial Post-Training (arXiv 2501.08316)"
    )
    starts_from: ClassVar[str | None] = "generator"
    names_models: ClassVar[tuple[str, ...]] = ("generator", "discriminator")

    generator: str = ""
    discriminator: str = ""
    generator_trains: Literal["all", "blocks"] = "all"
    head: str = "attention"
    layers: tuple[int, ...] = ()
    discriminator_learning_rate: float = 0.0
    discriminator_backbone_rate: float = 1.0
    freeze_discriminator_backbone: bool = False
    generator_captions: Literal["shared", "own"] = "shared"
    discriminator_forwards: Literal[1, 2] = 1
    discriminator_precision: Literal["run", "tf32", "fp32"] = "run"
    rounding_every: int = 0
    timestep_ensemble: bool = True
    timestep_shift: float = 1.0
    objective: str = "non_saturating"
    r1: ApproximateR1 = ApproximateR1()
    terms: Terms = Terms()

    def __post_init__(self) -> None:
        if self.discriminator_learning_rate < 0:
            raise ConfigError(
                "discriminator_learning_rate must not be negative, got "
                f"{self.discriminator_learning_rate}; 0 uses the optimizer's"
            )
        if self.rounding_every < 0:
            raise ConfigError(
                f"rounding_every must not be negative, got {self.rounding_every}; 0 turns it off"
            )

    def build(self, start: ModelBundle, host: Host) -> AdversarialPostTraining:
        return AdversarialPostTraining(self, start, host)

    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        return one_step_sampling(before)

    def check(self) -> None:
        check_positive(self, "stage.", "timestep_shift", "discriminator_backbone_rate")

    def check_sharded(self) -> None:
        if self.terms.exact_r1.weight:
            raise ConfigError(
                "stage.terms.exact_r1.weight works in a single process only: exact R1 "
                "differentiates twice, and sharded weights are freed before the second pass; use "
                "the approximated R1 (stage.r1), or start one process"
            )

    def check_compiled(self) -> None:
        if self.terms.exact_r1.weight:
            raise ConfigError(
                "stage.terms.exact_r1.weight differentiates twice, which compiled blocks do not "
                "support; set --no-compile-blocks, or use the approximated R1 (stage.r1)"
            )

    def check_adapters(self) -> None:
        if self.generator_trains != "all":
            raise ConfigError(
                "with lora.rank only adapters train, in the layers that lora.targets selects; set "
                "stage.generator_trains to all"
            )


class AdversarialPostTraining(Method):
    """Updates the discriminator and the generator in turn (Sec. 3.1).

    G starts from the distilled model, and D's backbone from the diffusion model (Sec. 3.3).
    """

    def __init__(self, config: AdversarialConfig, start: ModelBundle, host: Host) -> None:
        super().__init__(start, host)
        self.config = config
        self.objective = _objective(config.objective)
        self.shares_batch = config.generator_captions == "shared"

        backbone, info = host.backbone("discriminator")
        _check_same_latents(start.info, info)
        torch.manual_seed(host.seed)
        discriminator = Discriminator(backbone, head=config.head, layers=config.layers or None)
        host.adapt(backbone, discriminator=True)
        if config.freeze_discriminator_backbone:
            _train_only(discriminator, discriminator.head_parameters())
        if config.generator_trains == "blocks":
            blocks = start.backbone.block_list()
            _train_only(
                start.backbone,
                [p for block in blocks for p in block.parameters()],
            )
        host.adapt(start.backbone)
        self.trained = {
            "generator": self.train_generator(),
            "discriminator": host.train(
                discriminator,
                backbone.block_list(),
                averaged=False,
                learning_rate=config.discriminator_learning_rate or None,
                slowed=(backbone, config.discriminator_backbone_rate),
                exact=config.discriminator_precision != "run",
            ),
        }

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator's module."""
        return cast("Discriminator", self.trained["discriminator"].module)

    def warnings(self) -> list[str]:
        r1 = self.config.r1
        if not r1.weight or r1.sigma >= SURE_SIGMA or not self._discriminates_in_bf16:
            return []
        same = r1.weight if r1.normalize else r1.weight * (r1.sigma / SURE_SIGMA) ** 2
        return [
            f"in bf16 the approximated R1 at sigma {r1.sigma:g} and its gradient are mostly "
            f"rounding error; set --stage.r1.weight {same:g} --stage.r1.sigma {SURE_SIGMA:g}, the "
            "same penalty to first order, or compute D with --stage.discriminator-precision tf32 "
            "(docs/training.md)"
        ]

    @property
    def _discriminates_in_bf16(self) -> bool:
        with self.discriminating():
            return torch.is_autocast_enabled(self.host.device.type)

    @contextmanager
    def discriminating(self) -> Iterator[None]:
        """Set the precision of D's forward passes."""
        if self.config.discriminator_precision == "run":
            with self.host.autocast():
                yield
        else:
            with torch.autocast(self.host.device.type, enabled=False):
                yield

    @contextmanager
    def products(self) -> Iterator[None]:
        """Set whether fp32 matrix products, also in backward passes, use TF32."""
        if self.config.discriminator_precision == "run":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.config.discriminator_precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def parts(self) -> dict[str, Part]:
        return {"discriminator": self.discriminator_step, "generator": self.generator_step}

    def passes(self) -> list[Pass]:
        r1, terms = self.config.r1, self.config.terms
        generator, discriminator = self.start.backbone, self.discriminator.backbone
        shown = 2.0 + (r1.fraction if r1.weight else 0.0)
        shown += terms.r2.fraction if terms.r2.weight else 0.0
        shown += 1.0 if terms.mismatched.weight else 0.0
        compares = terms.matching is not None or self.objective.needs_real
        return [
            Pass(generator, 1.0, 0),  # D's step: G makes samples, D sees all groups
            Pass(discriminator, shown, 2),
            Pass(generator, 1.0, 2),  # G's step: gradients pass through D to its input
            Pass(discriminator, 2.0 if compares else 1.0, 1),
        ]

    def discriminator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Update D once, on new samples from G."""
        trained = self.trained["discriminator"]
        trained.zero_grad()
        logs = []
        checks: Metrics = {}
        fake, real = Spread(), Spread()
        for number, batch in enumerate(trained.accumulated(batches)):
            c = self.condition(batch)
            with torch.no_grad():
                x_fake = self.draw_fake(batch, c, update, "discriminator/noise")
            fake.add(x_fake)
            real.add(batch.x)
            t = self.timesteps(batch, update, "discriminator/timestep")
            # The backward pass recomputes checkpointed blocks, with the same attention.
            with self.double_backward(), self.products():
                if number == 0 and self._checks_rounding(update):
                    checks["discriminator/r1_rounding"] = self.rounding(batch, t, c, update)
                apart = BackwardApart(self.discriminator) if self._goes_back_apart else None
                with self.discriminating():
                    loss, log = self.loss_of_discriminator(batch, x_fake, t, c, update, apart)
                if apart is None:
                    (loss / len(batches)).backward()
                else:
                    apart.backward(loss / len(batches), trained.backward_passes)
            logs.append({f"discriminator/{name}": value for name, value in log.items()})
        norm = trained.step(update)
        found = {**mean_logs(logs), **checks, **compared(fake, real)}
        return {**found, "discriminator/grad_norm": norm}

    @property
    def _goes_back_apart(self) -> bool:
        # Exact R1 is a gradient of what D returns, all the way to its input.
        return self.config.discriminator_forwards == 2 and not self.config.terms.exact_r1.weight

    def _checks_rounding(self, update: int) -> bool:
        every = self.config.rounding_every
        return bool(self.config.r1.weight and every) and (update + 1) % every == 0

    @torch.no_grad()
    def rounding(self, batch: MicroBatch, t: Tensor, c: Condition, update: int) -> Tensor:
        """Return how much of the approximated R1 is rounding error.

        This is 100 times the penalty at sigma / 10, divided by the penalty at sigma, with the same
        noise: 1 if the penalty measures D's slope, as intended, and 100 if it measures only
        rounding error.
        """
        r1, x, rows = self.config.r1, batch.x, torch.arange(len(batch), device=batch.x.device)
        draw, num = self.draw(batch, update, "perturbation"), r1.num_perturbed(len(batch))
        moved = {
            name: perturbed_batch(x, x[:0], sigma, draw, num_perturbed=num)[len(x) :]
            for name, sigma in (("near", r1.sigma / 10), ("far", r1.sigma))
        }
        groups = {"real": rows, "near": rows[:num], "far": rows[:num]}
        samples = torch.cat([x, *moved.values()])
        with self.discriminating():
            output = discriminate_groups(self.discriminator, samples, t, c, groups)
        real = output["real"].logits[:num]
        near, far = ((real - output[name].logits).square().mean() for name in moved)
        return 100 * near / far.clamp_min(torch.finfo(far.dtype).tiny)

    def loss_of_discriminator(
        self,
        batch: MicroBatch,
        x_fake: Tensor,
        t: Tensor,
        c: Condition,
        update: int,
        through: LogitNetwork | None = None,
    ) -> tuple[Tensor, Logs]:
        """Return Eq. 10 and its parts on one micro-batch, with all terms of nonzero weight.

        Args:
            through: called in place of D.
        """
        draw = self.draw(batch, update, "perturbation")
        x = batch.x.detach().requires_grad_(self.config.terms.exact_r1.weight > 0)
        return discriminator_loss(
            through or self.discriminator,
            x,
            x_fake,
            t,
            c,
            draw,
            objective=self.objective,
            r1=self.config.r1,
            terms=self.config.terms.of(x, x_fake, batch.captions, draw),
            forwards=self.config.discriminator_forwards,
        )

    def generator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Update G once, through the current D, with new noise and timesteps."""
        self.generator.zero_grad()
        logs = []
        for batch in self.generator.accumulated(batches):
            c = self.condition(batch)
            x_fake = self.draw_fake(batch, c, update, "generator/noise")
            t = self.timesteps(batch, update, "generator/timestep")
            with self.products():
                with self.discriminating():
                    loss, log = generator_loss(
                        self.discriminator,
                        x_fake,
                        t,
                        c,
                        x=batch.x,
                        objective=self.objective,
                        matching=self.config.terms.matching,
                    )
                # Only gradients of D's input are needed; those of its weights are not computed.
                (gradient,) = torch.autograd.grad(loss, x_fake)
            x_fake.backward(gradient / len(batches))
            norms = gradient.flatten(1).norm(dim=1) * len(batch)
            logs.append(
                {
                    **{f"generator/{name}": value for name, value in log.items()},
                    "discriminator/input_gradient": norms.mean(),
                }
            )
        norm = self.generator.step(update)
        return {**mean_logs(logs), "generator/grad_norm": norm}

    def heldout(self, batch: MicroBatch) -> Metrics:
        """Return D's loss and logits on held-out clips and on G's samples for their captions.

        If the logit gap shrinks here while it grows in training, D is memorising its clips.
        """
        c = self.condition(batch)
        x_fake = self.draw_fake(batch, c, 0, "heldout noise")
        t = torch.zeros(len(batch), device=batch.x.device)
        if self.config.timestep_ensemble:
            t = shift_timesteps(even_timesteps(batch).to(t.device), self.config.timestep_shift)
        draw = self.draw(batch, 0, "perturbation")
        plain = replace(self.config.r1, weight=0.0)
        with self.products(), self.discriminating():
            _, log = discriminator_loss(
                self.discriminator, batch.x, x_fake, t, c, draw, objective=self.objective, r1=plain
            )
        return {f"discriminator/{name}": value for name, value in log.items()}

    def preview(self, z: Tensor, c: Condition) -> Tensor:
        return generate(self.generator.module, z, c)

    def draw_fake(self, batch: MicroBatch, c: Condition, update: int, stream: str) -> Tensor:
        """Return one-step samples (b, C, T, H, W) in fp32 for the batch's conditions."""
        z = sample_noise(len(batch), batch.x.shape[1:], self.draw(batch, update, stream))
        with self.host.autocast():
            return generate(self.generator.module, z, c).float()

    def timesteps(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """Return D's timestep inputs (b,)."""
        if not self.config.timestep_ensemble:
            return torch.zeros(len(batch.captions), device=batch.x.device)
        draw = self.draw(batch, update, stream)
        return timestep_ensemble(len(batch), self.config.timestep_shift, draw)

    @contextmanager
    def double_backward(self) -> Iterator[None]:
        """If exact R1 is on, choose attention and ops that can be differentiated twice."""
        if not self.config.terms.exact_r1.weight:
            yield
            return
        with attention_backend("_native_math"), kernel_backend("reference"):
            yield


def one_step_sampling(before: SamplingInfo) -> SamplingInfo:
    """Return the sampling settings of a one-step generator whose teacher was sampled as `before`.

    Guidance is distilled into the generator. More than one step uses the teacher's timestep grid,
    on which it was distilled.
    """
    return replace(before, num_steps=1, cfg_scale=1.0, sampler="consistency")


def _train_only(network: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _objective(name: str) -> AdversarialObjective:
    """Return a registered adversarial objective; ConfigError for a loss of another kind."""
    loss = create_loss(name)
    if isinstance(loss, AdversarialObjective):
        return loss
    builders = {other: LOSSES.get(other) for other in list_losses()}
    kinds = [
        other
        for other, builder in builders.items()
        if isinstance(builder, type) and issubclass(builder, AdversarialObjective)
    ]
    raise ConfigError(
        f"stage.objective {name!r} is not an adversarial objective; choose from: {', '.join(kinds)}"
    )


def _check_same_latents(generator: ModelInfo, discriminator: ModelInfo) -> None:
    for part in ("codec", "text_encoder"):
        ours, theirs = getattr(generator, part), getattr(discriminator, part)
        if (ours.architecture, ours.config) != (theirs.architecture, theirs.config):
            raise ConfigError(
                f"generator and discriminator start from models with different {part}s "
                f"({ours.architecture} and {theirs.architecture}); both must come from one "
                "diffusion model"
            )

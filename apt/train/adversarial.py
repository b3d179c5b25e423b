"""Stage three: adversarial post-training against real data (APT Secs. 3.3-3.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from apt.errors import ConfigError
from apt.hub import ModelInfo
from apt.kernels import (
    attention_backend,
    kernel_backend,
    perturbed_batch,
    sample_shifted_timesteps,
)
from apt.losses import create_loss
from apt.models.bundle import ModelBundle, load_backbone
from apt.models.conditions import TextCondition
from apt.models.discriminator import Discriminator
from apt.models.generator import generate
from apt.train.adapters import add_adapters
from apt.train.config import AdversarialConfig, TrainConfig
from apt.train.networks import make_trained, require_source
from apt.train.parallel import Parallel
from apt.train.stage import MicroBatch, Stage, denoiser, mean

Metrics = dict[str, float | Tensor]


class Adversarial(Stage):
    """Alternates one update of the discriminator and one of the generator."""

    def __init__(self, config: TrainConfig, start: ModelBundle, parallel: Parallel) -> None:
        super().__init__(config, start, parallel)
        assert isinstance(config.stage, AdversarialConfig)
        self.stage = stage = config.stage
        self.objective = create_loss(stage.objective)
        self.penalties = _penalties(stage)

        source = require_source(stage.discriminator, "stage.discriminator")
        backbone, info = load_backbone(source)
        _check_same_latents(start.info, info)
        torch.manual_seed(config.seed)
        discriminator = Discriminator(backbone, head=stage.head, layers=stage.layers or None)
        backbone.set_checkpointing(config.activation_checkpointing)
        if config.lora.discriminator:
            add_adapters(backbone, config.lora, seed=config.seed)
        if stage.freeze_discriminator_backbone:
            _train_only(discriminator, discriminator.head_parameters())
        network = denoiser(start, config, with_text=False)
        if stage.generator_trains == "blocks":
            blocks = start.backbone.block_list()
            _train_only(network, [p for block in blocks for p in block.parameters()])
        rate = stage.discriminator_learning_rate or config.optimizer.learning_rate
        faster = dataclasses.replace(config.optimizer, learning_rate=rate)
        self.trained = {
            "generator": make_trained(
                network,
                start.backbone.block_list(),
                config,
                parallel,
                ema_decay=config.ema_decay,
            ),
            "discriminator": make_trained(
                discriminator,
                backbone.block_list(),
                dataclasses.replace(config, optimizer=faster),
                parallel,
                ema_decay=None,
            ),
        }

    @property
    def judge(self) -> Discriminator:
        """D itself."""
        return cast("Discriminator", self.trained["discriminator"].module)

    def update(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        metrics = self.discriminator_step(batches, update)
        return {**metrics, **self.generator_step(batches, update)}

    def discriminator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the adversarial loss and the penalties for D (APT Eq. 10)."""
        trained = self.trained["discriminator"]
        trained.zero_grad()
        logs = []
        for batch in batches:
            c = self.encode(batch.captions)
            with torch.no_grad():
                x_fake = self.fake(batch, c, update, "discriminator/noise")
            # One timestep per sample, which all of its versions share (Eqs. 6-7).
            t = self.timesteps(batch, update, "discriminator/timestep")
            # Checkpointed blocks are computed again in the backward pass, with the same attention.
            with self.double_backward():
                with self.autocast():
                    loss, log = self.discriminator_loss(batch, x_fake, t, c, update)
                (loss / len(batches)).backward()
            logs.append(log)
        norm = trained.step(update)
        return {**_mean_logs(logs), "discriminator/grad_norm": norm}

    def discriminator_loss(
        self, batch: MicroBatch, x_fake: Tensor, t: Tensor, c: TextCondition, update: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch from one forward of D over all groups of samples."""
        r1, r2 = self.penalties.get("approximate_r1"), self.penalties.get("approximate_r2")
        exact = self.penalties.get("r1")
        x_real = batch.x.detach().requires_grad_(exact is not None)
        num = x_real.shape[0]
        num_real = r1.num_perturbed(num) if r1 else 0
        num_fake = r2.num_perturbed(num) if r2 else 0
        perturb = partial(
            perturbed_batch,
            sigma=self.stage.r1_sigma,
            seed=self.config.seed,
            step=update,
            offset=batch.offset,
        )
        if r2:  # generated samples, then their perturbed copies, which have noise of their own
            x_fake = perturb(x_fake, x_fake[:0], num_perturbed=num_fake, stream="perturbation/fake")
        x = perturb(x_real, x_fake, num_perturbed=num_real)
        rows = torch.arange(num, device=x.device)
        groups = {
            "real": rows,
            "perturbed": rows[:num_real],
            "fake": rows,
            "fake_perturbed": rows[:num_fake],
        }
        mismatched = self.penalties.get("mismatched_condition")
        if mismatched:
            # A neighbour's caption, where it differs from the sample's own.
            others = [i for i in range(num) if batch.captions[i] != batch.captions[(i + 1) % num]]
            chosen = torch.tensor(others, dtype=torch.int64, device=x.device)
            groups["mismatched"] = (chosen + 1) % num
            x = torch.cat([x, x_real[chosen]])

        output = self.judge.forward_groups(x, t, c, groups)
        logits = {name: judged.logits for name, judged in output.items()}

        adversarial = self.objective.discriminator(logits["real"], logits["fake"])
        terms: dict[str, Tensor] = {}
        if r1:
            terms["approximate_r1"] = r1(logits["real"], logits["perturbed"])
        if r2:
            terms["approximate_r2"] = r2(logits["fake"], logits["fake_perturbed"])
        if exact:
            terms["r1"] = exact(logits["real"], x_real)
        if "logit_centring" in self.penalties:
            terms["logit_centring"] = self.penalties["logit_centring"](
                logits["real"], logits["fake"]
            )
        if mismatched:
            wrong = logits["mismatched"]
            terms["mismatched_condition"] = mismatched(wrong) if others else wrong.sum()
        log = {
            "discriminator/loss": adversarial,
            "discriminator/logit_gap": logits["real"].mean() - logits["fake"].mean(),
            "discriminator/logit_real": logits["real"].mean(),
            "discriminator/logit_fake": logits["fake"].mean(),
            **{f"discriminator/{name}": term for name, term in terms.items()},
        }
        return adversarial + sum(terms.values()), log

    def generator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the adversarial loss for G, with fresh noise and timesteps."""
        self.generator.zero_grad()
        logs = []
        for batch in batches:
            c = self.encode(batch.captions)
            x_fake = self.fake(batch, c, update, "generator/noise")
            t = self.timesteps(batch, update, "generator/timestep")
            with self.autocast():
                loss, log = self.generator_loss(batch, x_fake, t, c)
            # Through D to its input only: D's own gradients are neither computed nor kept.
            (gradient,) = torch.autograd.grad(loss, x_fake)
            x_fake.backward(gradient / len(batches))
            norms = gradient.flatten(1).norm(dim=1) * len(batch.captions)
            logs.append({**log, "discriminator/input_gradient": norms.mean()})
        norm = self.generator.step(update)
        return {**_mean_logs(logs), "generator/grad_norm": norm}

    def generator_loss(
        self, batch: MicroBatch, x_fake: Tensor, t: Tensor, c: TextCondition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch; real samples are judged too if a term compares with them."""
        matching = self.penalties.get("feature_matching")
        rows = torch.arange(len(batch.captions), device=x_fake.device)
        x, groups = x_fake, {"fake": rows}
        if matching or self.objective.needs_real:
            x, groups = torch.cat([x_fake, batch.x]), {"fake": rows, "real": rows}
        output = self.judge.forward_groups(x, t, c, groups)
        adversarial = self.objective.generator(
            output["fake"].logits, output["real"].logits if self.objective.needs_real else None
        )
        log = {"generator/loss": adversarial}
        if not matching:
            return adversarial, log
        distance = matching(output["fake"].features, output["real"].features)
        return adversarial + distance, {**log, "generator/feature_matching": distance}

    def fake(self, batch: MicroBatch, c: TextCondition, update: int, stream: str) -> Tensor:
        """One-step samples in fp32, for the batch's captions."""
        z = self.noise(batch, update, stream)
        with self.autocast():
            return generate(self.generator.module, z, c).float()

    def timesteps(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """(b,) of D's timestep ensemble."""
        return sample_shifted_timesteps(
            len(batch.captions),
            shift=self.stage.timestep_shift,
            seed=self.config.seed,
            step=update,
            offset=batch.offset,
            stream=stream,
            device=batch.x.device,
        )

    @contextmanager
    def double_backward(self) -> Iterator[None]:
        """Exact R1 needs attention and fused ops that can be differentiated twice."""
        if "r1" not in self.penalties:
            yield
            return
        with attention_backend("_native_math"), kernel_backend("reference"):
            yield


def _train_only(network: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _penalties(stage: AdversarialConfig) -> dict[str, Any]:
    """The terms whose weight is not 0, by their registered names."""
    perturbation = {
        "sigma": stage.r1_sigma,
        "normalize": stage.r1_normalize,
        "fraction": stage.r1_fraction,
    }
    options: dict[str, dict[str, Any]] = {
        "approximate_r1": {"weight": stage.r1_weight, **perturbation},
        "approximate_r2": {"weight": stage.r2_weight, **perturbation},
        "r1": {"weight": stage.exact_r1_weight},
        "logit_centring": {"weight": stage.logit_centring_weight},
        "feature_matching": {"weight": stage.feature_matching_weight},
        "mismatched_condition": {"weight": stage.mismatched_weight},
    }
    return {
        name: create_loss(name, **chosen) for name, chosen in options.items() if chosen["weight"]
    }


def _check_same_latents(generator: ModelInfo, discriminator: ModelInfo) -> None:
    for part in ("codec", "text_encoder"):
        ours, theirs = getattr(generator, part), getattr(discriminator, part)
        if (ours.architecture, ours.config) != (theirs.architecture, theirs.config):
            raise ConfigError(
                f"generator and discriminator start from models with different {part}s "
                f"({ours.architecture} and {theirs.architecture}); both must come from one "
                "diffusion model"
            )


def _mean_logs(logs: Sequence[dict[str, Tensor]]) -> Metrics:
    return {name: mean([log[name] for log in logs]) for name in logs[0]}

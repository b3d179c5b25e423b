"""Terms of the adversarial losses that the paper does not have, with the samples that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apt.errors import ConfigError
from apt.kernels import perturbed_batch
from apt.losses import R1, ApproximateR2, FeatureMatching, LogitCentring, MismatchedCondition
from apt.rng import Draw

__all__ = ["DiscriminatorTerm", "FeatureMatching", "Terms"]

Logits = Mapping[str, Tensor]


@dataclass(frozen=True)
class DiscriminatorTerm:
    """A term of D's loss for one micro-batch.

    Attributes:
        name: the name under which it is logged.
        penalty: the term as a function of the logits (n,) of each group: "real", "perturbed",
            "fake" and the groups of this term.
        samples: additional latents (n, C, T, H, W) for D, group after group.
        groups: for each group of `samples`, in order, its rows (n,) of t and c.
    """

    name: str
    penalty: Callable[[Logits], Tensor]
    samples: tuple[Tensor, ...] = ()
    groups: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, logits: Logits) -> Tensor:
        return self.penalty(logits)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The weights of these terms; 0, the default, is the paper's choice.

    Attributes:
        r2: the approximated penalty on generated samples (AAPT, SeedVR2).
        exact_r1: R1 by double backward (Eq. 8); reference ops only.
        logit_centring: keeps logits around 0 (Adversarial Flow Models).
        feature_matching: a loss of G on D's features (SeedVR2).
        mismatched: D treats real samples with another sample's condition as generated (GigaGAN;
            little gain in App. J).
    """

    r2: ApproximateR2 = ApproximateR2(weight=0.0)
    exact_r1: R1 = R1(weight=0.0)
    logit_centring: LogitCentring = LogitCentring(weight=0.0)
    feature_matching: FeatureMatching = FeatureMatching(weight=0.0)
    mismatched: MismatchedCondition = MismatchedCondition(weight=0.0)

    @property
    def matching(self) -> FeatureMatching | None:
        """G's term, or None if its weight is 0."""
        return self.feature_matching if self.feature_matching.weight else None

    def of(
        self, x: Tensor, x_fake: Tensor, captions: Sequence[str], draw: Draw
    ) -> list[DiscriminatorTerm]:
        """Return D's terms of nonzero weight, for real and generated samples of the captions."""
        terms = []
        if self.r2.weight:
            terms.append(approximate_r2(self.r2, x_fake, draw.named("perturbation/fake")))
        if self.exact_r1.weight:
            terms.append(exact_r1(self.exact_r1, x))
        if self.logit_centring.weight:
            terms.append(logit_centring(self.logit_centring))
        if self.mismatched.weight:
            terms.append(mismatched_condition(self.mismatched, x, captions))
        return terms


def approximate_r2(loss: ApproximateR2, x_fake: Tensor, draw: Draw) -> DiscriminatorTerm:
    """Return Eq. 9 on generated samples (B, ...), with separate noise."""
    num = loss.num_perturbed(len(x_fake))
    moved = perturbed_batch(x_fake, x_fake[:0], loss.sigma, draw, num_perturbed=num)[len(x_fake) :]
    return DiscriminatorTerm(
        "approximate_r2",
        lambda logits: loss(logits["fake"], logits["fake_perturbed"]),
        (moved,),
        {"fake_perturbed": torch.arange(num, device=x_fake.device)},
    )


def exact_r1(loss: R1, x: Tensor) -> DiscriminatorTerm:
    """Return Eq. 8, ||grad_x D(x, c)||^2, at D's real samples x (B, ...), which require grad."""
    return DiscriminatorTerm("r1", lambda logits: loss(logits["real"], x))


def logit_centring(loss: LogitCentring) -> DiscriminatorTerm:
    """Return the penalty on sums of real and generated logits."""
    return DiscriminatorTerm("logit_centring", lambda logits: loss(logits["real"], logits["fake"]))


def mismatched_condition(
    loss: MismatchedCondition, x: Tensor, captions: Sequence[str]
) -> DiscriminatorTerm:
    """Return the loss on real samples with the next sample's condition (App. J).

    Samples whose caption equals the next one's are left out. Raises ConfigError for a micro-batch
    of one sample, where the term would always be 0.
    """
    num = len(captions)
    if num == 1:
        raise ConfigError(
            "stage.terms.mismatched.weight swaps the captions within a micro-batch, which has only "
            "one sample; set --micro-batch-size to 2 or more, or the weight to 0"
        )
    others = [i for i in range(num) if captions[i] != captions[(i + 1) % num]]
    chosen = torch.tensor(others, dtype=torch.int64, device=x.device)

    def penalty(logits: Logits) -> Tensor:
        wrong = logits["mismatched"]
        return loss(wrong) if others else wrong.sum()

    return DiscriminatorTerm(
        "mismatched_condition", penalty, (x[chosen],), {"mismatched": (chosen + 1) % num}
    )

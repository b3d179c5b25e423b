"""Terms of the adversarial losses that the paper does not have, each with the samples it needs."""

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
    """A summand of D's loss, bound to one micro-batch.

    Attributes:
        name: under which it is logged.
        penalty: of the logits (n,) of each group: "real", "perturbed", "fake" and its own.
        samples: what D must see for it beside those, latents (n, C, T, H, W) group after group.
        groups: for each group of `samples`, in their order, its rows (n,) of t and c.
    """

    name: str
    penalty: Callable[[Logits], Tensor]
    samples: tuple[Tensor, ...] = ()
    groups: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, logits: Logits) -> Tensor:
        return self.penalty(logits)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Their weights; 0, the default, is the paper.

    Attributes:
        r2: the approximated penalty on generated samples (AAPT, SeedVR2).
        exact_r1: R1 by double backward (Eq. 8); reference ops only.
        logit_centring: keeps logits around 0 (Adversarial Flow Models).
        feature_matching: for G, in D's features (SeedVR2).
        mismatched: real samples under another sample's condition count as generated (GigaGAN, and
            App. J, where it brought little).
    """

    r2: ApproximateR2 = ApproximateR2(weight=0.0)
    exact_r1: R1 = R1(weight=0.0)
    logit_centring: LogitCentring = LogitCentring(weight=0.0)
    feature_matching: FeatureMatching = FeatureMatching(weight=0.0)
    mismatched: MismatchedCondition = MismatchedCondition(weight=0.0)

    @property
    def matching(self) -> FeatureMatching | None:
        """G's term, if it has a weight."""
        return self.feature_matching if self.feature_matching.weight else None

    def of(
        self, x: Tensor, x_fake: Tensor, captions: Sequence[str], draw: Draw
    ) -> list[DiscriminatorTerm]:
        """Those of D that have a weight, for real and generated samples of the same captions."""
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
    """Eq. 9 on generated samples (B, ...), with noise of its own."""
    num = loss.num_perturbed(len(x_fake))
    moved = perturbed_batch(x_fake, x_fake[:0], loss.sigma, draw, num_perturbed=num)[len(x_fake) :]
    return DiscriminatorTerm(
        "approximate_r2",
        lambda logits: loss(logits["fake"], logits["fake_perturbed"]),
        (moved,),
        {"fake_perturbed": torch.arange(num, device=x_fake.device)},
    )


def exact_r1(loss: R1, x: Tensor) -> DiscriminatorTerm:
    """Eq. 8, ||grad_x D(x, c)||^2; x (B, ...) requires gradients, and is what D sees as real."""
    return DiscriminatorTerm("r1", lambda logits: loss(logits["real"], x))


def logit_centring(loss: LogitCentring) -> DiscriminatorTerm:
    """Real and generated logits add up to 0."""
    return DiscriminatorTerm("logit_centring", lambda logits: loss(logits["real"], logits["fake"]))


def mismatched_condition(
    loss: MismatchedCondition, x: Tensor, captions: Sequence[str]
) -> DiscriminatorTerm:
    """Real samples under their neighbour's condition, where its caption is another (App. J).

    Raises ConfigError for a sample without a neighbour, for which the term would never be there.
    """
    num = len(captions)
    if num == 1:
        raise ConfigError(
            "stage.terms.mismatched.weight shows samples under each other's captions, and a "
            "micro-batch is one sample here; set --micro-batch-size to 2 or more, or the weight "
            "to 0"
        )
    others = [i for i in range(num) if captions[i] != captions[(i + 1) % num]]
    chosen = torch.tensor(others, dtype=torch.int64, device=x.device)

    def penalty(logits: Logits) -> Tensor:
        wrong = logits["mismatched"]
        return loss(wrong) if others else wrong.sum()

    return DiscriminatorTerm(
        "mismatched_condition", penalty, (x[chosen],), {"mismatched": (chosen + 1) % num}
    )

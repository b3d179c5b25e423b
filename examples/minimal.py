"""Adversarial post-training in two dimensions, with the functions that train the large models.

    python examples/minimal.py          # under a minute on two cores; writes minimal.png

A network learns the flow of a ring of Gaussians. Distilled to one step it becomes G; with a new
output, D. Without the approximated R1 their game does not converge (Mescheder et al. 2018).
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from apt.flow import euler_sample, sampling_timesteps
from apt.losses import ApproximateR1, Consistency, FlowMatching
from apt.methods.apt import discriminator_loss, generate, generator_loss, timestep_ensemble
from apt.models.discriminator import DiscriminatorOutput
from apt.rng import Draw

BATCH, WIDTH, MODES, SPREAD = 128, 64, 8, 0.02
RATE = 2e-3  # of G and D: the paper uses one rate for both


class Network(nn.Module):
    """Maps (x, t) to a velocity (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        widths = itertools.pairwise([6, WIDTH, WIDTH, WIDTH])
        hidden = [layer for a, b in widths for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden)
        self.output = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, t: Tensor, c: object = None) -> Tensor:
        a = 2 * math.pi * t[:, None]
        time = torch.cat([t[:, None], a.sin(), a.cos(), (2 * a).sin()], dim=1)
        return self.output(self.layers(torch.cat([x, time], dim=1)))


class Discriminator(nn.Module):
    """The diffusion network with a logit as its output; sample i uses `t[rows[i]]`."""

    def __init__(self, diffusion: Network) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(diffusion)
        self.backbone.output = nn.Linear(WIDTH, 1)

    def forward(
        self, x: Tensor, t: Tensor, c: object, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        return DiscriminatorOutput(self.backbone(x, t if rows is None else t[rows])[:, 0], [])


def data(num: int) -> Tensor:
    """Draw points (num, 2) from the mixture."""
    angle = torch.randint(MODES, (num,)) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + SPREAD * torch.randn(num, 2)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def pretrain(updates: int) -> Network:
    """Train the diffusion model (Sec. 3.1)."""
    network, loss = Network(), FlowMatching()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(updates):
        descend(optimizer, loss(network, data(BATCH), torch.randn(BATCH, 2), torch.rand(BATCH)))
    return network


def distill(teacher: Network, updates: int) -> Network:
    """Distil the teacher to one step; samples are blurred (Sec. 3.2)."""
    student, target, loss = copy.deepcopy(teacher), copy.deepcopy(teacher), Consistency(25, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    for _ in range(updates):
        index = torch.randint(loss.num_intervals, (BATCH,))
        x, z = data(BATCH), torch.randn(BATCH, 2)
        descend(optimizer, loss(student, lambda x, t: (teacher(x, t),) * 2, target, x, z, index))
        for slow, fast in zip(target.parameters(), student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)
    return student


def post_train(
    start: Network, diffusion: Network, r1: ApproximateR1, updates: int
) -> tuple[Network, list[float]]:
    """Train with APT (Secs. 3.3-3.5); return G and its distance to the data every 50 updates."""
    generator, discriminator = copy.deepcopy(start), Discriminator(diffusion)
    to_g = torch.optim.RMSprop(generator.parameters(), lr=RATE, alpha=0.9)
    to_d = torch.optim.RMSprop(discriminator.parameters(), lr=RATE, alpha=0.9)
    curve = [distance(generator)]
    for update in range(1, updates + 1):
        draw = Draw(seed=0, step=update)
        x, x_fake = data(BATCH), generate(generator, torch.randn(BATCH, 2), None).detach()
        t, moved = timestep_ensemble(BATCH, 1.0, draw), draw.named("perturbation")
        descend(to_d, discriminator_loss(discriminator, x, x_fake, t, None, moved, r1=r1)[0])
        x_fake = generate(generator, torch.randn(BATCH, 2), None)
        t = timestep_ensemble(BATCH, 1.0, draw.named("generator"))
        descend(to_g, generator_loss(discriminator, x_fake, t, None)[0])
        if update % 50 == 0:
            curve.append(distance(generator))
    return generator, curve


@torch.no_grad()
def distance(generator: Network) -> float:
    """Return the energy distance between one-step samples and data."""
    a, b = generate(generator, torch.randn(1000, 2), None), data(1000)
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main(folder: Path, updates: tuple[int, int, int] = (3000, 400, 2000)) -> dict[str, list[float]]:
    """Train and plot; return the curves of both runs."""
    torch.manual_seed(0)
    diffusion = pretrain(updates[0])
    one_step = distill(diffusion, updates[1])
    many = euler_sample(diffusion, torch.randn(2000, 2), sampling_timesteps(25)).detach()
    once = generate(one_step, torch.randn(2000, 2), None).detach()
    clouds, curves = {"data": data(2000), "diffusion, 25 steps": many, "consistency": once}, {}
    for name, weight in (("APT", 10.0), ("APT without R1", 0.0)):
        r1 = ApproximateR1(weight=weight, sigma=0.1)
        net, curves[name] = post_train(one_step, diffusion, r1, updates[2])
        clouds[name] = generate(net, torch.randn(2000, 2), None).detach()
    figure, axes = plt.subplots(1, len(clouds) + 1, figsize=(17, 3), layout="constrained")
    for axis, (name, cloud) in zip(axes, clouds.items(), strict=False):
        axis.scatter(*cloud.T, s=1)
        axis.set(title=name, xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    for name, curve in curves.items():
        axes[-1].plot(range(0, 50 * len(curve), 50), curve, label=name)
    axes[-1].set(title="energy distance to the data", xlabel="update", yscale="log")
    axes[-1].legend()
    figure.savefig(folder / "minimal.png", dpi=120)
    return curves


if __name__ == "__main__":
    for name, curve in main(Path(".")).items():
        print(
            f"{name:15} last 1,000 updates: energy distance {sum(curve[-20:]) / 20:.4f} on average"
        )

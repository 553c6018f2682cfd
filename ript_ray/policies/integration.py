"""From noise to actions: Euler steps along the velocity, one of them stochastic if wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x float32[B, T, D], t float32[B]) → v float32[B, T, D]"""


@dataclass(frozen=True, slots=True)
class Explore:
    """How to make one step of the sampling stochastic."""

    level: float
    """Noise level a > 0."""
    executed: int
    """Actions of the chunk that will be executed; kept with the step."""
    generator: torch.Generator
    """On the CPU; draws the place and the noise of the step."""
    real: int
    """Leading dimensions of an action that the environment gets; π0 pads the others."""


@dataclass(frozen=True, slots=True)
class ChainStep:
    """The stochastic step in the sampling of B chunks."""

    x: torch.Tensor
    """Before the step: float32[B, T, D]."""
    x_next: torch.Tensor
    """After it: float32[B, T, D]."""
    log_prob: torch.Tensor
    """Log-probability of the step, summed over the environment's action dimensions: float32[B, T]."""
    time: torch.Tensor
    """t of x: float32[B]."""
    duration: torch.Tensor
    """How much time the step takes: float32[B]."""
    level: torch.Tensor
    """Noise level a of the step: float32[B]."""
    executed: torch.Tensor
    """How many actions of the chunk were to be executed: int64[B]."""

    def __getitem__(self, rows: slice) -> ChainStep:
        return ChainStep(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device) -> ChainStep:
        """The same on another device."""
        return ChainStep(*(getattr(self, f.name).to(device) for f in fields(self)))


def euler_maruyama(
    velocity: torch.Tensor, x: torch.Tensor, time: torch.Tensor, duration: torch.Tensor, level: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a stochastic step from t to t − d that keeps the flow's marginals to first order in d.

    Flow-SDE (π_RL, arXiv 2510.25889): with â = x − t·v, ε̂ = x + (1 − t)·v and σ = a·√(t/(1 − t)),
    mean = (1 − t + d)·â + (t − d − σ²d/(2t))·ε̂ and deviation √d·σ. At t = 1 the next time stands in for t under σ's
    fraction bar.

    Args:
        velocity: v(x, t), float32[B, T, D].
        x: float32[B, T, D].
        time: t, float32[B].
        duration: d, float32[B].
        level: a, float32[B].
    """
    t, d, a = (value[:, None, None] for value in (time, duration, level))
    clean, noise = x - t * velocity, x + (1 - t) * velocity
    remaining = torch.where(t < 1 - 1e-6, 1 - t, d)
    variance = a.square() * t / remaining
    mean = (1 - t + d) * clean + (t - d - variance * d / (2 * t)) * noise
    return mean, (d * variance).sqrt()


def integrate(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler steps from t = 1 to t = 0: float32[B, T, D]."""
    x = noise
    for i in range(steps):
        x = x - velocity(x, _time(x, i, steps)) / steps
    return x


def integrate_with_noise(
    velocity: Velocity, noise: torch.Tensor, steps: int, explore: Explore
) -> tuple[torch.Tensor, ChainStep]:
    """As `integrate`, with one stochastic step in each row, at a random place.

    Args:
        velocity: the field.
        noise: where the integration starts, float32[B, T, D].
        steps: Euler steps.
        explore: the stochastic step's noise.

    Returns:
        The chunk, and the stochastic step.
    """
    rows, device = len(noise), noise.device
    place = torch.randint(steps, (rows,), generator=explore.generator).to(device)
    kick = torch.randn(noise.shape, generator=explore.generator).to(device)
    duration, levels = torch.full((rows,), 1 / steps, device=device), torch.full((rows,), explore.level, device=device)
    x, before, after, log_prob = noise, noise, noise, noise[..., 0]
    for i in range(steps):
        t = _time(x, i, steps)
        v = velocity(x, t)
        mean, std = euler_maruyama(v, x, t, duration, levels)
        drawn = mean + std * kick
        here = (place == i)[:, None, None]
        stepped = torch.where(here, drawn, x - v / steps)
        log_probs = _log_prob(drawn, mean, std)[..., : explore.real].sum(-1)
        before, after = torch.where(here, x, before), torch.where(here, drawn, after)
        log_prob = torch.where(here[..., 0], log_probs, log_prob)
        x = stepped
    executed = torch.full((rows,), explore.executed, device=device)
    return x, ChainStep(before, after, log_prob, 1.0 - place / steps, duration, levels, executed)


def log_prob_under(velocity: torch.Tensor, chain: ChainStep, real: int) -> torch.Tensor:
    """Log-probability of recorded steps under another velocity at their x and time, summed over action dimensions.

    Args:
        velocity: float32[B, T, D].
        chain: the steps.
        real: so many leading dimensions count, as in `Explore`.

    Returns:
        float32[B, T].
    """
    mean, std = euler_maruyama(velocity, chain.x, chain.time, chain.duration, chain.level)
    return _log_prob(chain.x_next, mean, std)[..., :real].sum(-1)


def _log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Of each element of a diagonal Gaussian."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def _time(x: torch.Tensor, i: int, steps: int) -> torch.Tensor:
    return torch.full((len(x),), 1.0 - i / steps, device=x.device)

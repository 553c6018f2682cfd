"""How a policy acts in one episode: rollouts try what it would not do by itself, evaluation never does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ript_ray.config import PolicyConfig


@dataclass(frozen=True, slots=True)
class Acting:
    """How a policy acts in one episode; what of it is random is the noise that it starts from, and what explores."""

    execute: int
    """So many first actions of each chunk are executed."""
    denoise_steps: int
    """Euler steps."""
    guidance: float
    explore: float = 0.0
    """Of one stochastic Euler step in each chunk, as Flow-SDE has it; 0 for none."""
    action_noise: float = 0.0
    """Deviation of what is added to actions, in the environment's units; 0 for none."""
    noise_exponent: float = 1.0
    """β of its power spectrum 1/f^β over an episode."""
    noise_dimensions: int = 3
    """So many first action dimensions have it."""

    @classmethod
    def of(cls, policy: PolicyConfig, guidance: float, exploring: bool) -> Acting:
        """By the settings of ``policy``, in training or, not exploring, in evaluation."""
        settings = {field.name: getattr(policy, field.name) for field in fields(cls)} | {"guidance": guidance}
        return cls(**settings if exploring else settings | {"explore": 0.0, "action_noise": 0.0})

    def noise(self, steps: int, action_dim: int, seed: int) -> np.ndarray:
        """What is added to the actions of an episode: float32[steps, action_dim]."""
        noise = np.zeros((steps, action_dim), dtype=np.float32)
        explored = min(self.noise_dimensions, action_dim)
        if self.action_noise > 0:
            rng = np.random.default_rng([seed, 1])
            noise[:, :explored] = self.action_noise * coloured_noise(steps, explored, self.noise_exponent, rng)
        return noise


def coloured_noise(steps: int, count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian sequences with the power spectrum 1/f^β and, in the mean, a variance of 1: float64[steps, count].

    β = 0 is white noise; with β = 1, pink, what is added up over an episode takes the arm somewhere else, and it stays
    there (Eberhard et al. 2023, "Pink noise is all you need"). Drawn by frequencies as in Timmer and Koenig 1995; the
    lowest stands in for frequency 0, so that a sequence has a mean of its own.
    """
    frequencies = np.fft.rfftfreq(steps)
    frequencies[0] = 1.0 / steps
    scale = frequencies ** (-exponent / 2)
    # Of a real sequence the first coefficient, and for an even length the last, are real and count once.
    parts = rng.normal(size=(2, len(scale), count)) * scale[:, None] / np.sqrt(2.0)
    spectrum = parts[0] + 1j * parts[1]
    power = 2 * scale**2
    for alone in {0, len(scale) - 1} if steps % 2 == 0 else {0}:
        spectrum[alone] = parts[0][alone] * np.sqrt(2.0)
        power[alone] = scale[alone] ** 2
    sequences: np.ndarray = np.fft.irfft(spectrum, n=steps, axis=0) * steps / np.sqrt(power.sum())
    return sequences

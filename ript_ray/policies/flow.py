"""A small flow-matching policy: pixels of two cameras, state and instruction → a chunk of 50 actions. Runs on a CPU.

Conventions follow π0: t = 1 is noise, x_t = t·ε + (1 − t)·a, the velocity target is ε − a, and sampling integrates
from t = 1 to t = 0 with Euler steps. A condition c ∈ {0, 1} serves classifier-free guidance (c = 1: "good").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ript_ray.policies.transform import Transform
from ript_ray.types import Batch


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Sizes of `FlowPolicy`."""

    horizon: int = 50
    action_dim: int = 7
    state_dim: int = 8
    channels: int = 32
    context: int = 256
    width: int = 384
    depth: int = 3


class FlowPolicy(nn.Module):
    """The velocity field v(x_t, t | observation, c) and its sampler.

    Args:
        config: sizes.
        transform: the observation and action transform, saved with the weights.
        chunk_mean: mean of the demonstrations' normalised chunks, float32[horizon, action_dim].
        chunk_std: their deviation, same shape.
    """

    chunk_mean: torch.Tensor
    chunk_std: torch.Tensor

    def __init__(
        self, config: FlowConfig, transform: Transform, chunk_mean: torch.Tensor, chunk_std: torch.Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.transform = transform
        self.register_buffer("chunk_mean", chunk_mean)
        self.register_buffer("chunk_std", chunk_std)
        self.cameras = nn.ModuleList(_CameraEncoder(config.channels) for _ in range(2))
        self.words = nn.EmbeddingBag(transform.vocabulary + 1, 32, padding_idx=transform.vocabulary)
        self.state = nn.Sequential(nn.Linear(config.state_dim, 64), nn.SiLU(), nn.Linear(64, 64))
        features = 2 * 3 * config.channels + 64 + 32
        self.context = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, config.context), nn.SiLU())
        self.condition = nn.Embedding(2, config.context)
        self.time = nn.Linear(64, config.context)
        size = config.horizon * config.action_dim
        self.project_in = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(_ModulatedBlock(config.width, config.context) for _ in range(config.depth))
        self.project_out = nn.Linear(config.width, size)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        """Observation features, once per look: uint8[B, 2, H, W, 3], float32[B, 8] → float32[B, context]."""
        images = self.transform.encode_images(frames)
        words = self.transform.encode_instructions(instructions).to(states.device)
        words = torch.where(words < 0, self.transform.vocabulary, words)
        seen = [camera(images[:, i]) for i, camera in enumerate(self.cameras)]
        return self.context(
            torch.cat([*seen, self.state(self.transform.encode_state(states)), self.words(words)], dim=1)
        )

    def velocity(
        self, context: torch.Tensor, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """v(x, t | context, c): float32[B, horizon, action_dim].

        The network predicts only what a Gaussian with the demonstrations' mean μ and deviation σ does not explain:
        v = −μ + c_skip·x′ + c_out·F(x′/√V), with x′ = x − (1 − t)μ, V = t² + (1 − t)²σ²,
        c_skip = (t − (1 − t)σ²)/V, c_out = σ/√V. A plain network leaves noise in dimensions that should be still.

        Args:
            context: from `encode`, float32[B, context].
            x: noisy chunk, float32[B, horizon, action_dim].
            t: time in [0, 1], float32[B].
            condition: int64[B], 0 or 1.
        """
        mean, std = self.chunk_mean, self.chunk_std
        time = t[:, None, None]
        variance = time**2 + (1 - time) ** 2 * std**2
        centred = x - (1 - time) * mean
        modulation = context + self.condition(condition) + self.time(_time_features(t))
        hidden = self.project_in((centred / variance.sqrt()).flatten(1))
        for block in self.blocks:
            hidden = block(hidden, modulation)
        correction = self.project_out(hidden).view_as(x)
        skip = (time - (1 - time) * std**2) / variance
        return -mean + skip * centred + std / variance.sqrt() * correction

    def forward(self, batch: Batch, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared velocity errors of both branches, c = 1 and c = 0, with shared noise and time.

        Args:
            batch: B windows.
            noise: float32[B, horizon, action_dim].
            t: float32[B].

        Returns:
            Two tensors float32[B, horizon, action_dim]: ‖v(c) − (ε − a)‖² per element, c = 1 first.
        """
        chunk = self.transform.encode_actions(batch.actions, batch.states)
        context = self.encode(batch.frames, batch.states, batch.instructions)
        time = t[:, None, None]
        noisy = time * noise + (1 - time) * chunk
        condition = torch.tensor([1, 0], device=t.device).repeat_interleave(len(batch))
        velocity = self.velocity(context.repeat(2, 1), noisy.repeat(2, 1, 1), t.repeat(2), condition)
        errors = (velocity - (noise - chunk).repeat(2, 1, 1)).square()
        conditional, unconditional = errors.chunk(2)
        return conditional, unconditional

    @torch.no_grad()
    def act(
        self,
        frames: torch.Tensor,
        states: torch.Tensor,
        instructions: list[str],
        noise: torch.Tensor,
        guidance: float = 1.0,
        steps: int = 10,
    ) -> torch.Tensor:
        """Sample chunks of actions in the environment's units: float32[B, horizon, action_dim].

        Args:
            frames: uint8[B, 2, H, W, 3].
            states: float32[B, 8].
            instructions: one per row.
            noise: where the integration starts, float32[B, horizon, action_dim]; not modified.
            guidance: w in v = v₀ + w(v₁ − v₀): 0 is the unconditional mode, 1 the conditional, more extrapolates.
            steps: Euler steps.
        """
        context = self.encode(frames, states, instructions)
        x = noise
        for i in range(steps):
            t = torch.full((len(x),), 1.0 - i / steps, device=x.device)
            x = x - self.guided_velocity(context, x, t, guidance) / steps
        return self.transform.decode_actions(x, states)

    def guided_velocity(self, context: torch.Tensor, x: torch.Tensor, t: torch.Tensor, guidance: float) -> torch.Tensor:
        """v₀ + w(v₁ − v₀); at w = 0 and w = 1 only the one branch that matters is computed."""
        ones = torch.ones(len(x), dtype=torch.long, device=x.device)
        if guidance in (0.0, 1.0):
            return self.velocity(context, x, t, ones * int(guidance))
        both = self.velocity(context.repeat(2, 1), x.repeat(2, 1, 1), t.repeat(2), torch.cat([ones, ones * 0]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def sample_time(count: int, generator: torch.Generator) -> torch.Tensor:
    """Training times, π0's 0.999·Beta(1.5, 1) + 0.001: float32[count]. Beta(1.5, 1) has the inverse CDF u^(1/1.5)."""
    return 0.999 * torch.rand(count, generator=generator) ** (1 / 1.5) + 0.001


def shift_images(frames: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Augmentation: shift each row's frames (uint8[B, 2, H, W, 3]) by up to ``pixels``, repeating the border."""
    if pixels == 0:
        return frames
    size = frames.shape[2]
    offsets = torch.randint(-pixels, pixels + 1, (len(frames), 2, 2), generator=generator).to(frames.device)
    steps = torch.arange(size, device=frames.device)
    rows = (steps + offsets[..., :1]).clamp(0, size - 1)
    columns = (steps + offsets[..., 1:]).clamp(0, size - 1)
    batch = torch.arange(len(frames), device=frames.device)[:, None, None, None]
    camera = torch.arange(2, device=frames.device)[None, :, None, None]
    return frames[batch, camera, rows[..., :, None], columns[..., None, :]]


class _CameraEncoder(nn.Module):
    """Convolutions, then per channel where its activation is (spatial soft-max) and how strong."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.layers(image)
        height, width = maps.shape[-2:]
        weights = F.softmax(maps.flatten(2), dim=-1)
        rows = torch.linspace(-1, 1, height, device=maps.device).repeat_interleave(width)
        columns = torch.linspace(-1, 1, width, device=maps.device).repeat(height)
        strength = (weights * maps.flatten(2)).sum(-1)
        return torch.cat([(weights * rows).sum(-1), (weights * columns).sum(-1), strength], dim=1)


class _ModulatedBlock(nn.Module):
    """A residual layer whose normalised input is scaled and shifted by the context (FiLM)."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(context, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(F.silu(modulation)).chunk(2, dim=1)
        inner = self.norm(hidden) * (1 + scale) + shift
        return hidden + self.second(F.silu(self.first(inner)))


def _time_features(t: torch.Tensor) -> torch.Tensor:
    """Sine and cosine of t at 32 periods from 4e-3 to 4, as π0: float32[B, 64]."""
    periods = torch.logspace(math.log10(4e-3), math.log10(4.0), 32, device=t.device)
    angles = 2 * math.pi * t[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)

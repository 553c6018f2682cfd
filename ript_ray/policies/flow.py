"""A small flow-matching policy: pixels of the cameras, state and instruction → a chunk of 50 actions. Runs on a CPU.

Conventions follow π0: t = 1 is noise, x_t = t·ε + (1 − t)·a, the velocity target is ε − a, and sampling integrates
from t = 1 to t = 0 with Euler steps. A condition c ∈ {0, 1} serves classifier-free guidance (c = 1: "good").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ript_ray.policies.sampling import ChainStep, Explore, integrate, integrate_with_noise
from ript_ray.policies.transform import Transform

CAMERA_FEATURES = 128
"""Length of the vector that each camera's frame becomes."""


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Sizes of `FlowPolicy`."""

    horizon: int = 50
    action_dim: int = 7
    state_dim: int = 8
    cameras: int = 2
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
        self.cameras = nn.ModuleList(
            _CameraEncoder(config.channels, transform.image_size) for _ in range(config.cameras)
        )
        self.words = nn.EmbeddingBag(transform.vocabulary + 1, 32, padding_idx=transform.vocabulary)
        self.state = nn.Sequential(nn.Linear(config.state_dim, 64), nn.SiLU(), nn.Linear(64, 64), nn.LayerNorm(64))
        features = config.cameras * CAMERA_FEATURES + 64 + 32
        self.context = nn.Sequential(
            nn.Linear(features, config.context), nn.SiLU(), nn.Linear(config.context, config.context)
        )
        self.condition = nn.Embedding(2, config.context)
        self.time = nn.Linear(64, config.context)
        size = config.horizon * config.action_dim
        self.project_in = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(_ModulatedBlock(config.width, config.context) for _ in range(config.depth))
        self.project_out = nn.Linear(config.width, size)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        """Observation features, once per look: uint8[B, C, H, W, 3], float32[B, S] → float32[B, context]."""
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

        The network F predicts the clean chunk, â = μ + σ·F(x, t, context) with the demonstrations' mean μ and deviation
        σ, and the velocity follows from x_t = t·ε + (1 − t)·a:  v = ε̂ − â = (x − â)/t. A network that predicts v itself
        has to pass all of x through to cancel its noise, which a small one does badly: dimensions that should be still
        are not.

        Args:
            context: from `encode`, float32[B, context].
            x: noisy chunk, float32[B, horizon, action_dim].
            t: time in [0, 1], float32[B].
            condition: int64[B], 0 or 1.
        """
        modulation = context + self.condition(condition) + self.time(_time_features(t))
        hidden = self.project_in((x - self.chunk_mean).flatten(1))
        for block in self.blocks:
            hidden = block(hidden, modulation)
        clean = self.chunk_mean + self.chunk_std * self.project_out(hidden).view_as(x)
        return (x - clean) / t[:, None, None]

    @torch.no_grad()
    def act(
        self,
        frames: torch.Tensor,
        states: torch.Tensor,
        instructions: list[str],
        noise: torch.Tensor,
        guidance: float = 1.0,
        steps: int = 10,
        explore: Explore | None = None,
    ) -> tuple[torch.Tensor, ChainStep | None]:
        """Sample chunks of actions in the environment's units: float32[B, horizon, action_dim].

        Args:
            frames: uint8[B, C, H, W, 3].
            states: float32[B, S].
            instructions: one per row.
            noise: where the integration starts, float32[B, horizon, action_dim]; not modified.
            guidance: w in v = v₀ + w(v₁ − v₀): 0 is the unconditional mode, 1 the conditional, more extrapolates.
            steps: Euler steps.
            explore: makes one of the steps stochastic.

        Returns:
            The chunks, and the stochastic step if there was one.
        """
        context = self.encode(frames, states, instructions)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.guided_velocity(context, x, t, guidance)

        if explore is None:
            return self.transform.decode_actions(integrate(velocity, noise, steps), states), None
        x, chain = integrate_with_noise(velocity, noise, steps, explore)
        return self.transform.decode_actions(x, states), chain

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
    """Augmentation: shift each row's frames (uint8[B, C, H, W, 3]) by up to ``pixels``, repeating the border."""
    if pixels == 0:
        return frames
    cameras, size = frames.shape[1:3]
    offsets = torch.randint(-pixels, pixels + 1, (len(frames), cameras, 2), generator=generator).to(frames.device)
    steps = torch.arange(size, device=frames.device)
    rows = (steps + offsets[..., :1]).clamp(0, size - 1)
    columns = (steps + offsets[..., 1:]).clamp(0, size - 1)
    batch = torch.arange(len(frames), device=frames.device)[:, None, None, None]
    camera = torch.arange(cameras, device=frames.device)[None, :, None, None]
    return frames[batch, camera, rows[..., :, None], columns[..., None, :]]


class _CameraEncoder(nn.Module):
    """Convolutions to an eighth of the size, then one normalised vector that knows where things are."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        cells = (-(-image_size // 8)) ** 2
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * cells, CAMERA_FEATURES),
            nn.LayerNorm(CAMERA_FEATURES),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


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
    """Sine and cosine of t at 32 periods from 0.2 to 4: float32[B, 64].

    π0 goes down to 4e-3; with so little training such fast features only add noise between the ten sampled times.
    """
    periods = torch.logspace(math.log10(0.2), math.log10(4.0), 32, device=t.device)
    angles = 2 * math.pi * t[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)

"""A small flow-matching policy: pixels of the cameras, state and instruction → a chunk of 50 actions. Runs on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from ript_ray.policies.policy import Policy
from ript_ray.policies.stages import note
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


class FlowPolicy(Policy):
    """A small network of the velocity field.

    Args:
        config: sizes.
        transform: the observation and action transform, saved with the weights.
        chunk_mean: mean of the demonstrations' normalised chunks, float32[horizon, action_dim].
        chunk_std: their deviation, same shape.
    """

    kind = "flow"
    transform: Transform
    chunk_mean: torch.Tensor
    chunk_std: torch.Tensor

    def __init__(
        self, config: FlowConfig, transform: Transform, chunk_mean: torch.Tensor, chunk_std: torch.Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.horizon, self.action_dim = config.horizon, config.action_dim
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
        images = note("pixels", self.transform.encode_images(frames))
        words = note("tokens", self.transform.encode_instructions(instructions).to(states.device))
        words = torch.where(words < 0, self.transform.vocabulary, words)
        seen = [camera(images[:, i]) for i, camera in enumerate(self.cameras)]
        state = note("state", self.transform.encode_state(states))
        return note("prefix", self.context(torch.cat([*seen, self.state(state), self.words(words)], dim=1)))

    def conditioned(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """float32[B, context] → float32[n·B, context]."""
        return features.repeat(len(condition) // len(features), 1) + self.condition(condition)

    def velocity(self, conditioned: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v(x, t | observation, c): float32[N, horizon, action_dim].

        The network F predicts the clean chunk, â = μ + σ·F(x, t, context) with the demonstrations' mean μ and deviation
        σ, and the velocity follows from x_t = t·ε + (1 − t)·a:  v = ε̂ − â = (x − â)/t. A network that predicts v itself
        has to pass all of x through to cancel its noise, which a small one does badly: dimensions that should be still
        are not.
        """
        modulation = conditioned + self.time(_time_features(t))
        hidden = self.project_in((x - self.chunk_mean).flatten(1))
        for block in self.blocks:
            hidden = block(hidden, modulation)
        clean = self.chunk_mean + self.chunk_std * self.project_out(hidden).view_as(x)
        return (x - clean) / t[:, None, None]

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """t², which makes the loss the squared error of the clean chunk.

        Without it the smallest times, where this network's velocity is hardest to tell, would drown the rest.
        """
        return t.square()

    def describe(self) -> dict[str, Any]:
        return {"type": self.kind, "config": asdict(self.config), "transform": self.transform.to_json()}

    @classmethod
    def new(cls, transform: Transform, chunk_mean: torch.Tensor, chunk_std: torch.Tensor, cameras: int) -> Self:
        horizon, action_dim = chunk_mean.shape
        sizes = FlowConfig(horizon, action_dim, state_dim=len(transform.state_mean), cameras=cameras)
        return cls(sizes, transform, chunk_mean, chunk_std)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        config = FlowConfig(**description["config"])
        mean, std = torch.zeros(2, config.horizon, config.action_dim).unbind()
        return cls(config, Transform.from_json(description["transform"]), mean.clone(), std.clone())


class _CameraEncoder(nn.Module):
    """Convolutions to an eighth of the size, then one normalised vector that knows where things are."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        cells = (-(-(image_size // 4) // 2)) ** 2
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

"""What every flow-matching policy offers, whatever its network is: velocities for training, chunks for acting.

Conventions follow π0: t = 1 is noise, x_t = t·ε + (1 − t)·a, the velocity target is ε − a, and sampling integrates
from t = 1 to t = 0 with Euler steps. A condition c ∈ {0, 1} serves classifier-free guidance (c = 1: "good").
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ript_ray.errors import UserError
from ript_ray.policies.integration import ChainStep, Explore, integrate, integrate_with_noise
from ript_ray.policies.stages import note
from ript_ray.policies.transform import Normalisation, Transform


class Policy(nn.Module, abc.ABC):
    """The velocity field v(x_t, t | observation, c) and its sampler.

    A subclass says what is computed how often: `encode` once for an observation, `conditioned` once for an observation
    and a condition, `velocity` at each noise and time.
    """

    kind: ClassVar[str]
    """Name of the architecture, ``type`` in ``policy.json``."""
    transform: Normalisation
    """Between environments and the network; saved with the weights."""
    horizon: int
    """T: actions in a chunk."""
    action_dim: int
    """D: numbers in each action of the noise; at least as many as the environment's."""

    @property
    def conditional(self) -> bool:
        """Can it be told c? Without, guidance compares equals."""
        return True

    @abc.abstractmethod
    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> Any:
        """Features of B observations that depend neither on the condition nor on noise or time.

        Args:
            frames: uint8[B, C, H, W, 3].
            states: float32[B, S].
            instructions: one per row.
        """

    @abc.abstractmethod
    def conditioned(self, features: Any, condition: torch.Tensor) -> Any:
        """Features at conditions, for `velocity`.

        Args:
            features: of B observations, from `encode`.
            condition: int64[n·B], 0 or 1, for n copies of the B rows.
        """

    @abc.abstractmethod
    def velocity(self, conditioned: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v(x, t | observation, c): float32[N, T, D].

        Args:
            conditioned: N rows, from `conditioned`.
            x: noisy chunks, float32[N, T, D].
            t: times in (0, 1], float32[N].
        """

    def keeps_exact(self, name: str) -> bool:
        """Must this tensor stay in float32 when actors act in less precision? All of a small policy must."""
        return True

    def compile_step(self, mode: str = "default") -> None:
        """Fuse the Euler step; weights may be changed in place later. ``mode`` is one of ``torch.compile``'s."""
        self.velocity = torch.compile(self.velocity, mode=mode, dynamic=False)  # type: ignore[method-assign]

    def without_numbers(self) -> None:
        """From now on only sizes count, as where fake tensors tell what an update would take: nothing may read a number
        of a tensor.
        """

    def checkpoint_activations(self) -> None:
        """Compute layers again in the backward pass instead of keeping their activations."""
        raise UserError(f"train.checkpoint_activations: a policy of type {self.kind!r} is too small to need it")

    def shardable(self) -> list[nn.Module]:
        """Parts that are only ever called as modules; learners that divide the weights gather them one at a time."""
        return []

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) of the flow-matching loss w(t)·(v − u)²: float32[B]; 1, as in π0."""
        return torch.ones_like(t)

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What `from_description` needs besides the weights, as plain values for JSON."""

    @classmethod
    @abc.abstractmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """The policy with weights that are yet to be loaded."""

    @classmethod
    def new(cls, transform: Transform, chunk_mean: torch.Tensor, chunk_std: torch.Tensor, cameras: int) -> Self:
        """A fresh one for demonstrations.

        Args:
            transform: by their statistics; as many numbers as they have, too.
            chunk_mean: mean of their normalised chunks, float32[T, A].
            chunk_std: deviation of their normalised chunks, float32[T, A].
            cameras: C, in each of their frames.

        Raises:
            UserError: for architectures that do not start from nothing.
        """
        raise UserError(f"a policy of type {cls.kind!r} does not start from nothing; name one to go on from: sft.init")

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
        """Sample chunks of actions in the environment's units: float32[B, T, A].

        Args:
            frames: uint8[B, C, H, W, 3].
            states: float32[B, S].
            instructions: one per row.
            noise: where the integration starts, float32[B, T, D]; not modified.
            guidance: w in v = v₀ + w(v₁ − v₀): 0 is the unconditional mode, 1 the conditional, more extrapolates.
            steps: Euler steps.
            explore: makes one of the steps stochastic.

        Returns:
            The chunks, and the stochastic step if there was one.
        """
        note("frames", frames)
        conditioned = self.guided(self.encode(frames, states, instructions), len(noise), guidance)
        note("noise", noise)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            note("noisy chunk", x)
            return note("velocity", self.guided_velocity(conditioned, x, note("time", t), guidance))

        if explore is None:
            return self.transform.decode_actions(note("raw action", integrate(velocity, noise, steps)), states), None
        x, chain = integrate_with_noise(velocity, noise, steps, explore)
        return self.transform.decode_actions(note("raw action", x), states), chain

    def guided(self, features: Any, rows: int, guidance: float) -> Any:
        """Features at the conditions that `guided_velocity` needs; at w = 0 and w = 1 only one branch matters."""
        device = next(self.parameters()).device
        branches = (guidance,) if guidance in (0.0, 1.0) else (1, 0)
        condition = torch.cat([torch.full((rows,), int(branch), device=device) for branch in branches])
        return self.conditioned(features, condition)

    def guided_velocity(self, conditioned: Any, x: torch.Tensor, t: torch.Tensor, guidance: float) -> torch.Tensor:
        """v₀ + w(v₁ − v₀), both branches in one pass: float32[B, T, D]; ``conditioned`` comes from `guided`."""
        if guidance in (0.0, 1.0):
            return self.velocity(conditioned, x, t)
        good, unconditional = self.velocity(conditioned, x.repeat(2, 1, 1), t.repeat(2)).chunk(2)
        return unconditional + guidance * (good - unconditional)


def sample_time(count: int, generator: torch.Generator) -> torch.Tensor:
    """Training times, π0's 0.999·Beta(1.5, 1) + 0.001: float32[count]. Beta(1.5, 1) has the inverse CDF u^(1/1.5)."""
    return 0.999 * torch.rand(count, generator=generator) ** (1 / 1.5) + 0.001


def draw_shifts(count: int, cameras: int, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """By how much each of ``count`` rows' frames are shifted, down and right: int64[count, C, 2], up to ``pixels``."""
    return torch.randint(-pixels, pixels + 1, (count, cameras, 2), generator=generator)


def shift_images(frames: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Augmentation: frames (uint8[B, C, H, W, 3]) shifted by `draw_shifts`, repeating the border."""
    cameras, height, width = frames.shape[1:4]
    offsets = shifts.to(frames.device)
    rows = (torch.arange(height, device=frames.device) + offsets[..., :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=frames.device) + offsets[..., 1:]).clamp(0, width - 1)
    batch = torch.arange(len(frames), device=frames.device)[:, None, None, None]
    camera = torch.arange(cameras, device=frames.device)[None, :, None, None]
    return frames[batch, camera, rows[..., :, None], columns[..., None, :]]

"""What an objective is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ript_ray.config import ObjectiveConfig
from ript_ray.policies.integration import log_prob_under
from ript_ray.policies.transform import Normalisation
from ript_ray.types import Batch


class VelocityModel(Protocol):
    """What objectives need of a policy (see `ript_ray.policies.policy.Policy`)."""

    @property
    def transform(self) -> Normalisation:
        """Between the environment's actions and the network's."""
        ...

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> Any:
        """Features of B observations."""
        ...

    def conditioned(self, features: Any, condition: torch.Tensor) -> Any:
        """The same at conditions, for n copies of the B rows."""
        ...

    def velocity(self, conditioned: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v(x, t | observation, c): float32[N, T, D]."""
        ...

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """How much an error of the velocity counts at time t: float32[B]."""
        ...


@dataclass(slots=True)
class Loss:
    """What an objective returns: one value per sample, so that micro-batches of any size add up to the batch."""

    per_sample: torch.Tensor
    """float32[B]; the gradient flows through it."""
    diagnostics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Named values per sample, float32[B]; their means over the update are logged as ``learner/<name>``."""


class Objective(Protocol):
    """A loss for one micro-batch.

    ``objective(draw, settings)`` asks ``draw`` for velocities, errors or log-probabilities and weighs them with
    ``draw.batch.advantages`` (leave-one-out, as they are) or ``draw.batch.weights`` (processed as configured).
    """

    def __call__(self, draw: Draw, settings: ObjectiveConfig) -> Loss:
        """The loss of each sample."""
        ...


class Draw:
    """A micro-batch at its drawn noise and times, and the questions that an objective may ask of policies about it.

    Args:
        policy: is trained; gradients flow.
        batch: B windows.
        noise: ε, float32[B, T, D].
        time: t, float32[B].
        chance: a uniform random number for each sample, float32[B].
        reference: the policy before this update, frozen; only for objectives that compare with it.
    """

    def __init__(
        self,
        policy: VelocityModel,
        batch: Batch,
        noise: torch.Tensor,
        time: torch.Tensor,
        chance: torch.Tensor,
        reference: VelocityModel | None = None,
    ) -> None:
        self.batch = batch
        self.time = time
        self.chance = chance
        self._policy = policy
        self._reference = reference
        steps = noise.shape[1]
        self._valid = batch.valid[:, :steps]
        clean = policy.transform.encode_actions(batch.actions[:, :steps], batch.states)
        t = time[:, None, None]
        self._noisy = t * noise + (1 - t) * clean
        self.target = noise - clean
        """u = ε − a: float32[B, T, D]."""
        self._weight = policy.error_weight(time)[:, None, None]
        self._encoded: Any = None

    def velocity(self, *conditions: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
        """v(x_t, t | c) for each of the conditions, in one pass: float32[B, T, D] each."""
        return self._velocity(self._policy, self._features(), conditions)

    def reference_velocity(self, *conditions: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
        """The same of the frozen policy, without gradients.

        Raises:
            ValueError: when no reference was given.
        """
        if self._reference is None:
            raise ValueError("this objective compares with the policy before the update, which was not given")
        with torch.no_grad():
            return self._velocity(self._reference, self._encode(self._reference), conditions)

    def change_since(self, anchor: VelocityModel) -> torch.Tensor:
        """w(t)·(v − v_anchor)² of both branches, averaged over elements and branches: float32[B]."""
        with torch.no_grad():
            old = self._velocity(anchor, self._encode(anchor), (1, 0))
        new = self._velocity(self._policy, self._features(), (1, 0))
        changes = [self.mean(self._weight * (n - o).square()) for n, o in zip(new, old, strict=True)]
        return (changes[0] + changes[1]) / 2

    def errors(self, velocity: torch.Tensor) -> torch.Tensor:
        """Flow-matching loss ℓ = w(t)·(v − u)² per element, w being the policy's own weight: float32[B, T, D]."""
        return self._weight * (velocity - self.target).square()

    def mean(self, elements: torch.Tensor) -> torch.Tensor:
        """Mean over action dimensions and valid steps: float32[B, T, D] → float32[B]."""
        steps = self._valid.to(elements)
        return (elements.mean(-1) * steps).sum(1) / steps.sum(1).clamp_min(1.0)

    def chain_log_prob(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of the stochastic step by which each sample was made, now and then, of c = 1.

        Sums over the environment's action dimensions and over those steps that were executed: float32[B] each.

        Raises:
            ValueError: when the samples were made without one.
        """
        chain = self.batch.chain
        if chain is None:
            raise ValueError("these samples were made without a stochastic step; set policy.explore, for example 0.5")
        ones = torch.ones(len(self.batch), dtype=torch.long, device=self.time.device)
        conditioned = self._policy.conditioned(self._features(), ones)
        real = len(self._policy.transform.action_mean)
        now = log_prob_under(self._policy.velocity(conditioned, chain.x, chain.time).float(), chain, real)
        executed = (torch.arange(now.shape[1], device=now.device) < chain.executed[:, None]) & self._valid
        return (now * executed).sum(1), (chain.log_prob * executed).sum(1)

    def _features(self) -> Any:
        if self._encoded is None:
            self._encoded = self._encode(self._policy)
        return self._encoded

    def _encode(self, policy: VelocityModel) -> Any:
        return policy.encode(self.batch.frames, self.batch.states, self.batch.instructions)

    def _velocity(
        self, policy: VelocityModel, features: Any, conditions: tuple[torch.Tensor | int, ...]
    ) -> tuple[torch.Tensor, ...]:
        size, count = len(self.batch), len(conditions)
        filled = [
            torch.full((size,), c, device=self.time.device) if isinstance(c, int) else c.long() for c in conditions
        ]
        conditioned = policy.conditioned(features, torch.cat(filled))
        return (
            policy.velocity(conditioned, self._noisy.repeat(count, 1, 1), self.time.repeat(count)).float().chunk(count)
        )

"""What flows through the system: contexts, trajectories, windows, batches, with shapes and units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from ript_ray.policies.integration import ChainStep

Start = tuple[str, int | None, int | None]
"""Where episodes start: the task and its initial state, or, without one, the seed by which objects are placed."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where an episode starts. Equal contexts start in the same simulator state and draw the same policy noise."""

    env_id: str
    init_state: int | None
    """Index of the benchmark's initial state, 0 to 49; None: objects are placed at random."""
    seed: int
    """Seeds the policy's noise, and the environment's reset unless ``placement`` does."""
    placement: int | None = None
    """Seeds the environment's reset, for rollouts that differ in the policy's noise alone; without an initial state
    the arm is disturbed, too, as it is in the benchmark's initial states."""

    @property
    def start(self) -> Start:
        """What it shares with other contexts that start in the same simulator state."""
        return self.env_id, self.init_state, None if self.init_state is not None else self._env_seed

    def reset_arguments(self) -> dict[str, Any]:
        """What to call an environment's `reset` with."""
        disturb = self.init_state is None and self.placement is not None
        return {"seed": self._env_seed, "options": {"init_state": self.init_state, "disturb_arm": disturb}}

    @property
    def _env_seed(self) -> int:
        return self.seed if self.placement is None else self.placement


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One episode of L control steps. Arrays are stored once; windows and frames are views and tickets into them."""

    context: Context
    policy_version: int
    """Weights version that acted, 0 for the starting policy, −1 for a scripted expert."""
    success: bool
    actions: np.ndarray
    """What was executed, in the environment's units: float32[L, A], for arms A = 7."""
    labels: np.ndarray | None = None
    """What to imitate where it differs from what was executed (an expert's clean actions): float32[L, A]."""
    states: np.ndarray
    """Proprioception before each action: float32[L, S], for arms S = 8."""
    frames: np.ndarray
    """Rendered frames of all C cameras (agentview and wrist for arms): uint8[n, C, H, W, 3]."""
    frame_steps: np.ndarray
    """The step before which each frame was seen, ascending: int32[n]."""
    tickets: dict[str, np.ndarray]
    """What the frames before each action depend on, by name (see `ript_ray.envs.world.Ticket`): [L, …]."""
    scene: dict[str, np.ndarray]
    """What they all depend on, by name: constant over the episode."""
    state_hashes: np.ndarray
    """Fingerprint of the simulator before each action and at the end: uint64[L + 1]."""
    instruction: str
    chain: dict[str, np.ndarray] = field(default_factory=dict)
    """The stochastic step of each look's chunk, if there was one (see `ChainStep`): [n, …] by field."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time spent in ``physics``, ``render`` and ``inference``."""
    frames_rendered: int = 0
    """Images that were rendered while it was played."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def reward(self) -> float:
        """1 for success, 0 for failure."""
        return float(self.success)

    @property
    def nbytes(self) -> int:
        """Raw bytes of all arrays."""
        values = [getattr(self, f.name) for f in fields(self)]
        arrays = [*values, *self.tickets.values(), *self.scene.values(), *self.chain.values()]
        return sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))

    def ticket(self, step: int) -> dict[str, np.ndarray]:
        """All that the frames before ``step`` depend on."""
        return {name: rows[step] for name, rows in self.tickets.items()} | self.scene


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """What it takes to play an episode again and to tell whether it went the same way."""

    context: Context
    policy_version: int
    success: bool
    max_steps: int
    image_size: int
    actions: np.ndarray
    """float32[L, A]"""
    state_hashes: np.ndarray
    """uint64[L + 1]"""
    acting: dict[str, float] = field(default_factory=dict)
    """Settings of ``policy`` that say how it acted; none where that is not known."""

    @classmethod
    def of(cls, trajectory: Trajectory, max_steps: int, acting: dict[str, float] | None = None) -> EpisodeRecord:
        """The record of a trajectory."""
        t = trajectory
        size = int(t.frames.shape[2])
        return cls(t.context, t.policy_version, t.success, max_steps, size, t.actions, t.state_hashes, acting or {})


@dataclass(frozen=True, slots=True)
class EpisodeReport:
    """What one needs to know of a trajectory to decide about it, without its bytes."""

    context: Context
    policy_version: int
    success: bool
    length: int
    frame_steps: np.ndarray
    nbytes: int
    seconds: dict[str, float]
    frames: int
    """Frames rendered."""
    cameras: int
    weights_wait_s: float
    """Time spent pulling newer weights before the episode."""

    @property
    def eager_frames(self) -> int:
        """Frames that rendering every step would have taken."""
        return self.cameras * (self.length + 1)

    @classmethod
    def of(cls, trajectory: Trajectory, weights_wait_s: float = 0.0) -> EpisodeReport:
        """The report of a trajectory."""
        return cls(
            context=trajectory.context,
            policy_version=trajectory.policy_version,
            success=trajectory.success,
            length=len(trajectory),
            frame_steps=trajectory.frame_steps,
            nbytes=trajectory.nbytes,
            seconds=trajectory.seconds,
            frames=trajectory.frames_rendered,
            cameras=int(trajectory.frames.shape[1]),
            weights_wait_s=weights_wait_s,
        )


@dataclass(frozen=True, slots=True)
class Window:
    """A training sample as an index: the actions from ``start`` on, of one trajectory of the pool."""

    trajectory: int
    """Identifier of the trajectory in its pool."""
    start: int
    """First step of the window; the policy saw the observation before this step."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """B windows, gathered for one micro-batch."""

    frames: torch.Tensor
    """uint8[B, C, H, W, 3]"""
    states: torch.Tensor
    """float32[B, S]"""
    actions: torch.Tensor
    """float32[B, 50, A], in the environment's units."""
    valid: torch.Tensor
    """bool[B, 50]: False where the trajectory had ended (padding)."""
    advantages: torch.Tensor
    """Leave-one-out, within the group or the task, float32[B]; 0 for what is neither good nor bad."""
    weights: torch.Tensor
    """Advantages as processed for the objective: float32[B]."""
    versions: torch.Tensor
    """Of the weights that played each: int64[B]."""
    instructions: list[str]
    chain: ChainStep | None = None
    """The stochastic steps by which the chunks were sampled, where every window has one."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> Batch:
        return self._with(lambda value: None if value is None else value[rows])

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._with(lambda value: value.to(device) if hasattr(value, "to") else value)

    def _with(self, change: Callable[[Any], Any]) -> Batch:
        return Batch(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout that is trained on, or a demonstration."""

    report: EpisodeReport
    trajectory: Any
    """Itself, or its object reference."""
    advantage: float
    """Leave-one-out within its group; 1 for a demonstration, which is always good."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one learner trains on in one step of the loop."""

    step: int
    trajectories: dict[int, Any]
    """Themselves, or their object references, by identifier."""
    advantages: dict[int, float]
    """Leave-one-out, within the group or the task; 0 for what is neither good nor bad."""
    weights: dict[int, float]
    """Advantages as processed for the objective."""
    windows: np.ndarray
    """All windows as (trajectory, start): int32[N, 2]."""
    order: np.ndarray
    """Rows of ``windows`` of each optimiser step of this rank: int32[steps, batch_size / world]."""
    batch_size: int
    """Windows of all ranks together in one optimiser step."""
    rendered: tuple[FrameBatch, ...] = ()
    """Frames made for training, in the order of their first use."""


@dataclass(frozen=True, slots=True)
class Finished:
    """In the place of a shard: there will be no more, since the goal is reached."""


@dataclass(frozen=True, slots=True, eq=False)
class FrameBatch:
    """Frames that are made, or will be, for windows of a shard."""

    job: FrameJob
    reference: list[Any]
    """Object reference of the frames, uint8[n, C, H, W, 3] in the order of the job's keys, in a list of one."""


@dataclass(frozen=True, slots=True)
class FrameJob:
    """Frames to be made, all of one task."""

    env_id: str
    parts: tuple[tuple[int, list[Any], tuple[int, ...]], ...]
    """Trajectory's identifier, its object reference in a list of one, and the steps."""

    @property
    def keys(self) -> tuple[tuple[int, int], ...]:
        """Trajectory and step of each frame, in the order in which they are made."""
        return tuple((identifier, step) for identifier, _, steps in self.parts for step in steps)

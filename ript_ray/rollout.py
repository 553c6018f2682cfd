"""Playing episodes: a policy or a scripted expert acts in an environment, and a trajectory comes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ript_ray.envs.world import LazyObservation, World
from ript_ray.policies.acting import Acting
from ript_ray.policies.integration import ChainStep, Explore
from ript_ray.policies.policy import Policy
from ript_ray.types import Context, Trajectory


class Recorder:
    """Collects what happens in one episode and makes a `Trajectory` of it."""

    def __init__(self, env: World, context: Context) -> None:
        self._env = env
        self._context = context
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in ("actions", "labels", "states", "frames")}
        self._tickets: dict[str, list[np.ndarray]] = {}
        self._chain: dict[str, list[np.ndarray]] = {}
        self._scene = dict(env.scene())
        self._hashes: list[int] = []
        self._frame_steps: list[int] = []
        self._started = env.physics_seconds, env.render_seconds
        self.inference_seconds = 0.0
        """Time the policy took; the caller adds to it."""

    def look(self, observation: LazyObservation) -> np.ndarray:
        """Render all cameras before the coming step and keep the frames: uint8[C, H, W, 3]."""
        frames = np.stack([observation[camera] for camera in self._env.cameras])
        self._columns["frames"].append(frames)
        self._frame_steps.append(len(self._columns["actions"]))
        return frames

    def add(self, observation: LazyObservation, action: np.ndarray, label: np.ndarray | None = None) -> None:
        """Record one step: what was seen before it and what was done."""
        columns = self._columns
        self._hashes.append(self._env.state_hash())
        columns["states"].append(observation["state"])
        for name, value in observation.ticket.items():
            if name not in self._scene:
                self._tickets.setdefault(name, []).append(value)
        columns["actions"].append(np.asarray(action, dtype=np.float32))
        if label is not None:
            columns["labels"].append(np.asarray(label, dtype=np.float32))

    def add_chain(self, chain: ChainStep) -> None:
        """Record the stochastic step of the chunk that the newest look led to."""
        for f in fields(chain):
            self._chain.setdefault(f.name, []).append(getattr(chain, f.name)[0].cpu().numpy())

    def finish(self, success: bool, policy_version: int) -> Trajectory:
        """The whole episode."""
        stacked: dict[str, Any] = {name: np.stack(rows) if rows else None for name, rows in self._columns.items()}
        physics, render = self._started
        return Trajectory(
            context=self._context,
            policy_version=policy_version,
            success=success,
            instruction=self._env.instruction,
            frame_steps=np.array(self._frame_steps, dtype=np.int32),
            tickets={name: np.stack(rows) for name, rows in self._tickets.items()},
            scene=self._scene,
            chain={name: np.stack(rows) for name, rows in self._chain.items()},
            state_hashes=np.array([*self._hashes, self._env.state_hash()], dtype=np.uint64),
            seconds={
                "physics": self._env.physics_seconds - physics,
                "render": self._env.render_seconds - render,
                "inference": self.inference_seconds,
            },
            **stacked,
        )


def play(env: World, policy: Policy, context: Context, acting: Acting, *, policy_version: int) -> Trajectory:
    """Run one episode with a policy.

    The policy looks once per chunk and executes its first actions. Its noise depends on the context and the position in
    the episode alone, so two policies can be compared on the same draws. Stochastic steps are recorded, and actions
    with their noise.
    """
    execute = acting.execute
    observation, _ = env.reset(**context.reset_arguments())
    recorder = Recorder(env, context)
    generator = torch.Generator().manual_seed(context.seed)
    device = next(policy.parameters()).device
    shape = (1, policy.horizon, policy.action_dim)
    real = len(policy.transform.action_mean)
    stochastic = Explore(acting.explore, execute, generator, real) if acting.explore > 0 else None
    # The last chunk may be cut short by the step limit.
    disturbance = acting.noise(env.max_steps + execute, env.action_dim, context.seed)
    success = over = False
    while not over:
        frames = torch.from_numpy(recorder.look(observation))[None].to(device)
        started = time.perf_counter()
        state = torch.from_numpy(observation["state"])[None].to(device)
        noise = torch.randn(shape, generator=generator).to(device)
        chunk, chain = policy.act(
            frames, state, [env.instruction], noise, acting.guidance, acting.denoise_steps, stochastic
        )
        now = env.elapsed_steps
        meant = chunk[0, :execute].cpu().numpy()
        actions = np.clip(meant + disturbance[now : now + len(meant)], -1.0, 1.0)
        if chain is not None:
            recorder.add_chain(chain)
        recorder.inference_seconds += time.perf_counter() - started
        for action in actions:
            recorder.add(observation, action)
            observation, _, success, truncated, _ = env.step(action)
            over = success or truncated
            if over:
                break
    return recorder.finish(success, policy_version)


def render_steps(env: World, trajectory: Trajectory, steps: Sequence[int]) -> np.ndarray:
    """The frames before these steps, byte-identical to what the policy would have seen there: uint8[n, C, H, W, 3]."""
    return np.stack(
        [np.stack([env.render_ticket(trajectory.ticket(step), camera) for camera in env.cameras]) for step in steps]
    )


def film(env: World, trajectory: Trajectory, every: int, size: int) -> np.ndarray:
    """The first camera's view before every ``every``-th step, upright: uint8[n, size, size, 3]."""
    steps = range(0, len(trajectory), every)
    frames = np.stack([env.render_ticket(trajectory.ticket(step), env.cameras[0], size) for step in steps])
    return frames[:, :, ::-1] if env.frames_are_mirrored else frames

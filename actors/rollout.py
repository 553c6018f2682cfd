"""Rollout actors: each owns one environment and one inference-only policy copy."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from ript_ray.config import Config
from ript_ray.policies.checkpoints import build_policy
from ript_ray.policies.flow import FlowPolicy
from ript_ray.types import Context, Trajectory


@dataclass(frozen=True, slots=True)
class EpisodeReport:
    """What the coordinator and the pool need to know of a trajectory, without its bytes."""

    context: Context
    policy_version: int
    success: bool
    length: int
    frame_steps: np.ndarray
    nbytes: int
    seconds: dict[str, float]
    weights_wait_s: float
    """Time spent pulling newer weights before the episode."""


@ray.remote(max_restarts=-1, max_task_retries=0)
class RolloutActor:
    """Plays one episode per call. The caller owns the trajectory, so the actor's death loses only what it runs.

    Args:
        index: shown in names and logs.
        config: the whole configuration.
        description: of the policy, see `build_policy`.
        store: name of the `WeightStore`; None for an actor that only demonstrates.
    """

    def __init__(self, index: int, config: Config, description: dict[str, Any], store: str | None) -> None:
        torch.set_num_threads(1)
        from ript_ray.envs import make  # imports the simulator, in this process only

        self._index = index
        self._config = config
        self._description = description
        # By name: a handle among the arguments could be gone when Ray starts this actor again.
        self._store = ray.get_actor(store) if store else None
        self._env = make(config.env.id, config.env.image_size, config.env.max_steps)
        self._device = torch.device("cuda" if config.scaling.actor_gpus > 0 else "cpu")
        self._policy: FlowPolicy | None = None
        self._version = -1

    def __repr__(self) -> str:
        return f"RolloutActor{self._index}"

    def collect(self, context: Context, guidance: float) -> tuple[EpisodeReport, Trajectory]:
        """Play one episode with the newest weights. Call with ``num_returns=2``."""
        from ript_ray.rollout import play

        started = time.perf_counter()
        policy = self._pull()
        waited = time.perf_counter() - started
        trajectory = play(
            self._env,
            policy,
            context,
            policy_version=self._version,
            execute=self._config.policy.execute,
            denoise_steps=self._config.policy.denoise_steps,
            guidance=guidance,
        )
        return make_report(trajectory, trajectory.seconds, waited), trajectory

    def render_all(self, trajectory: Trajectory) -> tuple[EpisodeReport, Trajectory]:
        """The same trajectory with a frame before every step; those that exist are kept."""
        from ript_ray.rollout import render_missing

        complete = render_missing(self._env, trajectory)
        seconds = {"render": complete.seconds["render"] - trajectory.seconds["render"]}
        return make_report(complete, seconds, weights_wait_s=0.0), complete

    def film(self, trajectory: Trajectory) -> np.ndarray:
        """The upright third-person view at every other step: uint8[n, 256, 256, 3]."""
        from ript_ray.rollout import film

        return film(self._env, trajectory, every=2, size=256)

    def demonstrate(self, context: Context) -> Trajectory:
        """One demonstration by the scripted expert."""
        from ript_ray.data.demos import demonstrate

        return demonstrate(self._env, context, self._config.demos)

    def renderer(self) -> str:
        """The OpenGL backend in use."""
        return os.environ["MUJOCO_GL"]

    def _pull(self) -> FlowPolicy:
        """Adopt newer weights if there are any. CPU parameters are views into the node's shared object."""
        if self._store is None:
            raise RuntimeError("this actor was started without a weight store")
        found = ray.get(self._store.newest.remote(self._version), timeout=self._config.scaling.wait_timeout_s)
        if found is not None:
            version, (reference,) = found
            arrays = ray.get(reference, timeout=self._config.scaling.wait_timeout_s)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")
                weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self._policy = build_policy(self._description, weights, share=True).to(self._device)
            self._policy.requires_grad_(False)
            self._version = version
        if self._policy is None:
            raise RuntimeError("no weights were published before the first episode")
        return self._policy


def make_report(trajectory: Trajectory, seconds: dict[str, float], weights_wait_s: float) -> EpisodeReport:
    """The report of a trajectory."""
    return EpisodeReport(
        context=trajectory.context,
        policy_version=trajectory.policy_version,
        success=trajectory.success,
        length=len(trajectory),
        frame_steps=trajectory.frame_steps,
        nbytes=trajectory.nbytes,
        seconds=seconds,
        weights_wait_s=weights_wait_s,
    )

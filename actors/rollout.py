"""Rollout actors: each owns one environment and one inference-only policy copy."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.home import Home
from actors.weights import PolicyCopy
from ript_ray.config import Config
from ript_ray.envs import World, make
from ript_ray.envs.current import CurrentWorld
from ript_ray.envs.rendering import choose, describe_renderer
from ript_ray.footprint import check_gpu_share
from ript_ray.policies.acting import Acting
from ript_ray.policies.checkpoints import empty_policy
from ript_ray.policies.starting import check_world
from ript_ray.types import Context, EpisodeRecord, EpisodeReport, FrameJob, Trajectory
from ript_ray.watchdog import Watchdog

_WARM_UP_TIMEOUT_S = 300.0
"""Longest time to make an environment: the first one on a machine compiles its model and this project's code."""
_MAX_RESTARTS = 1000
"""Of one actor by Ray: a process that dies whenever it starts must not be started for days. Enough for one that dies
now and then; when the last actor is gone for good, the driver starts all anew."""


@ray.remote(max_restarts=_MAX_RESTARTS, max_task_retries=0)
class RolloutActor:
    """Plays one episode per call. The caller owns the trajectory, so the actor's death loses only what it runs.

    A `Watchdog` ends the process when one reset, step or frame takes too long or memory grows too large; Ray then
    starts it again, and `awake` tells why.

    Args:
        index: shown in names and logs.
        config: the whole configuration.
        description: of the policy, see `build_policy`.
        store: name of the `WeightStore`; None for an actor that only demonstrates.
    """

    def __init__(self, index: int, config: Config, description: dict[str, Any], store: str | None) -> None:
        torch.set_num_threads(1)
        self._index = index
        self._config = config
        name = f"ript_ray-{ray.get_runtime_context().get_actor_id()}.end"
        self._watchdog = Watchdog(Path(tempfile.gettempdir()) / name, 1e3 * config.scaling.actor_memory_gb)
        self._current = CurrentWorld(self._make)
        device = torch.device("cuda" if config.scaling.actor_gpus > 0 else "cpu")
        limit = config.scaling.wait_timeout_s
        fused = config.policy.compiled
        self._description = description
        self._policy = PolicyCopy(store, description, device, limit, fused) if store is not None else None
        if device.type == "cuda" and store is not None:
            memory = torch.cuda.get_device_properties(0).total_memory
            check_gpu_share(empty_policy(description), config, float(memory))
        ids = config.env.ids
        try:
            choose(os.environ.get("CUDA_VISIBLE_DEVICES") if config.scaling.actor_gpus > 0 else None)
            # At the first start mistakes show at once. Later, a task that crashes must not take the others with it.
            if self._watchdog.earlier is None:
                self._enter(ids[index % len(ids)])
        except Exception as error:
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise
            # It was there, so it may be again: Ray starts a process again that has ended, not one that has raised.
            self._watchdog.end(f"it could not start again: {error}")

    def __repr__(self) -> str:
        return f"RolloutActor{self._index}"

    def collect(
        self, context: Context, guidance: float, exploring: bool, file: Path | None, home: Home | None
    ) -> tuple[EpisodeReport, Trajectory]:
        """Play one episode with the newest weights and write it to ``file``. Call with ``num_returns=2``."""
        from ript_ray.data.storage import save_episode
        from ript_ray.rollout import play

        if self._policy is None:
            raise RuntimeError("this actor was started without a weight store")
        acting = Acting.of(self._config.policy, guidance, exploring)
        try:
            world = self._enter(context.env_id)
            frames = world.frames_rendered
            started = time.perf_counter()
            policy = self._policy.pull()
            waited = time.perf_counter() - started
            trajectory = play(world, policy, context, acting, policy_version=self._policy.version)
        except OSError as error:
            if isinstance(error, ray.exceptions.RayError):
                raise
            # Of the simulator, not of this process's disk or connections, for which the job would start again.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            if not isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) and "CUDA" not in str(error):
                raise
            # Not the environment's fault. After some errors CUDA does nothing more in a process; a new one may have to
            # wait for memory, but not for that.
            self._watchdog.end(f"the GPU failed it: {error}")
        trajectory.frames_rendered = world.frames_rendered - frames
        if file is not None and home is not None:  # before anyone hears of it: what is finished is not lost
            with home.writing(file) as place:
                save_episode(place, EpisodeRecord.of(trajectory, world.max_steps, asdict(acting)), trajectory)
        return EpisodeReport.of(trajectory, waited), trajectory

    def render(self, job: FrameJob) -> np.ndarray:
        """The frames of a job, in the order of its keys: uint8[n, C, H, W, 3]."""
        from ript_ray.rollout import render_steps

        world = self._enter(job.env_id)
        limit = self._config.scaling.wait_timeout_s
        return np.concatenate(
            [render_steps(world, ray.get(reference, timeout=limit), steps) for _, (reference,), steps in job.parts]
        )

    def film(self, trajectory: Trajectory, every: int = 2, size: int = 256) -> np.ndarray:
        """The upright view of the first camera before every ``every``-th step: uint8[n, size, size, 3]."""
        from ript_ray.rollout import film

        return film(self._enter(trajectory.context.env_id), trajectory, every, size)

    def demonstrate(self, context: Context) -> Trajectory:
        """One demonstration by the scripted expert."""
        from ript_ray.data.demonstrator import demonstrate

        return demonstrate(self._enter(context.env_id), context, self._config.demos)

    def awake(self) -> str | None:
        """Returns once the actor is ready to play; says why the process before this one ended, if it is known."""
        return self._watchdog.earlier

    def check_policy(self) -> None:
        """Raise `UserError` when the policy is not one for this world. It needs no weights yet."""
        if self._current.world is not None and self._policy is not None:
            check_world(self._current.world, empty_policy(self._description).transform)

    def renderer(self) -> str:
        """The OpenGL backend in use, with its device."""
        return describe_renderer()

    def _enter(self, env_id: str) -> World:
        env = self._config.env
        with self._watchdog.guard("construction", _WARM_UP_TIMEOUT_S):
            return self._current.enter(env_id, env.image_size, env.max_steps)

    def _make(self, env_id: str, image_size: int, max_steps: int | None) -> World:
        world = make(env_id, image_size, max_steps)
        # The first steps compile code and the first frame loads textures, which takes longer than others may.
        observation, _ = world.reset(seed=0)
        world.step(np.zeros(world.action_dim))
        observation.rendered()
        world.guard = partial(self._watchdog.guard, limit_s=self._config.scaling.hang_timeout_s)
        return world

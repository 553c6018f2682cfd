"""Demonstrations made by the scripted expert, noisy in what is done and clean in what is to be learnt (DART)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ript_ray.config import Config, DemosConfig
from ript_ray.data.expert import find_expert
from ript_ray.envs.current import CurrentWorld
from ript_ray.envs.world import World
from ript_ray.rollout import Recorder
from ript_ray.types import Context, Trajectory

_SMOOTHING = 0.8
"""Correlation of the action noise from step to step."""
_LINGER_STEPS = 25
"""Steps recorded after the gripper has opened, for a demonstration that does not end in success."""


def demonstrate_all(config: Config, contexts: Iterable[Context]) -> Iterator[Trajectory]:
    """A demonstration of each context, one after the other in this process, made when it is asked for."""
    with CurrentWorld() as current:
        for context in contexts:
            world = current.enter(context.env_id, config.env.image_size, config.env.max_steps)
            yield demonstrate(world, context, config.demos)


def demonstrate(env: World, context: Context, config: DemosConfig) -> Trajectory:
    """One demonstration. Executed actions are disturbed for variety; the labels are the expert's clean answers to the
    states that the disturbance led to (Laskey et al. 2017, DART).
    """
    observation, _ = env.reset(**context.reset_arguments())
    rng = np.random.default_rng(context.seed)
    angle = rng.uniform(0.0, 2 * np.pi)
    miss = config.grasp_error if rng.random() < config.clumsy else 0.0
    expert = find_expert(env, grasp_error=miss * np.array([np.cos(angle), np.sin(angle)]))
    recorder = Recorder(env, context)
    noise = np.zeros(min(3, env.action_dim))  # of an arm, its position
    success = truncated = False
    lingered = 0
    while not success and not truncated and lingered < _LINGER_STEPS:
        if (env.elapsed_steps % config.frame_every) == 0:
            recorder.look(observation)
        label = expert.act()
        noise = _SMOOTHING * noise + np.sqrt(1 - _SMOOTHING**2) * rng.normal(0.0, config.noise, size=len(noise))
        action = label.copy()
        action[: len(noise)] = np.clip(action[: len(noise)] + noise, -1.0, 1.0)
        recorder.add(observation, action, label)
        observation, _, success, truncated, _ = env.step(action)
        lingered += expert.phase == "release"
    return recorder.finish(success, policy_version=-1)

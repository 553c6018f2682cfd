"""One episode of this project's environment against the stock loop, in the same process."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ript_ray.config import Config
from ript_ray.envs import find_task, make

STEPS = 110
CHUNK = 10
SEED = 7


def measure(config: Config) -> dict[str, Any]:
    """Seconds of one episode: reset, settle, 110 random steps, a look of both cameras every 10 steps.

    The stock loop renders every step and compiles the model at each reset, as every published wrapper does. Both play
    the same actions from the same state and must end in the same joint positions.
    """
    actions = np.random.default_rng(SEED).uniform(-1, 1, (STEPS, 7))
    env = make(config.env.id, config.env.image_size, max_steps=STEPS + 1)
    observation, _ = env.reset(seed=0, options={"init_state": 1})
    assert observation["wrist"].any()  # the first frame loads textures, which the stock environment does when made
    ours, final = _timed(lambda: _reused_episode(env, actions))
    stock_env = _stock(config)
    stock, stock_final = _timed(lambda: _stock_episode(stock_env, config, actions))
    env.close()
    stock_env.close()
    return {
        "benchmark": "env",
        "env": config.env.id,
        "episode_s": ours,
        "stock_episode_s": stock,
        "speedup": stock / ours,
        "same_joint_positions": bool(np.array_equal(final, stock_final)),
    }


def _timed(play: Any) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    final = play()
    return time.perf_counter() - started, final


def _reused_episode(env: Any, actions: np.ndarray) -> np.ndarray:
    observation, _ = env.reset(seed=SEED, options={"init_state": 0})
    for i, action in enumerate(actions):
        if i % CHUNK == 0:
            assert observation["agentview"].shape == observation["wrist"].shape
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    return np.array(env.simulation.sim.data.qpos)


def _stock(config: Config) -> Any:
    from libero.libero.envs import OffScreenRenderEnv

    size = config.env.image_size
    task = find_task(config.env.id)
    return OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=size, camera_widths=size)


def _stock_episode(env: Any, config: Config, actions: np.ndarray) -> np.ndarray:
    env.seed(SEED)
    env.reset()
    env.set_init_state(find_task(config.env.id).init_states()[0])
    for _ in range(10):
        env.step([0, 0, 0, 0, 0, 0, -1])
    for action in actions:
        _, _, done, _ = env.step(action)
        if done:
            break
    return np.array(env.sim.data.qpos)

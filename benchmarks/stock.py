"""The stock environment, played step by step: what this project's environments are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ript_ray.envs import find_task
from ript_ray.envs.libero import SETTLE_ACTION, SETTLE_STEPS

_IMAGES = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}


@dataclass
class Trace:
    """What an episode returned, step by step; the first entry is the observation after the settle steps."""

    states: list[np.ndarray] = field(default_factory=list)
    """qpos and qvel."""
    low_dim: list[dict[str, np.ndarray]] = field(default_factory=list)
    frames: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """By step and camera, as policies see them."""
    rewards: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)


def random_actions(steps: int, seed: int) -> np.ndarray:
    """Random actions that drift downwards, into contact, while the gripper opens and closes: float64[steps, 7]."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1.0, 1.0, (steps, 7))
    actions[:, 2] -= 0.3
    actions[:, 6] = np.sign(np.sin(np.arange(steps) / 9.0) + rng.uniform(-0.3, 0.3, steps))
    return actions.clip(-1.0, 1.0)


class StockEnv:
    """LIBERO's own `OffScreenRenderEnv`, made fresh, with the official protocol for the start of an episode."""

    def __init__(self, env_id: str, image_size: int) -> None:
        from libero.libero.envs import OffScreenRenderEnv

        self._task = find_task(env_id)
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(self._task.bddl_file), camera_heights=image_size, camera_widths=image_size
        )

    def start(self, seed: int, init_state: int | None) -> dict[str, np.ndarray]:
        """Seed, reset, initial state, settle steps; the last observation."""
        self.env.seed(seed)
        self.env.reset()
        if init_state is not None:
            self.env.set_init_state(self._task.init_states()[init_state])
        for _ in range(SETTLE_STEPS):
            observation, *_ = self.env.step(list(SETTLE_ACTION))
        return dict(observation)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool]:
        """Observation, reward and whether the goal is reached; goes on after success."""
        observation, reward, _, _ = self.env.step(action)
        self.env.env.done = False
        return observation, float(reward), bool(self.env.check_success())

    def render_only(self, wanted: Callable[[], bool]) -> None:
        """Give black frames unless ``wanted()``: what the cameras see changes nothing in the simulation."""
        for name in _IMAGES.values():
            observable = self.env.env._observables[name]
            observable._sensor = _when(wanted, observable._sensor, observable.obs)

    def close(self) -> None:
        """Free everything."""
        # MuJoCo frees by number in the current context, which may be another environment's.
        self.env.sim._render_context_offscreen.gl_ctx.make_current()
        self.env.close()


def _when(wanted: Callable[[], bool], sensor: Any, blank: np.ndarray) -> Any:
    def sense(cache: Any) -> Any:
        return sensor(cache) if wanted() else np.zeros_like(blank)

    sense.__modality__ = sensor.__modality__  # type: ignore[attr-defined]
    return sense


def play_stock(
    env_id: str, image_size: int, seed: int, init_state: int | None, actions: np.ndarray, frames_at: set[int]
) -> Trace:
    """An episode of a fresh stock environment; frames are rendered before the given steps only."""
    step = 0
    stock = StockEnv(env_id, image_size)
    trace = Trace()

    def note(observation: dict[str, np.ndarray]) -> None:
        data = stock.env.sim.data
        trace.states.append(np.concatenate([data.qpos, data.qvel]))
        trace.low_dim.append({k: np.array(v) for k, v in observation.items() if k not in _IMAGES.values()})
        if step in frames_at:
            trace.frames[step] = {c: np.array(observation[k][::-1, ::-1]) for c, k in _IMAGES.items()}

    # The last settle step gives the first observation; robosuite makes new sensors at every reset.
    stock.env.reset = _then(stock.env.reset, lambda: stock.render_only(lambda: step in frames_at))
    note(stock.start(seed, init_state))
    for step in range(1, len(actions) + 1):
        observation, reward, success = stock.step(actions[step - 1])
        note(observation)
        trace.rewards.append(reward)
        trace.successes.append(success)
    stock.close()
    return trace


def _then(first: Any, second: Callable[[], None]) -> Any:
    def both() -> Any:
        result = first()
        second()
        return result

    return both


def play_ours(
    env: Any, seed: int, init_state: int | None, actions: np.ndarray, frames_at: set[int], at_once: bool
) -> Trace:
    """The same episode of this project's environment; frames are read at once or after the last step."""
    env.max_steps = len(actions) + 1
    trace = Trace()
    observations = []
    observation, _ = env.reset(seed=seed, options={} if init_state is None else {"init_state": init_state})
    for step in range(len(actions) + 1):
        data = env.simulation.sim.data
        trace.states.append(np.concatenate([data.qpos, data.qvel]))
        trace.low_dim.append(env.low_dim())
        if step in frames_at:
            observations.append((step, observation))
            if at_once:
                trace.frames[step] = {camera: observation[camera] for camera in _IMAGES}
        if step < len(actions):
            observation, reward, success, _, _ = env.step(actions[step])
            env._over = False  # go on after success, as the stock episode does
            trace.rewards.append(reward)
            trace.successes.append(success)
    if not at_once:
        trace.frames = {step: {camera: seen[camera] for camera in _IMAGES} for step, seen in observations}
    return trace


def differences(ours: Trace, stock: Trace) -> Iterator[str]:
    """A line for each kind of value that is not equal to the bit, with the first step at which it is not."""
    kinds: dict[str, tuple[list[Any], list[Any]]] = {
        "qpos, qvel": (ours.states, stock.states),
        "reward": (ours.rewards, stock.rewards),
        "success": (ours.successes, stock.successes),
    }
    for name in stock.low_dim[0]:
        kinds[name] = ([row.get(name) for row in ours.low_dim], [row[name] for row in stock.low_dim])
    for camera in _IMAGES:
        rendered = [[frames[camera] for frames in trace.frames.values()] for trace in (ours, stock)]
        kinds[camera] = rendered[0], rendered[1]
    for name, (a, b) in kinds.items():
        unequal = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not np.array_equal(x, y)]
        if unequal:
            yield f"{name}: {len(unequal)} of {len(a)} differ, first at {unequal[0]}"


def timed(play: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    play()
    return time.perf_counter() - started

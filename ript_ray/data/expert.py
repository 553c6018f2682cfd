"""A scripted expert that sees object poses: it makes demonstrations in LIBERO itself, so nothing need be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ript_ray.envs.world import World
from ript_ray.errors import UserError

_OPEN, _CLOSE = -1.0, 1.0
_CRUISE_HEIGHT = 0.16
"""Height above the object's rest position at which the arm travels, in m."""
_RIM_GRASP = {"akita_black_bowl": np.array([0.0, -0.048, 0.02])}
"""Objects wider than the gripper are held elsewhere than at their centre: offset by category, in m."""


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    gripper: float
    tolerance: float
    """Distance to the target, in m, at which the phase is over."""
    max_steps: int


_PHASES = (
    _Phase("hover", _OPEN, 0.015, 60),
    _Phase("descend", _OPEN, 0.010, 40),
    _Phase("close", _CLOSE, -1.0, 12),
    _Phase("lift", _CLOSE, 0.03, 30),
    _Phase("carry", _CLOSE, 0.03, 60),
    _Phase("lower", _CLOSE, 0.03, 20),
    _Phase("release", _OPEN, -1.0, 200),
)


class Expert(Protocol):
    """Who knows what to do in an environment."""

    @property
    def phase(self) -> str:
        """Name of what it is doing; ``release`` when nothing is left to do."""
        ...

    def act(self) -> np.ndarray:
        """The clean action for the present state: float32[action_dim] in [−1, 1]."""
        ...


def find_expert(env: World, grasp_error: np.ndarray) -> Expert:
    """The expert of an environment that has been reset.

    Args:
        env: a LIBERO task, or a gymnasium environment with a method ``expert_action()``.
        grasp_error: see `PickPlaceExpert`.

    Raises:
        UserError: when there is none.
    """
    if env.expert is not None:
        return _OwnExpert(env, env.expert)
    if not hasattr(getattr(env, "simulation", None), "parsed_problem"):
        raise UserError(
            f"env.id={env.id!r}: there is no scripted expert for it; give the environment a method expert_action(), or "
            "use demonstrations from elsewhere"
        )
    return PickPlaceExpert(env, grasp_error)


class _OwnExpert:
    phase = "act"

    def __init__(self, env: World, action: Callable[[], np.ndarray]) -> None:
        self._env, self._action = env, action

    def act(self) -> np.ndarray:
        return self._env.to_policy_units(self._action())


class PickPlaceExpert:
    """Picks the goal's object up and puts it into or onto the goal's target.

    A state machine over position differences: hover, descend, close, lift, carry, lower, release.

    Args:
        env: an environment that has been reset.
        grasp_error: constant offset of the grasp in x and y, in m, float[2]: a clumsy demonstrator misses by it.

    Raises:
        UserError: for tasks whose goal is not a single "put A in or on B".
    """

    def __init__(self, env: Any, grasp_error: np.ndarray) -> None:
        self._sim_env = env.simulation
        goal = self._sim_env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on") or goal[0][1] not in self._sim_env.objects_dict:
            raise UserError(
                f"env.id={env.id!r}: the scripted expert only moves one object into or onto another, the goal here"
                f" is {goal}; try libero_object/0 to libero_object/9"
            )
        _, self._object, self._target = goal[0]
        category = self._sim_env.objects_dict[self._object].category_name
        self._grasp = _RIM_GRASP.get(category, np.zeros(3)) + np.array([*grasp_error, 0.0])
        self._start = self._position(self._object).copy()
        self._phase = 0
        self._steps = 0

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        return _PHASES[self._phase].name

    def act(self) -> np.ndarray:
        """The clean action for the present state: float32[7] in [−1, 1]."""
        hand = self._sim_env.sim.data.site_xpos[self._sim_env.robots[0].eef_site_id]
        delta = self._goal_position() - hand
        while self._is_over(delta) and self._phase + 1 < len(_PHASES):
            self._phase, self._steps = self._phase + 1, 0
            delta = self._goal_position() - hand
        self._steps += 1
        action = np.zeros(7, dtype=np.float32)
        action[:3] = np.clip(delta / 0.05, -1.0, 1.0)
        action[6] = _PHASES[self._phase].gripper
        return action

    def _is_over(self, delta: np.ndarray) -> bool:
        phase = _PHASES[self._phase]
        return bool(np.linalg.norm(delta) < phase.tolerance) or self._steps >= phase.max_steps

    def _goal_position(self) -> np.ndarray:
        above = np.array([0.0, 0.0, _CRUISE_HEIGHT])
        phase = self.phase
        if phase in ("hover", "lift"):
            return self._start + self._grasp + above
        if phase in ("descend", "close"):
            return self._start + self._grasp
        place = self._position(self._target) + self._grasp
        place[2] = self._start[2] + _CRUISE_HEIGHT
        if phase == "carry":
            return place
        return place - np.array([0.0, 0.0, 0.05])

    def _position(self, name: str) -> np.ndarray:
        data = self._sim_env.sim.data
        if name in self._sim_env.obj_body_id:
            return np.asarray(data.body_xpos[self._sim_env.obj_body_id[name]])
        return np.array(data.get_site_xpos(name))

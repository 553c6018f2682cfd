"""Environments that really hang, crash or leak, for gymnasium's registry: ``tests.faulty_worlds:Hang-v0`` and so on;
one that complains as a GPU does that has no memory left, and one that is too easy.

The fault strikes once, in the third step of an episode, while the environment variable's file is there; a stillborn one
crashes whenever it is made.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ript_ray.envs.point_reach import PointReach

ARMED = "RIPT_RAY_TEST_FAULT"
"""Names a file; while it is there the next fault strikes, and takes the file away."""


def hang() -> None:
    """In C, and without letting other Python threads run."""
    ctypes.PyDLL(None).sleep(600)


def crash() -> None:
    """A segmentation fault."""
    ctypes.string_at(0)


def leak() -> None:
    """Fill a gigabyte and a half, and keep it."""
    _KEPT.append(np.ones(190_000_000))


def exhaust() -> None:
    """What a GPU says that has no more memory."""
    raise torch.OutOfMemoryError("CUDA out of memory")


_KEPT: list[np.ndarray] = []


class Faulty(PointReach):
    """A `PointReach` with a fault."""

    def __init__(self, fault: Any, at_birth: bool = False) -> None:
        super().__init__()
        self._fault = fault
        self._steps = 0
        if at_birth:
            fault()

    def reset(self, **arguments: Any) -> Any:
        self._steps = 0
        return super().reset(**arguments)

    def step(self, action: np.ndarray) -> Any:
        self._steps += 1
        if self._steps == 3 and self._disarm():
            self._fault()
        return super().step(action)

    def _disarm(self) -> bool:
        armed = Path(os.environ.get(ARMED, "/nowhere/at/all"))
        if not armed.exists():
            return False
        armed.unlink()
        return True


class Easy(PointReach):
    """Succeeds at once, whatever is done."""

    def step(self, action: np.ndarray) -> Any:
        observation, _, _, truncated, info = super().step(action)
        return observation, 1.0, True, truncated, info | {"success": True}


gym.register("Easy-v0", entry_point=Easy, max_episode_steps=20)
for name, fault in (("Hang", hang), ("Crash", crash), ("Leak", leak), ("Exhaust", exhaust)):
    gym.register(f"{name}-v0", entry_point=Faulty, kwargs={"fault": fault}, max_episode_steps=20)
gym.register("Stillborn-v0", entry_point=Faulty, kwargs={"fault": crash, "at_birth": True}, max_episode_steps=20)

"""A small task without a simulator: a point is steered to a target it sees. An example, and a fast one for tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

SIZE = 32
SPEED = 0.05
RADIUS = 0.08


class PointReach(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Steer a point (white) to the target (red) in the unit square; the target is known from the picture alone.

    Observation: ``view`` (uint8[32, 32, 3]) and ``state`` (float32[2], the point). Action: float32[2] in [−1, 1], the
    change of the point in units of 0.05. Success: the point is within 0.08 of the target.
    """

    metadata = {"render_modes": [], "render_fps": 20}  # noqa: RUF012  (gymnasium's own signature)
    instruction = "reach the red target"

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Dict(  # type: ignore[assignment]
            {
                "view": gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "state": gym.spaces.Box(0.0, 1.0, (2,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._point = self._target = np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Place point and target at random, at least 0.3 apart."""
        super().reset(seed=seed, options=options)
        while True:
            self._point, self._target = self.np_random.uniform(0.1, 0.9, (2, 2))
            if np.linalg.norm(self._point - self._target) > 0.3:
                return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move the point."""
        self._point = np.clip(self._point + SPEED * np.clip(action, -1.0, 1.0), 0.0, 1.0)
        success = bool(np.linalg.norm(self._point - self._target) < RADIUS)
        return self._observe(), float(success), success, False, {"success": success}

    def expert_action(self) -> np.ndarray:
        """Straight to the target."""
        return np.clip((self._target - self._point) / SPEED, -1.0, 1.0).astype(np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        centres = (np.arange(SIZE) + 0.5) / SIZE
        x, y = np.meshgrid(centres, centres)
        view = np.zeros((SIZE, SIZE, 3), np.uint8)
        view[np.hypot(x - self._target[0], y - self._target[1]) < RADIUS, 0] = 255
        view[np.hypot(x - self._point[0], y - self._point[1]) < RADIUS / 2] = 255
        return {"view": view, "state": self._point.astype(np.float32)}


gym.register("ript_ray/PointReach-v0", entry_point="ript_ray.envs.point_reach:PointReach", max_episode_steps=60)

"""Any gymnasium environment that returns images, a state and success."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import gymnasium as gym
import numpy as np

from ript_ray.config import INIT_STATES
from ript_ray.envs.world import LazyObservation, Ticket, World, check_action, check_options
from ript_ray.errors import UserError

MAX_STEPS = 200


class GymnasiumWorld(World):
    """A registered gymnasium environment.

    Its observations must be dictionaries with at least one frame (a uint8 box [H, W, 3]; every one counts as a camera,
    and others, as masks, are left out) and ``state`` (a float box [n]); its actions a bounded box; and every ``info``
    of a step must hold ``success``. The instruction is the environment's attribute ``instruction``, else its name. The
    i-th initial state is what seed i gives.

    An episode ends with success, when the environment ends or truncates it, or at the step limit. A frame cannot be
    made later in general, so tickets hold the frames themselves.

    Args:
        name: gymnasium's identifier, for example ``ript_ray/PointReach-v0``.
        image_size: height and width of its frames, which are taken as they are.
        max_steps: step limit, in the place of the registered one; that one or 200 by default.

    Raises:
        UserError: when the environment cannot be made or does not fit the description above.
    """

    num_init_states = INIT_STATES

    def __init__(self, name: str, image_size: int, max_steps: int | None = None) -> None:
        import ript_ray.envs.point_reach  # noqa: F401  (registers)

        try:
            self._env = gym.make(name, max_episode_steps=max_steps)
        except (gym.error.Error, ImportError, TypeError) as error:
            raise UserError(
                f"env.id='gymnasium/{name}': {str(error).rstrip('.')}; expected what is registered with gymnasium, "
                "with the arguments that it needs (register's kwargs), if need be after the module that registers it "
                "(my_package.my_env:MyEnv-v0), which can be imported"
            ) from error
        self.id = f"gymnasium/{name}"
        spaces = self._env.observation_space
        parts = spaces.spaces if isinstance(spaces, gym.spaces.Dict) else {}
        self.cameras = tuple(key for key, part in parts.items() if _is_frame(part))
        state, actions = parts.get("state"), self._env.action_space
        if not self.cameras or state is None or not isinstance(actions, gym.spaces.Box):
            raise UserError(
                f"env.id={self.id!r}: expected a dictionary with frames (uint8 [H, W, 3]) and 'state', and actions in "
                f"a box; it returns {spaces} and takes {actions}; wrap it to that form"
            )
        if not actions.is_bounded():
            raise UserError(
                f"env.id={self.id!r}: expected actions in a box with finite bounds, to which [−1, 1] is scaled; it "
                f"takes {actions}; give its action_space finite bounds"
            )
        for camera in self.cameras:
            if parts[camera].shape != (image_size, image_size, 3):
                raise UserError(
                    f"env.image_size={image_size}: the frames of {self.id} have the shape {parts[camera].shape}; set "
                    f"env.image_size={(parts[camera].shape or (0,))[0]}, or wrap the environment if they are not square"
                )
        self.state_dim, self.action_dim = int(np.prod(state.shape or ())), int(np.prod(actions.shape))
        self.instruction = str(getattr(self._env.unwrapped, "instruction", name))
        limit = self._env.spec.max_episode_steps if self._env.spec else None
        self.max_steps = max_steps or limit or MAX_STEPS
        self.observation_space = gym.spaces.Dict(  # type: ignore[assignment]
            {**{key: parts[key] for key in (*self.cameras, "state")}, "instruction": gym.spaces.Text(256)}
        )
        # Policies act in [−1, 1]; the environment's own bounds are reached by scaling.
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)
        self._low, self._high = actions.low.ravel(), actions.high.ravel()
        self.metadata = self._env.metadata
        self._frames = 0
        self._over = True
        self._last: LazyObservation | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[LazyObservation, dict[str, Any]]:
        """Start an episode from the seed, or from ``options={"init_state": i}``."""
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        init_state = check_options(options, self).init_state
        started = time.perf_counter()
        with self.guard("reset"):
            observation, _ = self._env.reset(seed=seed if init_state is None else init_state)
        self.physics_seconds += time.perf_counter() - started
        self.elapsed_steps, self._over = 0, False
        return self._observe(observation), {"seed": seed, "init_state": init_state}

    def step(self, action: np.ndarray) -> tuple[LazyObservation, float, bool, bool, dict[str, Any]]:
        """Advance by one step. Success ends the episode with reward 1."""
        if self._over:
            raise gym.error.ResetNeeded("the episode is over: call reset() before step()")
        action = check_action(action, self.action_dim)
        started = time.perf_counter()
        scaled = self._low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (self._high - self._low)
        space = self._env.action_space
        with self.guard("step"):
            observation, _, ended, cut, info = self._env.step(scaled.reshape(space.shape).astype(space.dtype))
        self.physics_seconds += time.perf_counter() - started
        if "success" not in info:
            raise UserError(f"env.id={self.id!r}: step() returned no info['success']; wrap the environment to say so")
        success = bool(info["success"])
        self.elapsed_steps += 1
        truncated = not success and (ended or cut or self.elapsed_steps >= self.max_steps)
        self._over = success or truncated
        return self._observe(observation), float(success), success, truncated, {"success": success}

    def scene(self) -> Ticket:
        return {}

    def render_ticket(self, ticket: Ticket, camera: str, size: int | None = None) -> np.ndarray:
        frame = ticket[camera]
        if size is None or size == frame.shape[0]:
            return frame
        rows = np.arange(size) * frame.shape[0] // size
        columns = np.arange(size) * frame.shape[1] // size
        return frame[rows][:, columns]

    def state_hash(self) -> int:
        if self._last is None:
            raise gym.error.ResetNeeded("no state yet: call reset() first")
        digest = hashlib.blake2b(np.ascontiguousarray(self._last["state"]).tobytes(), digest_size=8)
        for camera in self.cameras:
            digest.update(self._last.ticket[camera].tobytes())
        return int.from_bytes(digest.digest(), "little")

    @property
    def expert(self) -> Any:
        """The environment's own ``expert_action()`` → action in its units, or None: it makes demonstrations."""
        return getattr(self._env.unwrapped, "expert_action", None)

    def to_policy_units(self, action: np.ndarray) -> np.ndarray:
        """An action of the environment's own bounds, in [−1, 1]: float32[action_dim]."""
        return ((action.ravel() - self._low) / (self._high - self._low) * 2.0 - 1.0).astype(np.float32)

    @property
    def frames_rendered(self) -> int:
        return self._frames

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _observe(self, observation: dict[str, Any]) -> LazyObservation:
        # Copies: an environment may return its own buffers, and go on writing into them.
        ticket = {camera: np.array(observation[camera], order="C") for camera in self.cameras}
        self._frames += len(ticket)
        values = {
            "state": np.array(observation["state"], dtype=np.float32).ravel(),
            "instruction": self.instruction,
        }
        self._last = LazyObservation(values, self.cameras, ticket, self.render_ticket)
        return self._last


def _is_frame(part: gym.Space[Any]) -> bool:
    shape = part.shape or ()
    return part.dtype == np.uint8 and len(shape) == 3 and shape[-1] == 3

"""Tasks simulated by robosuite with one Panda arm: stepping, observing, rendering. Subclasses say how to reset."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from ript_ray.envs import rendering
from ript_ray.envs.world import LazyObservation, ResetOptions, Ticket, World, check_action, check_options

rendering.configure()

from robosuite.utils.binding_utils import MjSim  # noqa: E402  (the OpenGL backend must be chosen before)

from ript_ray.envs.frames import CAMERAS, FrameRenderer, body_pose_of  # noqa: E402
from ript_ray.envs.models import load_model  # noqa: E402
from ript_ray.envs.physics import ControlStepper, SampleClock  # noqa: E402
from ript_ray.envs.substeps import Sample  # noqa: E402

_MUTABLE_MODEL_FIELDS = ("body_pos", "body_quat", "site_rgba", "geom_rgba", "light_active")
_CHARSET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-,."


class ArmWorld(World):
    """A robosuite task.

    Observation: ``agentview`` and ``wrist`` (uint8[size, size, 3], rotated by 180°), ``state`` (float32[8]:
    end-effector position in m, axis-angle in rad, both finger positions in m) and ``instruction``.
    Action: float32[7] in [−1, 1]: change of position (1 = 5 cm), of rotation (1 = 0.5 rad), gripper (−1 opens).

    Args:
        env: the robosuite environment, made from a class of `with_cached_model`.
        image_size: height and width of both frames in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  (gymnasium's own signature)
    cameras = tuple(CAMERAS)
    frames_are_mirrored = True
    state_dim = 8
    action_dim = 7

    def __init__(self, env: Any, image_size: int) -> None:
        self.render_mode = "rgb_array"
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)
        frame = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(  # type: ignore[assignment]
            {key: frame for key in CAMERAS}
            | {
                "state": gym.spaces.Box(-np.inf, np.inf, (self.state_dim,), np.float32),
                "instruction": gym.spaces.Text(256, charset=_CHARSET),
            }
        )
        self._env = env
        self._renderer = FrameRenderer(env.sim.model, image_size)
        self._stepper = ControlStepper(env)
        self._clock = SampleClock(env.control_freq)
        self._fingers = np.array(env.robots[0]._ref_gripper_joint_pos_indexes)
        self._over = True
        self._observation: LazyObservation | None = None
        self._sample: Sample | None = None
        self._scene: Ticket = {}

    @abc.abstractmethod
    def _start(self, seed: int, options: ResetOptions) -> None:
        """Bring the simulator to the start of an episode and take the first observation."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[LazyObservation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seeds the placement of objects; a fresh random one by default.
            options: ``{"init_state": i}`` starts from the i-th known initial state; see `ResetOptions`.

        Raises:
            UserError: for an initial state that does not exist or an unknown option.
        """
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        wanted = check_options(options, self)
        started = time.perf_counter()
        with self.guard("reset"):
            self._start(seed, wanted)
        self.elapsed_steps, self._over = 0, False
        self.physics_seconds += time.perf_counter() - started
        return self._require_observation(), {"seed": seed, "init_state": wanted.init_state}

    def step(self, action: np.ndarray) -> tuple[LazyObservation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step (50 ms). Success ends the episode with reward 1."""
        if self._over:
            raise gym.error.ResetNeeded("the episode is over: call reset() before step()")
        action = check_action(action, self.action_dim)
        started = time.perf_counter()
        with self.guard("step"):
            success = self._advance(action)
        self.physics_seconds += time.perf_counter() - started
        self.elapsed_steps += 1
        truncated = not success and self.elapsed_steps >= self.max_steps
        self._over = success or truncated
        return self._require_observation(), float(success), success, truncated, {"success": success}

    def render(self) -> np.ndarray:
        """The upright third-person view of the last observation: uint8[size, size, 3]."""
        return np.ascontiguousarray(self._require_observation()["agentview"][:, ::-1])

    def scene(self) -> Ticket:
        return self._scene

    def render_ticket(self, ticket: Ticket, camera: str, size: int | None = None) -> np.ndarray:
        with self.guard("render"):
            return self._renderer.render(ticket, camera, size)

    def state_hash(self) -> int:
        data = self._env.sim.data._data
        digest = hashlib.blake2b(data.qpos.tobytes(), digest_size=8)
        digest.update(data.qvel.tobytes())
        return int.from_bytes(digest.digest(), "little")

    def low_dim(self) -> dict[str, np.ndarray]:
        """Everything but images that the stock environment would return now, under its names, in its own bits.

        Computed when asked for, on a copy of what was sampled, since policies do not see it.
        """
        env, sample = self._env, self._sample
        if sample is None:
            raise gym.error.ResetNeeded("no observation yet: call reset() first")
        model, simulated = env.sim.model._model, env.sim.data
        shadow = MjSim(model).data
        shadow.qpos[:] = sample.seen_qpos
        mujoco.mj_kinematics(model, shadow._data)
        mujoco.mj_comPos(model, shadow._data)
        shadow.qpos[:], shadow.qvel[:] = sample.qpos, sample.qvel
        observed: dict[str, np.ndarray] = {}
        by_modality: dict[str, list[np.ndarray]] = {}
        try:
            env.sim.data = shadow
            cache: dict[str, Any] = {}
            for name, observable in env._observables.items():
                if observable.modality == "image" or not observable.is_enabled():
                    continue
                cache[name] = np.array(observable._sensor(cache))
                if observable.is_active():
                    value = cache[name]
                    observed[name] = value[0] if value.shape == (1,) else value  # as robosuite returns it
                    by_modality.setdefault(observable.modality, []).append(np.atleast_1d(observed[name]))
        finally:
            env.sim.data = simulated
        return observed | {f"{name}-state": np.concatenate(parts, axis=-1) for name, parts in by_modality.items()}

    @property
    def render_seconds(self) -> float:
        return self._renderer.seconds

    @property
    def frames_rendered(self) -> int:
        return self._renderer.frames

    @property
    def simulation(self) -> Any:
        """The robosuite environment underneath, for scripted experts and tests."""
        return self._env

    def close(self) -> None:
        """Free the simulator and the OpenGL context."""
        self._renderer.close()
        self._env.close()

    def _restore_compiled_model(self) -> None:
        """Undo what episodes change in the model: poses of fixtures, colours of sites."""
        for name, value in self._env.compiled_fields.items():
            getattr(self._env.sim.model._model, name)[:] = value

    def _advance(self, action: np.ndarray) -> bool:
        # A frame shows the lights of the step that it belongs to, which `_post_process` changes.
        self._observe(self._stepper.step(action, self._clock))
        success = bool(self._env._check_success())
        self._post_process()
        return success

    def _post_process(self) -> None:
        """What the task does after a step, besides moving."""

    def _observe_at_start(self) -> None:
        """The forced observation after a reset or a restored state."""
        self._scene = {"body_pose": body_pose_of(self._env.sim.model._model)}
        self._clock.force(self._env.model_timestep)
        self._observe(self._stepper.observe())

    def _observe(self, sample: Sample) -> None:
        fingers = sample.qpos[self._fingers]
        state = np.concatenate([sample.ee_pos, _axis_angle(sample.hand_quat[[1, 2, 3, 0]]), fingers]).astype(np.float32)
        site_alpha = self._env.sim.model._model.site_rgba[:, 3].copy()
        ticket = {"qpos": sample.seen_qpos, "site_alpha": site_alpha, **self._scene}
        values = {"state": state, "instruction": self.instruction}
        self._observation = LazyObservation(values, self.cameras, ticket, self.render_ticket)
        self._sample = sample

    def _require_observation(self) -> LazyObservation:
        if self._observation is None:
            raise gym.error.ResetNeeded("no observation yet: call reset() first")
        return self._observation


def with_cached_model(stock: type) -> type:
    """A robosuite class whose compiled models come from the cache, and which keeps a record of them as compiled."""

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        # As the stock method, but for the cache.
        self.sim = MjSim(load_model(xml_string or self.model.get_xml()))
        self.sim.forward()
        self.initialize_time(self.control_freq)
        # Fixtures are moved in the model itself as soon as it exists, so the untouched values are recorded here.
        model = self.sim.model._model
        self.compiled_fields = {name: getattr(model, name).copy() for name in _MUTABLE_MODEL_FIELDS}

    # LIBERO checks the class name, hence the subclass of the same name.
    return type(stock.__name__, (stock,), {"_initialize_sim": initialize_sim})


@contextlib.contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """Robosuite draws from numpy's global generator; seed it for a reset and give the caller's state back."""
    keep = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(keep)


def _axis_angle(quat: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, 2π] of a quaternion xyzw, as robosuite's `quat2axisangle` and openpi compute it."""
    w = min(max(float(quat[3]), -1.0), 1.0)
    norm = math.sqrt(1.0 - w * w)
    if norm <= 1e-8:  # what numpy.isclose(norm, 0) says, in a hundredth of its time
        return np.zeros(3)
    return np.asarray(quat[:3] * 2.0 * np.arccos(w) / norm)

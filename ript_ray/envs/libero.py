"""LIBERO as a gymnasium environment: the official protocol, reused between episodes, frames on demand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from ript_ray.envs import rendering
from ript_ray.envs.tasks import Task
from ript_ray.errors import UserError

rendering.configure()

from robosuite.utils.binding_utils import MjSim  # noqa: E402  (the OpenGL backend must be chosen before)
from robosuite.utils.errors import RandomizationError  # noqa: E402

from ript_ray.envs.frames import CAMERAS, FrameRenderer, FrameTicket, LazyObservation, body_pose_of  # noqa: E402
from ript_ray.envs.models import load_model  # noqa: E402
from ript_ray.envs.physics import ControlStepper, SampleClock  # noqa: E402
from ript_ray.envs.substeps import Sample  # noqa: E402

SETTLE_STEPS = 10
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)


class LiberoEnv(gym.Env[dict[str, Any], np.ndarray]):
    """A LIBERO task.

    Observation: ``agentview`` and ``wrist`` (uint8[size, size, 3], rotated by 180°), ``state`` (float32[8]:
    end-effector position in m, axis-angle in rad, both finger positions in m) and ``instruction``.
    Action: float32[7] in [−1, 1]: change of position (1 = 5 cm), of rotation (1 = 0.5 rad), gripper (−1 opens).

    `reset` follows the official evaluation protocol and reuses the compiled model; the result is the same, to the
    last bit, as that of a freshly made stock `OffScreenRenderEnv`.

    Args:
        task: which task.
        image_size: height and width of both frames in pixels.
        max_steps: step limit of an episode; the suite's official limit by default.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  (gymnasium's own signature)

    def __init__(self, task: Task, image_size: int = 128, max_steps: int | None = None) -> None:
        self.task = task
        self.max_steps = max_steps or task.max_steps
        self.render_mode = "rgb_array"
        self.physics_seconds = 0.0
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        frame = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {key: frame for key in CAMERAS}
            | {
                "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
                "instruction": gym.spaces.Text(256, charset=_CHARSET),
            }
        )
        self._env = _build(task)
        self._init_states = task.init_states()
        self._base_initializers = list(self._env.object_property_initializers)
        self._renderer = FrameRenderer(self._env.sim.model, image_size)
        self._stepper = ControlStepper(self._env)
        self._clock = SampleClock(self._env.control_freq)
        self._fingers = np.array(self._env.robots[0]._ref_gripper_joint_pos_indexes)
        self._steps = 0
        self._over = True
        self._observation: LazyObservation | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[LazyObservation, dict[str, Any]]:
        """Start an episode: stock `seed`, `reset`, optionally `set_init_state(states[i])`, and ten settle steps.

        Args:
            seed: seeds the placement of objects; a fresh random one by default.
            options: ``{"init_state": i}`` restores the benchmark's i-th initial state (0 to 49).

        Raises:
            UserError: for an initial state that does not exist or an unknown option.
        """
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        options = dict(options or {})
        init_state = options.pop("init_state", None)
        if options:
            raise UserError(f"reset option {next(iter(options))!r} is unknown; valid: 'init_state'")
        if init_state is not None and not 0 <= init_state < len(self._init_states):
            raise UserError(f"init_state={init_state}: {self.task.id} has states 0 to {len(self._init_states) - 1}")
        started = time.perf_counter()
        with _global_numpy_seed(seed):
            self._reset_like_new()
        if init_state is not None:
            self._restore(self._init_states[init_state])
        self._steps, self._over = 0, False
        for _ in range(SETTLE_STEPS):
            self._advance(SETTLE_ACTION)
        self.physics_seconds += time.perf_counter() - started
        return self._require_observation(), {"seed": seed, "init_state": init_state}

    def step(self, action: np.ndarray) -> tuple[LazyObservation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step (50 ms). Success ends the episode with reward 1."""
        if self._over:
            raise gym.error.ResetNeeded("the episode is over: call reset() before step()")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        started = time.perf_counter()
        success = self._advance(action)
        self.physics_seconds += time.perf_counter() - started
        self._steps += 1
        truncated = not success and self._steps >= self.max_steps
        self._over = success or truncated
        return self._require_observation(), float(success), success, truncated, {"success": success}

    def render(self) -> np.ndarray:
        """The upright third-person view of the last observation: uint8[size, size, 3]."""
        return np.ascontiguousarray(self._require_observation()["agentview"][:, ::-1])

    def render_ticket(self, ticket: FrameTicket, camera: str, size: int | None = None) -> np.ndarray:
        """Render a frame of this task that was put off, in this or another process: uint8[size, size, 3]."""
        return self._renderer.render(ticket, camera, size)

    @property
    def num_init_states(self) -> int:
        """How many official initial states the task has."""
        return len(self._init_states)

    @property
    def elapsed_steps(self) -> int:
        """Control steps since the last reset, settle steps not counted."""
        return self._steps

    @property
    def render_seconds(self) -> float:
        """Seconds spent rendering since construction."""
        return self._renderer.seconds

    @property
    def frames_rendered(self) -> int:
        """Frames rendered since construction."""
        return self._renderer.frames

    @property
    def simulation(self) -> Any:
        """The robosuite environment underneath, for scripted experts and tests."""
        return self._env

    def close(self) -> None:
        """Free the simulator and the OpenGL context."""
        self._renderer.close()
        self._env.close()

    def _reset_like_new(self) -> None:
        """Robosuite's hard reset on the model that is already compiled.

        A hard reset differs from a soft one in five ways, all restored here: model fields that episodes change
        (poses of fixtures, colours of sites), the gripper's accumulated action, two extra `mj_forward` calls that warm
        the constraint solver (one after compilation, one by the new render context), and the samplers of drawers and
        knobs, which stock LIBERO registers once more at each compilation and all of which draw random numbers.
        """
        env = self._env
        model = env.sim.model._model
        for attempt in range(1, 1000):
            for name, value in env.compiled_fields.items():
                getattr(model, name)[:] = value
            env.robots[0].gripper.current_action = np.zeros(env.robots[0].gripper.dof)
            env.object_property_initializers = self._base_initializers * (attempt + 1)
            env.sim.reset()
            env.sim.forward()
            env.sim.forward()
            try:
                env._reset_internal()
                break
            except RandomizationError:
                continue
        else:
            raise RuntimeError(f"{self.task.id}: objects could not be placed without overlap in 999 attempts")
        env.sim.forward()
        env.visualize(vis_settings={vis: False for vis in env._visualizations})
        self._clock.reset()
        self._clock.force(env.model_timestep)
        self._observe(self._stepper.observe())

    def _restore(self, state: np.ndarray) -> None:
        """Stock `set_init_state`: joint positions and velocities, then a forced observation."""
        env = self._env
        env.sim.set_state_from_flattened(state)
        env.sim.forward()
        env._post_process()
        self._clock.force(env.model_timestep)
        self._observe(self._stepper.observe())

    def _advance(self, action: np.ndarray) -> bool:
        self._observe(self._stepper.step(action, self._clock))  # before _post_process: a frame shows the lights of the step that it belongs to
        success = bool(self._env._check_success())
        self._env._post_process()
        return success

    def _observe(self, sample: Sample) -> None:
        model = self._env.sim.model._model
        fingers = sample.qpos[self._fingers]
        state = np.concatenate([sample.ee_pos, _axis_angle(sample.hand_quat[[1, 2, 3, 0]]), fingers]).astype(np.float32)
        ticket = FrameTicket(sample.seen_qpos, body_pose_of(model), model.site_rgba[:, 3].copy())
        values = {"state": state, "instruction": self.task.instruction}
        self._observation = LazyObservation(values, ticket, self._renderer.render)

    def _require_observation(self) -> LazyObservation:
        if self._observation is None:
            raise gym.error.ResetNeeded("no observation yet: call reset() first")
        return self._observation


_MUTABLE_MODEL_FIELDS = ("body_pos", "body_quat", "site_rgba", "geom_rgba", "light_active")
_CHARSET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-,."


def _build(task: Task) -> Any:
    """The robosuite environment of a task with LIBERO's own settings, plus a record of the model as compiled."""
    import libero.libero.envs.bddl_utils as bddl
    from libero.libero.envs import TASK_MAPPING
    from robosuite import load_controller_config

    stock: Any = TASK_MAPPING[bddl.get_problem_info(str(task.bddl_file))["problem_name"]]

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        # As the stock method, but for the cache.
        self.sim = MjSim(load_model(xml_string or self.model.get_xml()))
        self.sim.forward()
        self.initialize_time(self.control_freq)
        model = self.sim.model._model
        self.compiled_fields = {name: getattr(model, name).copy() for name in _MUTABLE_MODEL_FIELDS}

    # Fixtures are moved in the model itself as soon as it exists, so the untouched values are recorded in between.
    # LIBERO checks the class name, hence the subclass of the same name.
    recording = type(stock.__name__, (stock,), {"_initialize_sim": initialize_sim})
    return recording(
        str(task.bddl_file),
        robots=["Panda"],
        controller_configs=load_controller_config(default_controller="OSC_POSE"),
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=False,  # made on first use, with data of its own (see FrameRenderer)
    )


def _axis_angle(quat: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, 2π] of a quaternion xyzw, as robosuite's `quat2axisangle` and openpi compute it."""
    w = min(max(float(quat[3]), -1.0), 1.0)
    norm = np.sqrt(1.0 - w * w)
    if np.isclose(norm, 0.0):
        return np.zeros(3)
    return np.asarray(quat[:3] * 2.0 * np.arccos(w) / norm)


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO draws from numpy's global generator; seed it for the reset and give the caller's state back."""
    keep = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(keep)

"""LIBERO's tasks by the official protocol, on a model that is compiled once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ript_ray.envs.arm import ArmWorld, global_numpy_seed, with_cached_model
from ript_ray.envs.tasks import Task
from ript_ray.envs.world import ResetOptions

SETTLE_STEPS = 10
ARM_DEVIATION = 0.02
"""Of each joint in the benchmark's initial states, in rad: robosuite's default noise."""
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)


class LiberoEnv(ArmWorld):
    """A LIBERO task.

    `reset` follows the official evaluation protocol: stock `seed`, `reset`, optionally `set_init_state(states[i])`,
    and ten steps in which objects settle. It reuses the compiled model; the result is the same, to the last bit, as
    that of a freshly made stock `OffScreenRenderEnv`.

    Args:
        task: which task.
        image_size: height and width of both frames in pixels.
        max_steps: step limit of an episode; the suite's official limit by default.
    """

    def __init__(self, task: Task, image_size: int = 128, max_steps: int | None = None) -> None:
        super().__init__(_build(task), image_size)
        self.task = task
        self.id, self.instruction = task.id, task.instruction
        self.max_steps = max_steps or task.max_steps
        self._init_states = task.init_states()
        self.num_init_states = len(self._init_states)
        self._base_initializers = list(self._env.object_property_initializers)

    def _start(self, seed: int, options: ResetOptions) -> None:
        self.begin_episode(seed, *options)
        for _ in range(SETTLE_STEPS):
            self._advance(SETTLE_ACTION)

    def begin_episode(self, seed: int, init_state: int | None, disturb_arm: bool = False) -> None:
        """What the stock `seed`, `reset` and `set_init_state` do, without the settle steps that follow in `reset`.

        The stock `reset` always starts with the arm in the same pose, unlike the benchmark's initial states; with
        ``disturb_arm`` its joints vary as theirs do.
        """
        with global_numpy_seed(seed):
            self._reset_like_new()
        state = None if init_state is None else self._init_states[init_state]
        if state is None and disturb_arm:
            state = self._env.sim.get_state().flatten()
            joints = 1 + np.array(self._env.robots[0]._ref_joint_pos_indexes)  # after the time
            state[joints] += np.random.default_rng([seed, 1]).normal(0.0, ARM_DEVIATION, len(joints))
        if state is not None:
            # Stock `set_init_state`: joint positions and velocities, then a forced observation.
            self._env.sim.set_state_from_flattened(state)
            self._env.sim.forward()
            self._post_process()
            self._observe_at_start()

    def _reset_like_new(self) -> None:
        """Robosuite's hard reset on the model that is already compiled.

        A hard reset differs from a soft one in five ways, all restored here: model fields that episodes change
        (poses of fixtures, colours of sites), the gripper's accumulated action, two extra `mj_forward` calls that warm
        the constraint solver (one after compilation, one by the new render context), and the samplers of drawers and
        knobs, which stock LIBERO registers once more at each compilation and all of which draw random numbers.
        """
        from robosuite.utils.errors import RandomizationError

        env = self._env
        for attempt in range(1, 1000):
            self._restore_compiled_model()
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
            raise RuntimeError(f"{self.id}: objects could not be placed without overlap in 999 attempts")
        env.sim.forward()
        env.visualize(vis_settings={vis: False for vis in env._visualizations})
        self._clock.reset()
        self._observe_at_start()

    def _post_process(self) -> None:
        self._env._post_process()  # lights and knobs


def _build(task: Task) -> Any:
    """The robosuite environment of a task with LIBERO's own settings."""
    import libero.libero.envs.bddl_utils as bddl
    from libero.libero.envs import TASK_MAPPING
    from robosuite import load_controller_config

    stock = TASK_MAPPING[bddl.get_problem_info(str(task.bddl_file))["problem_name"]]
    make: Any = with_cached_model(stock)
    return make(
        str(task.bddl_file),
        robots=["Panda"],
        controller_configs=load_controller_config(default_controller="OSC_POSE"),
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=False,  # made on first use, with data of its own (see FrameRenderer)
    )

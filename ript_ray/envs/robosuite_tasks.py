"""Robosuite's own tasks for one arm."""

from __future__ import annotations

from typing import Any

import numpy as np

from ript_ray.config import INIT_STATES
from ript_ray.envs.arm import ArmWorld, global_numpy_seed, with_cached_model
from ript_ray.envs.tasks import ROBOSUITE_TASKS
from ript_ray.envs.world import ResetOptions

MAX_STEPS = 500
_MODEL_SEED = 0


class RobosuiteEnv(ArmWorld):
    """A robosuite task with a Panda arm under operational-space control at 20 Hz.

    Robosuite has no official initial states: the i-th is what seed i gives, while the seed of `reset` is used where no
    state is asked for. Some tasks draw the sizes of their objects when their model is made; here that is once, with
    seed 0. The result is the same, to the last bit, as that of a stock environment that is made after
    ``numpy.random.seed(0)`` and whose ``reset`` keeps its model (``hard_reset=False``) and starts with the gripper at
    rest.

    Args:
        name: one of `ROBOSUITE_TASKS`.
        image_size: height and width of both frames in pixels.
        max_steps: step limit of an episode; 500 by default.
    """

    num_init_states = INIT_STATES

    def __init__(self, name: str, image_size: int = 128, max_steps: int | None = None) -> None:
        super().__init__(_build(name), image_size)
        self.id, self.instruction = f"robosuite/{name}", ROBOSUITE_TASKS[name]
        self.max_steps = max_steps or MAX_STEPS

    def _start(self, seed: int, options: ResetOptions) -> None:
        env = self._env
        # The seed moves the arm, too.
        with global_numpy_seed(seed if options.init_state is None else options.init_state):
            self._restore_compiled_model()
            env.robots[0].gripper.current_action = np.zeros(env.robots[0].gripper.dof)
            env.sim.reset()
            env._reset_internal()
            env.sim.forward()
        env.visualize(vis_settings={vis: False for vis in env._visualizations})
        self._clock.reset()
        self._observe_at_start()


def _build(name: str) -> Any:
    import robosuite

    make: Any = with_cached_model(robosuite.environments.base.REGISTERED_ENVS[name])
    with global_numpy_seed(_MODEL_SEED):
        return make(
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
            control_freq=20,
            horizon=10**9,
        )

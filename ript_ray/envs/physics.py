"""One control step of robosuite's operational-space controller without the repeated work, bit for bit.

Stock robosuite runs `mj_forward` twice and `mj_step` once in each of the 25 physics substeps, although positions and
velocities do not change between the three. Every one of those calls refines the constraint solver's warm start, so
leaving one out would change the last bits; restarting them after the velocity stage (`mj_forwardSkip`) does not.
Observables are evaluated only at the substep at which robosuite would sample them.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

_SKIP_POS_VEL = int(mujoco.mjtStage.mjSTAGE_VEL)
_MAX_ACCELERATION = 1e10


class SimulationDiverged(RuntimeError):
    """The physics produced a non-finite or absurd state; the episode cannot be continued."""


class SampleClock:
    """The sampling clock of robosuite's `Observable`: same floating-point additions, so the same substep samples.

    All observables of a LIBERO environment share one rate, hence one clock. After a reset that was followed by
    `set_init_state` the sample falls on the 24th of the 25 substeps.
    """

    def __init__(self, sampling_rate: float) -> None:
        self._period = 1.0 / sampling_rate
        self._elapsed = 0.0
        self._sampled = False

    def reset(self) -> None:
        """Start a new episode."""
        self._elapsed = 0.0

    def force(self, timestep: float) -> None:
        """Account for an update that samples in any case (after a reset or a restored state)."""
        self._advance(timestep, force=True)

    def tick(self, timestep: float) -> bool:
        """Advance by one physics substep of ``timestep`` seconds; True when observables are sampled now."""
        return self._advance(timestep, force=False)

    def _advance(self, timestep: float, force: bool) -> bool:
        self._elapsed += timestep
        due = force or (not self._sampled and self._period >= self._elapsed)
        if due:
            self._sampled = True
        if self._elapsed >= self._period:
            due = due or not self._sampled
            self._elapsed %= self._period
            self._sampled = False
        return due


class ControlStepper:
    """Advances one robosuite environment by control steps.

    Args:
        env: the robosuite environment (`BDDLBaseDomain`), reset at least once.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._model = env.sim.model._model
        self._data = env.sim.data._data
        if self._model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
            raise RuntimeError(f"expected MuJoCo's Euler integrator, found {self._model.opt.integrator}")
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._jac_pos = np.zeros((3, self._model.nv))
        self._jac_rot = np.zeros((3, self._model.nv))
        self._mass = np.zeros((self._model.nv, self._model.nv))

    def step(self, action: np.ndarray, clock: SampleClock) -> tuple[np.ndarray, np.ndarray]:
        """Apply ``action`` (float[7]) for one control period.

        Returns:
            ``(sample_qpos, sample)``: the joint positions float64[nq] whose kinematics the cameras see at the moment
            of sampling, and the proprioception float64[9] sampled then (position 3, quaternion xyzw 4, gripper 2).

        Raises:
            SimulationDiverged: when velocities are not finite afterwards.
        """
        env, model, data = self._env, self._model, self._data
        robot = env.robots[0]
        controller = robot.controller
        torque_low, torque_high = robot.torque_limits
        arm_action, gripper_action = action[: controller.control_dim], action[controller.control_dim :]
        sampled: tuple[np.ndarray, np.ndarray] | None = None
        for substep in range(self._substeps):
            mujoco.mj_forward(model, data)
            # A new controller has measured the robot already (before any initial state was restored): stock robosuite
            # keeps that stale measurement for the first substep, so it must be kept here.
            if controller.new_update:
                self._update_controller(controller)
            if substep == 0:
                controller.set_goal(arm_action)
            robot.torques = np.clip(controller.run_controller(), torque_low, torque_high)
            robot.grip_action(gripper=robot.gripper, gripper_action=gripper_action)
            data.ctrl[robot._ref_joint_actuator_indexes] = robot.torques
            sampling = clock.tick(env.model_timestep)
            # The step below integrates after it computed positions: a camera sees the joint positions from before it.
            seen = data.qpos.copy() if sampling else None
            mujoco.mj_forwardSkip(model, data, _SKIP_POS_VEL, 1)
            if not np.abs(data.qacc).max() < _MAX_ACCELERATION:
                raise SimulationDiverged(f"acceleration {np.abs(data.qacc).max():.3g} at time {data.time:.3f} s")
            mujoco.mj_Euler(model, data)
            if seen is not None:
                sampled = seen, self.proprioception()
        env.timestep += 1
        env.cur_time += env.control_timestep
        if sampled is None:
            raise RuntimeError("no observation was sampled in a whole control step; the sampling clock is out of phase")
        return sampled

    def proprioception(self) -> np.ndarray:
        """End-effector position (m), its quaternion (xyzw) and both finger positions (m): float64[9], as robosuite."""
        robot, data = self._env.robots[0], self._data
        quat = data.xquat[self._env.sim.model.body_name2id(robot.robot_model.eef_name)]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([data.site_xpos[robot.eef_site_id], quat[[1, 2, 3, 0]], fingers])

    def _update_controller(self, controller: Any) -> None:
        """`Controller.update` with the position and velocity stages skipped and both Jacobians from one call."""
        model, data = self._model, self._data
        mujoco.mj_forwardSkip(model, data, _SKIP_POS_VEL, 1)
        site = self._env.robots[0].eef_site_id
        controller.ee_pos = np.array(data.site_xpos[site])
        controller.ee_ori_mat = np.array(data.site_xmat[site].reshape([3, 3]))
        mujoco.mj_jacSite(model, data, self._jac_pos, self._jac_rot, site)
        controller.ee_pos_vel = np.dot(self._jac_pos, data.qvel)
        controller.ee_ori_vel = np.dot(self._jac_rot, data.qvel)
        controller.joint_pos = np.array(data.qpos[controller.qpos_index])
        controller.joint_vel = np.array(data.qvel[controller.qvel_index])
        controller.J_pos = np.array(self._jac_pos[:, controller.qvel_index])
        controller.J_ori = np.array(self._jac_rot[:, controller.qvel_index])
        controller.J_full = np.array(np.vstack([controller.J_pos, controller.J_ori]))
        mujoco.mj_fullM(model, self._mass, data.qM)
        controller.mass_matrix = self._mass[controller.qvel_index, :][:, controller.qvel_index]
        controller.new_update = False

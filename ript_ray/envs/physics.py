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

from ript_ray.envs.substeps import Goal, Measurement, Plant, Sample, Scratch, begin, function_addresses, run


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
        env: the robosuite environment with one Panda arm, reset at least once.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._model = env.sim.model._model
        self._data = env.sim.data._data
        if self._model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
            raise RuntimeError(f"expected MuJoCo's Euler integrator, found {self._model.opt.integrator}")
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._measured = Measurement.empty(len(env.robots[0].controller.qvel_index))
        shape = (3, self._model.nv)
        self._scratch = Scratch(np.zeros(shape), np.zeros(shape), np.zeros((self._model.nv, self._model.nv)))
        self._plant = self._make_plant()

    def step(self, action: np.ndarray, clock: SampleClock) -> Sample:
        """Apply ``action`` (float[7]) for one control period and return what was sampled.

        Raises:
            SimulationDiverged: when accelerations are not finite.
        """
        env, robot = self._env, self._env.robots[0]
        controller = robot.controller
        ticks = [clock.tick(env.model_timestep) for _ in range(self._substeps)]
        if not any(ticks):
            raise RuntimeError("no observation was sampled in a whole control step; the sampling clock is out of phase")
        # A new controller has measured the robot already (before any initial state was restored): stock robosuite
        # keeps that stale measurement for the first substep, so it must be kept here.
        if not controller.new_update:
            for name in Measurement._fields:
                getattr(self._measured, name)[:] = getattr(controller, name)
        begin(self._plant, self._measured, self._scratch, controller.new_update)
        controller.new_update = False
        controller.ee_pos, controller.ee_ori_mat = self._measured.ee_pos, self._measured.ee_ori_mat
        controller.set_goal(action[: controller.control_dim])
        goal = Goal(controller.goal_pos, controller.goal_ori, controller.kp, controller.kd, controller.initial_joint)
        sample = self._new_sample()
        gripper = np.zeros(2) + robot.gripper.current_action  # one number until it first moves
        finite, robot.torques = run(
            self._plant,
            self._measured,
            self._scratch,
            goal,
            gripper,
            float(np.sign(action[-1])),
            sample,
            len(ticks) - 1 - ticks[::-1].index(True),
            self._substeps,
        )
        if not finite:
            raise SimulationDiverged(f"acceleration {np.abs(self._data.qacc).max():.3g} at {self._data.time:.3f} s")
        robot.gripper.current_action = gripper
        controller.new_update = True
        env.timestep += 1
        env.cur_time += env.control_timestep
        return sample

    def observe(self) -> Sample:
        """A sample of the present state, as after a reset: float arrays of its own."""
        qpos = self._data.qpos.copy()
        return Sample(qpos, qpos, self._data.qvel.copy(), self._plant.site_pos.copy(), self._plant.hand_quat.copy())

    def _new_sample(self) -> Sample:
        nq, nv = self._model.nq, self._model.nv
        return Sample(np.empty(nq), np.empty(nq), np.empty(nv), np.empty(3), np.empty(4))

    def _make_plant(self) -> Plant:
        env, model, data = self._env, self._model, self._data
        robot = env.robots[0]
        site = env.sim.model.site_name2id(robot.controller.eef_name)
        gripper = np.array([env.sim.model.actuator_name2id(name) for name in robot.gripper.actuators])
        low, high = model.actuator_ctrlrange[gripper].T
        torque_low, torque_high = robot.torque_limits
        return Plant(
            functions=function_addresses(),
            model=model._address,
            data=data._address,
            site=np.int32(site),
            site_pos=data.site_xpos[site],
            site_mat=data.site_xmat[site],
            hand_quat=data.xquat[env.sim.model.body_name2id(robot.robot_model.eef_name)],
            qpos=data.qpos,
            qvel=data.qvel,
            qacc=data.qacc,
            bias=data.qfrc_bias,
            inertia=data.qM.ctypes.data,
            ctrl=data.ctrl,
            arm_qpos=np.array(robot.controller.qpos_index, dtype=np.int64),
            arm_dofs=np.array(robot.controller.qvel_index, dtype=np.int64),
            arm_actuators=np.array(robot._ref_joint_actuator_indexes, dtype=np.int64),
            torque_low=np.array(torque_low),
            torque_high=np.array(torque_high),
            gripper_actuators=gripper.astype(np.int64),
            gripper_bias=0.5 * (high + low),
            gripper_weight=0.5 * (high - low),
            gripper_direction=np.array([-1.0, 1.0]) * robot.gripper.speed,
        )

"""The physics substeps of a control step in compiled code: MuJoCo's C functions and robosuite's controller.

The formulas are robosuite's: its compiled helpers are called, its NumPy lines are repeated, in the same order and on
arrays of the same memory layout, since the layout decides which BLAS kernel sums in which order.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

_FUNCTIONS = (
    "mj_forwardSkip",
    "mj_fwdActuation",
    "mj_fwdAcceleration",
    "mj_fwdConstraint",
    "mj_Euler",
    "mj_jacSite",
    "mj_fullM",
)
_FORWARD, _ACTUATION, _ACCELERATION, _CONSTRAINT, _EULER, _JACOBIAN, _FULL_MASS = range(len(_FUNCTIONS))
_SKIP_SENSORS = np.int32(1)
_SKIP_NOTHING = np.int32(0)
_MAX_ACCELERATION = 1e10


class Plant(NamedTuple):
    """One simulated arm: addresses, indices and views into MuJoCo's own arrays."""

    functions: np.ndarray
    """Addresses of `_FUNCTIONS`: int64[7]."""
    model: int
    """Address of the mjModel."""
    data: int
    """Address of the mjData."""
    site: np.int32
    """End-effector site."""
    site_pos: np.ndarray
    site_mat: np.ndarray
    hand_quat: np.ndarray
    """Orientation wxyz of the body that carries the end effector."""
    qpos: np.ndarray
    qvel: np.ndarray
    qacc: np.ndarray
    bias: np.ndarray
    """Coriolis, centrifugal and gravity forces: float64[nv]."""
    inertia: int
    """Address of the sparse joint-space inertia."""
    ctrl: np.ndarray
    arm_qpos: np.ndarray
    arm_dofs: np.ndarray
    arm_actuators: np.ndarray
    torque_low: np.ndarray
    torque_high: np.ndarray
    gripper_actuators: np.ndarray
    gripper_bias: np.ndarray
    gripper_weight: np.ndarray
    gripper_direction: np.ndarray
    """Change of the gripper's target in one substep when it closes: float64[2]."""


class Measurement(NamedTuple):
    """What the controller knows of the arm, in robosuite's memory layouts."""

    ee_pos: np.ndarray
    ee_ori_mat: np.ndarray
    ee_pos_vel: np.ndarray
    ee_ori_vel: np.ndarray
    joint_pos: np.ndarray
    joint_vel: np.ndarray
    J_pos: np.ndarray
    J_ori: np.ndarray
    J_full: np.ndarray
    mass_matrix: np.ndarray

    @classmethod
    def empty(cls, joints: int) -> Measurement:
        """Buffers for an arm of so many joints."""
        return cls(
            ee_pos=np.zeros(3),
            ee_ori_mat=np.zeros((3, 3)),
            ee_pos_vel=np.zeros(3),
            ee_ori_vel=np.zeros(3),
            joint_pos=np.zeros(joints),
            joint_vel=np.zeros(joints),
            J_pos=np.zeros((3, joints), order="F"),
            J_ori=np.zeros((3, joints), order="F"),
            J_full=np.zeros((6, joints), order="F"),
            mass_matrix=np.zeros((joints, joints), order="F"),
        )


class Scratch(NamedTuple):
    """Intermediate results of the size of the whole model."""

    jac_pos: np.ndarray
    jac_rot: np.ndarray
    mass: np.ndarray


class Goal(NamedTuple):
    """What the controller is to reach, and its gains."""

    position: np.ndarray
    orientation: np.ndarray
    kp: np.ndarray
    kd: np.ndarray
    initial_joint: np.ndarray


class Sample(NamedTuple):
    """What robosuite's observables see, taken in the substep at which they are sampled."""

    seen_qpos: np.ndarray
    """Joint positions whose kinematics is seen: float64[nq]."""
    qpos: np.ndarray
    """Joint positions at the end of that substep: float64[nq]."""
    qvel: np.ndarray
    """Joint velocities at the end of that substep: float64[nv]."""
    ee_pos: np.ndarray
    hand_quat: np.ndarray
    """wxyz"""


def function_addresses() -> np.ndarray:
    """Addresses of the C functions in this process: int64[7]."""
    library = ctypes.CDLL(str(next(Path(mujoco.__file__).parent.glob("libmujoco*"))))
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS]
    return np.array(addresses, dtype=np.int64)


def _call_address(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address``, which returns nothing, with addresses (int64) and integers (int32).

    The address is a value and not a constant, so that numba can keep the compiled code on disk.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, values[1])  # type: ignore[no-untyped-call]
        kind = ir.FunctionType(ir.VoidType(), [part.type for part in parts])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), parts)
        return context.get_dummy_value()

    return types.void(address, arguments), generate


_call: Any = intrinsic(_call_address)


@numba.njit(cache=True, nogil=True)
def begin(plant: Plant, measured: Measurement, scratch: Scratch, refine: bool) -> None:
    """Robosuite's `mj_forward` before the controller and, with ``refine``, the controller's own one and measurement.

    Positions and velocities do not change between the two, so the second is only its constraint solver, which starts
    from the solution of the first.
    """
    _call(plant.functions[_FORWARD], (plant.model, plant.data, _SKIP_NOTHING, _SKIP_SENSORS))
    if not refine:
        return
    _call(plant.functions[_CONSTRAINT], (plant.model, plant.data))
    measured.ee_pos[:] = plant.site_pos
    measured.ee_ori_mat[:] = plant.site_mat.reshape((3, 3))
    jac_pos, jac_rot = scratch.jac_pos, scratch.jac_rot
    _call(plant.functions[_JACOBIAN], (plant.model, plant.data, jac_pos.ctypes.data, jac_rot.ctypes.data, plant.site))
    measured.ee_pos_vel[:] = np.dot(jac_pos, plant.qvel)
    measured.ee_ori_vel[:] = np.dot(jac_rot, plant.qvel)
    _call(plant.functions[_FULL_MASS], (plant.model, scratch.mass.ctypes.data, plant.inertia))
    for i in range(plant.arm_dofs.size):
        dof = plant.arm_dofs[i]
        measured.joint_pos[i] = plant.qpos[plant.arm_qpos[i]]
        measured.joint_vel[i] = plant.qvel[dof]
        for k in range(3):
            measured.J_pos[k, i] = jac_pos[k, dof]
            measured.J_ori[k, i] = jac_rot[k, dof]
            measured.J_full[k, i] = jac_pos[k, dof]
            measured.J_full[k + 3, i] = jac_rot[k, dof]
        for k in range(plant.arm_dofs.size):
            measured.mass_matrix[k, i] = scratch.mass[plant.arm_dofs[k], dof]


@numba.njit(cache=True, nogil=True)
def _torques(m: Measurement, goal: Goal, bias: np.ndarray) -> np.ndarray:
    """Operational-space control (Khatib 1987) as `OperationalSpaceController.run_controller` computes it."""
    ori_error = orientation_error(goal.orientation, m.ee_ori_mat)
    force = (goal.position - m.ee_pos) * goal.kp[0:3] + -m.ee_pos_vel * goal.kd[0:3]
    torque = ori_error * goal.kp[3:6] + -m.ee_ori_vel * goal.kd[3:6]
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(m.mass_matrix, m.J_full, m.J_pos, m.J_ori)
    wrench = np.empty(6)
    wrench[:3] = np.dot(lambda_pos, force)
    wrench[3:] = np.dot(lambda_ori, torque)
    torques = np.dot(m.J_full.T, wrench) + bias
    torques += nullspace_torques(m.mass_matrix, nullspace, goal.initial_joint, m.joint_pos, m.joint_vel)
    return torques


@numba.njit(cache=True, nogil=True)
def run(
    plant: Plant,
    measured: Measurement,
    scratch: Scratch,
    goal: Goal,
    gripper: np.ndarray,
    gripper_sign: float,
    sample: Sample,
    sample_at: int,
    substeps: int,
) -> tuple[bool, np.ndarray]:
    """All substeps of a control step; `begin` must have been called for the first.

    Args:
        plant: the simulated arm.
        measured: of `begin`; overwritten.
        scratch: overwritten.
        goal: fixed for the control step.
        gripper: the gripper's target in [−1, 1], float64[2]; moved on.
        gripper_sign: sign of the gripper's action.
        sample: filled in substep ``sample_at``.
        sample_at: the substep at which observables are sampled.
        substeps: how many.

    Returns:
        Whether accelerations stayed finite and below 1e10, and the torques of the last substep, float64[7].
    """
    torques = np.zeros(plant.arm_dofs.size)
    for substep in range(substeps):
        if substep > 0:
            begin(plant, measured, scratch, True)
        torques = _torques(measured, goal, plant.bias[plant.arm_dofs])
        for i in range(torques.size):
            torques[i] = min(max(torques[i], plant.torque_low[i]), plant.torque_high[i])
            plant.ctrl[plant.arm_actuators[i]] = torques[i]
        for i in range(gripper.size):
            target = gripper[i] + plant.gripper_direction[i] * gripper_sign
            gripper[i] = min(max(target, -1.0), 1.0)
            plant.ctrl[plant.gripper_actuators[i]] = plant.gripper_bias[i] + plant.gripper_weight[i] * gripper[i]
        if substep == sample_at:
            # The step integrates after it computed positions: observers see the joint positions from before it.
            sample.seen_qpos[:] = plant.qpos
        _call(plant.functions[_ACTUATION], (plant.model, plant.data))
        _call(plant.functions[_ACCELERATION], (plant.model, plant.data))
        _call(plant.functions[_CONSTRAINT], (plant.model, plant.data))
        for i in range(plant.qacc.size):
            if not abs(plant.qacc[i]) < _MAX_ACCELERATION:
                return False, torques
        _call(plant.functions[_EULER], (plant.model, plant.data))
        if substep == sample_at:
            sample.qpos[:] = plant.qpos
            sample.qvel[:] = plant.qvel
            sample.ee_pos[:] = plant.site_pos
            sample.hand_quat[:] = plant.hand_quat
    return True, torques

"""Frames of MuJoCo models from tickets.

A ticket holds ``qpos`` (joint positions whose kinematics the cameras see, float64[nq]), ``site_alpha`` (opacity of
every site, float32[nsite]: a stove that is on shows one) and ``body_pose`` (position and quaternion of every body in
its parent, float64[nbody, 7]: fixtures are placed there, not in qpos).
"""

from __future__ import annotations

import time
from typing import Any

import mujoco
import numpy as np

from ript_ray.envs.culling import Culler
from ript_ray.envs.world import Ticket

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Observation key → camera name in the model."""
_HIDDEN_GROUP = 5
"""Geom group that is not drawn; models use 0 (collision) and 1 (visual)."""


class FrameRenderer:
    """Renders tickets of one model with simulation data of its own, so that the running physics is never touched.

    Args:
        model: robosuite's wrapped model.
        size: height and width in pixels.
    """

    def __init__(self, model: Any, size: int) -> None:
        self._model = model._model
        self._size = size
        self._sim: Any = None
        self.seconds = 0.0
        """Time spent rendering so far."""
        self.frames = 0
        """Frames rendered so far."""

    def render(self, ticket: Ticket, camera: str, size: int | None = None) -> np.ndarray:
        """The frame of ``camera`` (a key of `CAMERAS`): uint8[size, size, 3], rotated by 180° as policies expect."""
        size = size or self._size
        started = time.perf_counter()
        sim = self._context()
        model = self._model
        keep = body_pose_of(model), model.site_rgba[:, 3].copy()
        try:
            _apply(model, ticket["body_pose"], ticket["site_alpha"])
            sim.data.qpos[:] = ticket["qpos"]
            mujoco.mj_kinematics(model, sim.data._data)
            mujoco.mj_comPos(model, sim.data._data)
            mujoco.mj_camlight(model, sim.data._data)
            # robosuite makes a context current only at its creation; another environment may have been made since.
            sim._render_context_offscreen.gl_ctx.make_current()
            frame = self._draw(model.camera(CAMERAS[camera]).id, size)
        finally:
            _apply(model, *keep)
        self.frames += 1
        self.seconds += time.perf_counter() - started
        # OpenGL gives rows bottom-up; published policies expect robosuite's unturned frames turned by 180 degrees,
        # which is the upright view mirrored left to right.
        return np.ascontiguousarray(frame[::-1, ::-1])

    def _draw(self, camera: int, size: int) -> np.ndarray:
        context = self._sim._render_context_offscreen
        if not self._culler.possible:
            return self._draw_geoms(self._shown, camera, size)
        plan = self._culler.plan(self._sim.data._data, camera, size)
        flags, reflection = context.scn.flags, int(mujoco.mjtRndFlag.mjRND_REFLECTION)
        flags[reflection] = plan.reflect
        try:
            frame = self._draw_geoms(plan.geoms, camera, size)
        finally:
            flags[reflection] = 1
        if plan.part is not None and plan.part_geoms is not None:
            part = (slice(plan.part.bottom, plan.part.top), slice(plan.part.left, plan.part.right))
            frame[part] = self._draw_geoms(plan.part_geoms, camera, size)[part]
        return frame

    def _draw_geoms(self, geoms: np.ndarray, camera: int, size: int) -> np.ndarray:
        context, group = self._sim._render_context_offscreen, self._model.geom_group
        keep = group.copy()
        group[self._shown & ~geoms] = _HIDDEN_GROUP
        try:
            context.render(width=size, height=size, camera_id=camera)
        finally:
            group[:] = keep
        return np.asarray(context.read_pixels(size, size))

    def close(self) -> None:
        """Release the OpenGL context, if one was made."""
        if self._sim is not None:
            # MuJoCo frees its textures and buffers by number in whatever context is current, even in another's.
            self._sim._render_context_offscreen.gl_ctx.make_current()
            self._sim.free()
            self._sim = None

    def _context(self) -> Any:
        if self._sim is None:
            from robosuite.utils.binding_utils import MjRenderContextOffscreen, MjSim

            if not self._model.light_castshadow.any():
                # MuJoCo reserves 64 MB for shadows, even where no light casts any.
                self._model.vis.quality.shadowsize = 0
            self._sim = MjSim(self._model)
            context = MjRenderContextOffscreen(self._sim, device_id=-1)
            context.vopt.geomgroup[0] = 0
            context.vopt.geomgroup[1] = 1
            self._shown = context.vopt.geomgroup[self._model.geom_group].astype(bool)
            context.vopt.geomgroup[_HIDDEN_GROUP] = 0
            self._culler = Culler(self._model, self._shown)
        return self._sim


def body_pose_of(model: Any) -> np.ndarray:
    """Position and quaternion of every body in its parent: float64[nbody, 7]."""
    return np.concatenate([model.body_pos, model.body_quat], axis=1)


def _apply(model: Any, body_pose: np.ndarray, site_alpha: np.ndarray) -> None:
    model.body_pos[:] = body_pose[:, :3]
    model.body_quat[:] = body_pose[:, 3:]
    model.site_rgba[:, 3] = site_alpha

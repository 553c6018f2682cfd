"""Which geoms a camera can see, directly or in a mirror: leaving the rest out changes no byte of a frame.

MuJoCo's renderer draws every geom, and once more, mirrored, for the first reflective box or plane of the scene, however
little of the frame that fills. On a CPU the time goes into vertices, so both are worth avoiding. All tests are with
bounding boxes, enlarged a little: what is left out lies wholly outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

_BOX, _PLANE = int(mujoco.mjtGeom.mjGEOM_BOX), int(mujoco.mjtGeom.mjGEOM_PLANE)
_SIGNS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_OPAQUE = 0.995
"""MuJoCo draws geoms of less opacity as transparent, which do not reflect."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a frame, in pixels from the lower left: columns [left, right), rows [bottom, top)."""

    left: int
    right: int
    bottom: int
    top: int


@dataclass(frozen=True, slots=True)
class FramePlan:
    """How to draw a frame."""

    geoms: np.ndarray
    """Geoms to draw: bool[ngeom]."""
    reflect: bool
    """Draw them with the mirror."""
    part: Window | None = None
    """Draw this part again, with the mirror and `part_geoms`."""
    part_geoms: np.ndarray | None = None


class Culler:
    """Plans frames of one model.

    Args:
        model: the compiled model.
        shown: geoms that are drawn at all, bool[ngeom].
    """

    def __init__(self, model: mujoco.MjModel, shown: np.ndarray) -> None:
        self._model = model
        self._unbounded = model.geom_type == _PLANE
        centre, half = model.geom_aabb[:, None, :3], model.geom_aabb[:, None, 3:]
        self._corners = centre + _SIGNS * (half * 1.02 + 1e-3)  # in each geom's frame: float64[ngeom, 8, 3]
        self._shown = shown
        self._faces = np.full(model.ngeom, 100)
        mesh = model.geom_type == int(mujoco.mjtGeom.mjGEOM_MESH)
        self._faces[mesh] = model.mesh_facenum[model.geom_dataid[mesh]]
        reflectance = np.zeros(model.ngeom)
        alpha = model.geom_rgba[:, 3].copy()
        of_material = model.geom_matid >= 0
        reflectance[of_material] = model.mat_reflectance[model.geom_matid[of_material]]
        alpha[of_material] = np.minimum(alpha[of_material], model.mat_rgba[model.geom_matid[of_material], 3])
        mirrors = np.flatnonzero(shown & (reflectance > 0) & np.isin(model.geom_type, (_BOX, _PLANE)))
        self._mirror = int(mirrors[0]) if len(mirrors) else None
        first = mirrors[:1]
        # A mirror that is a plane fills much of the frame, and a transparent one may or may not count as one.
        self.possible = not (model.geom_type[first] == _PLANE).any() and not (alpha[mirrors] < _OPAQUE).any()
        """Whether frames of this model can be planned."""

    def plan(self, data: mujoco.MjData, camera: int, size: int) -> FramePlan:
        """The plan for a square frame of ``size`` pixels, seen from a fixed camera in the pose of ``data``."""
        model = self._model
        corners = data.geom_xpos[:, None] + self._corners @ data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1)
        eye, axes = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        half = float(np.tan(np.radians(model.cam_fovy[camera]) / 2))
        visible = self._shown & (self._unbounded | self._inside(corners, eye, axes, (-half, half, -half, half)))
        mirror = self._mirror
        if mirror is None:
            return FramePlan(visible, reflect=False)
        # Only the first reflective geom of a scene reflects, so it has to stay, lest another take its place.
        was_visible, visible[mirror] = visible[mirror], True
        normal = data.geom_xmat[mirror].reshape(3, 3)[:, 2]
        surface = data.geom_xpos[mirror] + model.geom_size[mirror, 2] * normal
        if not was_visible or (eye - surface) @ normal <= 0:
            return FramePlan(visible, reflect=False)
        window = self._window(mirror, data, eye, axes, half, size)
        bounds = tuple(half * (2 * edge / size - 1) for edge in (window.left, window.right, window.bottom, window.top))
        height = (corners - surface) @ normal
        images = corners - 2 * height[..., None] * normal
        seen = self._inside(corners, eye, axes, bounds)
        mirrored = self._inside(images, eye, axes, bounds) & (height > 0).any(1)
        in_mirror = self._shown & (self._unbounded | seen | mirrored)
        in_mirror[mirror] = True
        everything = visible | in_mirror
        faces = self._faces
        if faces[visible].sum() + 2 * faces[in_mirror].sum() < 2 * faces[everything].sum():
            return FramePlan(visible, False, window, in_mirror)
        return FramePlan(everything, reflect=True)

    def _inside(self, corners: np.ndarray, eye: np.ndarray, axes: np.ndarray, bounds: tuple[float, ...]) -> np.ndarray:
        """Do boxes (float64[ngeom, 8, 3]) reach into the pyramid of tangents (left, right, bottom, top)? bool[ngeom]

        A box is outside when all its corners lie beyond one and the same side.
        """
        x, y, z = np.moveaxis((corners - eye) @ axes, -1, 0)
        left, right, bottom, top = bounds
        sides = (-z, x + left * z, -right * z - x, y + bottom * z, -top * z - y)
        return np.logical_and.reduce([(side > 0).any(1) for side in sides])

    def _window(
        self, mirror: int, data: mujoco.MjData, eye: np.ndarray, axes: np.ndarray, half: float, size: int
    ) -> Window:
        """The pixels that the upper side of a box can touch, with two to spare.

        The whole frame when it reaches behind the eye.
        """
        upper = _SIGNS[_SIGNS[:, 2] > 0] * self._model.geom_size[mirror]
        corners = data.geom_xpos[mirror] + upper @ data.geom_xmat[mirror].reshape(3, 3).T
        x, y, z = ((corners - eye) @ axes).T
        if (-z < 1e-2).any():
            return Window(0, size, 0, size)
        columns, rows = ((v / -z / half + 1) / 2 * size for v in (x, y))
        low = np.clip(np.floor([columns.min(), rows.min()]) - 2, 0, size).astype(int)
        high = np.clip(np.ceil([columns.max(), rows.max()]) + 2, 0, size).astype(int)
        return Window(int(low[0]), int(high[0]), int(low[1]), int(high[1]))

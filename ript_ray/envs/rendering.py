"""Choice of the OpenGL backend. Must run before MuJoCo or robosuite is first imported in a process."""

from __future__ import annotations

import ctypes.util
import logging
import os

from ript_ray.errors import UserError

DEBIAN_PACKAGES = "libgl1 libegl1 libgl1-mesa-dri libglib2.0-0"
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def configure() -> str:
    """Select a headless backend and return its name, ``"egl"`` or ``"osmesa"``.

    An existing ``MUJOCO_GL`` is respected; otherwise EGL is preferred (it serves GPUs and Mesa's software renderer).
    Child processes inherit the choice through the environment.

    Raises:
        UserError: when neither library is installed.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    candidates = [wanted] if wanted in _LIBRARIES else list(_LIBRARIES)
    for backend in candidates:
        if ctypes.util.find_library(_LIBRARIES[backend]):
            os.environ["MUJOCO_GL"] = backend
            os.environ["PYOPENGL_PLATFORM"] = backend
            # Mesa's software renderer: threads of its own make a small frame slower and take cores from other actors.
            os.environ.setdefault("LP_NUM_THREADS", "0")
            logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
            return backend
    raise UserError(
        f"no headless OpenGL library found (looked for {', '.join(candidates)}); "
        f"on Debian or Ubuntu run: apt-get install {DEBIAN_PACKAGES}"
    )

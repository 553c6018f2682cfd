"""Choice of the OpenGL backend and its device. `configure` must run before MuJoCo or robosuite is first imported."""

from __future__ import annotations

import ctypes.util
import functools
import logging
import os

from ript_ray.children import ask_child
from ript_ray.errors import UserError

DEBIAN_PACKAGES = "libgl1 libegl1 libgl1-mesa-dri libglib2.0-0"
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_PROBE_TIMEOUT_S = 60.0
_PROBE = """
import json, sys
import mujoco
import numpy as np
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='.2' rgba='1 0 0 1'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
frame = mujoco.Renderer(model, 32, 32)
frame.update_scene(data)
assert frame.render().std() > 1, "the frame is blank"
from OpenGL import GL
print(json.dumps({"renderer": GL.glGetString(GL.GL_RENDERER).decode()}))
sys.stdout.flush()
import os
os._exit(0)  # a driver that crashes on the way out has rendered all the same
"""
_EGL_DEVICES = """
import ctypes, json
from mujoco.egl import egl_ext as EGL
library = ctypes.CDLL("libEGL.so.1")
library.eglGetProcAddress.restype = ctypes.c_void_p
address = library.eglGetProcAddress(b"eglQueryDeviceAttribEXT")
query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))(address)
found = []
for device in EGL.eglQueryDevicesEXT():
    value = ctypes.c_ssize_t(-1)
    known = query(ctypes.cast(device, ctypes.c_void_p), 0x323A, ctypes.byref(value))  # EGL_CUDA_DEVICE_NV
    found.append(value.value if known else None)
print(json.dumps(found))
"""


def configure() -> str:
    """Select a headless backend and return its name, ``"egl"`` or ``"osmesa"``.

    An existing ``MUJOCO_GL`` is respected; otherwise EGL is preferred (it serves GPUs and Mesa's software renderer).
    Child processes inherit the choice through the environment.

    Raises:
        UserError: when neither library is installed.
    """
    candidates = _candidates()
    if not candidates:
        raise UserError(
            f"no headless OpenGL library found (looked for {', '.join(_LIBRARIES)}); "
            f"on Debian or Ubuntu run: apt-get install {DEBIAN_PACKAGES}"
        )
    _select(candidates[0])
    return candidates[0]


def choose(cuda_device: str | None = None, timeout_s: float = _PROBE_TIMEOUT_S) -> str:
    """Select the first backend that really renders, tried in a child process with a time limit.

    A broken driver hangs or crashes rather than raise, and concurrent EGL contexts are reported to hang on some cards:
    the child does so in this process's place.

    Args:
        cuda_device: the CUDA device whose EGL device is to render, as in ``CUDA_VISIBLE_DEVICES``.
        timeout_s: longest time for one try.

    Returns:
        What renders, for example ``"egl (llvmpipe (LLVM 15.0.6, 256 bits))"``; `describe_renderer` repeats it.

    Raises:
        UserError: when nothing renders, with what each try said.
    """
    complaints = []
    for backend in _candidates():
        _select(backend)
        for index in _egl_indices(cuda_device) if backend == "egl" else [None]:
            device = {} if index is None else {"MUJOCO_EGL_DEVICE_ID": str(index)}
            try:
                renderer = ask_child(_PROBE, timeout_s, variables=device)["renderer"]
            except RuntimeError as error:
                complaints.append(f"{backend}{'' if index is None else f', device {index}'}: {error}")
                continue
            if device:
                # Robosuite insists at import that this is among CUDA_VISIBLE_DEVICES, but EGL counts otherwise.
                import robosuite.utils.binding_utils  # noqa: F401

                os.environ |= device
            where = "" if index is None else f", EGL device {index}, CUDA device {cuda_device or 'none'}"
            os.environ["RIPT_RAY_RENDERER"] = f"{backend} ({renderer}{where})"
            return describe_renderer()
    raise UserError(
        f"nothing renders here ({'; '.join(complaints) or 'no library'}); on Debian or Ubuntu run: apt-get install "
        f"{DEBIAN_PACKAGES} libosmesa6"
    )


def describe_renderer() -> str:
    """The backend in use, as `choose` found it."""
    return os.environ.get("RIPT_RAY_RENDERER") or os.environ.get("MUJOCO_GL", "none")


@functools.cache
def egl_cuda_devices(timeout_s: float = _PROBE_TIMEOUT_S) -> tuple[int | None, ...]:
    """The CUDA index of every EGL device, in EGL's order; None for those that are not NVIDIA's."""
    try:
        return tuple(ask_child(_EGL_DEVICES, timeout_s))
    except RuntimeError:
        return ()


def _egl_indices(cuda_device: str | None) -> list[int | None]:
    """EGL devices to try; None leaves the choice to MuJoCo.

    Where CUDA_VISIBLE_DEVICES is set robosuite takes it for the index of an EGL device, which it need not be (it may
    name a device by UUID, or be empty), unless an index is given.
    """
    if cuda_device is None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [None]
    known = egl_cuda_devices()
    index = match_device(cuda_device or "", known)
    return [index] if index is not None else list(range(len(known))) or [None]


def match_device(cuda_device: str, cuda_of_egl: tuple[int | None, ...]) -> int | None:
    """Index of the EGL device that is a given CUDA device; None when there is none, or it is not given by number.

    Args:
        cuda_device: as in ``CUDA_VISIBLE_DEVICES``; of several, the first counts.
        cuda_of_egl: see `egl_cuda_devices`.
    """
    first = cuda_device.split(",")[0].strip()
    wanted = int(first) if first.isdigit() else None
    return cuda_of_egl.index(wanted) if wanted is not None and wanted in cuda_of_egl else None


def _candidates() -> list[str]:
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    names = [wanted] if wanted in _LIBRARIES else list(_LIBRARIES)
    return [name for name in names if ctypes.util.find_library(_LIBRARIES[name])]


def _select(backend: str) -> None:
    os.environ["MUJOCO_GL"] = backend
    os.environ["PYOPENGL_PLATFORM"] = backend
    # Mesa's software renderer: threads of its own make a small frame slower and take cores from other actors.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)

"""LIBERO's original demonstrations, one HDF5 file a task, as trajectories."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ript_ray.data.lerobot.layout import readable
from ript_ray.errors import UserError
from ript_ray.types import Context, Trajectory

_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_WIDTHS = {"actions": 7, "obs/ee_states": 6, "obs/gripper_states": 2}
_ROWS = {"opengl": slice(None, None, -1), "opencv": slice(None)}
"""How rows are brought into order from the top down, by robosuite's name for their order in the file."""
_AGAIN = "the file is damaged or does not hold LIBERO's demonstrations: download it again"


def read_hdf5(
    path: Path,
    *,
    env_id: str,
    instruction: str | None = None,
    every: int = 1,
    observed: Literal["after", "before"] | None = None,
) -> Iterator[Trajectory]:
    """The demonstrations of a file in order, one in memory at a time.

    Two things are converted. Frames: the files hold them as robosuite renders them, by default from the bottom row up;
    trajectories, like openpi, have them turned by 180°, upright but mirrored. Time: LIBERO's ``create_dataset.py``
    stores with each action what was observed after it, and trajectories what was observed before it; hence a
    demonstration of L actions becomes a trajectory of L − 1, without the first action.

    Args:
        path: of the file, with ``data/demo_0/actions`` and so on.
        env_id: task that the contexts name; their seed is the demonstration's number.
        instruction: what was to be done; by default what the file says.
        every: keep only the frames of every so-many-th step.
        observed: whether an observation was made after the action of the same row, as in LIBERO's own files, or
            before it, as in files that were made again by replaying those. By default after, in a file that says as
            much of itself as LIBERO's do; others are refused.

    Raises:
        UserError: when h5py is not installed, or something is missing, damaged or not as described: in the file's
            outline at once, in a demonstration when its turn comes.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise UserError(f"{path} cannot be read without the package h5py; install it with: pip install h5py") from error
    if every < 1:
        raise UserError(f"every is {every}, expected 1 or more")
    if observed not in ("after", "before", None):
        raise UserError(f"observed is {observed!r}, expected 'after' or 'before'")
    with readable(path), h5py.File(path, "r") as file:
        data = _item(file, "data", h5py.Group, path)
        demos = sorted((int(name[5:]), name) for name in data if name.startswith("demo_"))
        about = json.loads(data.attrs.get("problem_info", "{}"))
        convention = str(data.attrs.get("macros_image_convention", "opengl"))
        own = bool({"problem_info", "macros_image_convention"} & set(data.attrs))
    if not demos:
        raise UserError(f"{path} has no data/demo_0; {_AGAIN}")
    if observed is None and not own:
        raise UserError(
            f"{path}: its data has neither problem_info nor macros_image_convention, as LIBERO's own have; was each "
            "observation made before the action of its row, as in files that were made again by replaying (OpenVLA's "
            "no_noops), or after it? set data.observed=before or after"
        )
    text = instruction or (about.get("language_instruction") if isinstance(about, dict) else None)
    if not isinstance(text, str):
        raise UserError(f"{path}: its problem_info has no language_instruction, but {about!r}; pass instruction=…")
    if convention not in _ROWS:
        raise UserError(f"{path}: macros_image_convention is {convention!r}, expected {' or '.join(_ROWS)}")

    def trajectories() -> Iterator[Trajectory]:
        with readable(path), h5py.File(path, "r") as file:
            for number, name in demos:
                stored = _stored(h5py, file, name, path)
                context = Context(env_id, None, seed=number)
                when = observed or "after"
                yield _trajectory(stored, f"{path}: data/{name}", context, text, every, when, _ROWS[convention])

    return trajectories()


def _stored(h5py: Any, file: Any, name: str, path: Path) -> dict[str, Any]:
    """The arrays of a demonstration by name, still on disk."""
    demo = _item(file, f"data/{name}", h5py.Group, path)
    names = (*_WIDTHS, *(f"obs/{camera}" for camera in _CAMERAS))
    stored = {field: _item(demo, field, h5py.Dataset, f"{path}: data/{name}") for field in names}
    length, size = len(stored["actions"]), stored[f"obs/{_CAMERAS[0]}"].shape[1:3]
    for field, array in stored.items():
        shape = (length, _WIDTHS[field]) if field in _WIDTHS else (length, *size, 3)
        number = array.dtype.kind == "f" if field in _WIDTHS else array.dtype == np.uint8
        if array.shape != shape or not number or length < 2:
            raise UserError(
                f"{path}: data/{name}/{field} is {array.dtype}{list(array.shape)}, expected "
                f"{'floats' if field in _WIDTHS else 'uint8'}{list(shape)}, two rows or more; {_AGAIN}"
            )
    return stored


def _trajectory(
    stored: dict[str, Any], where: str, context: Context, instruction: str, every: int, observed: str, rows: slice
) -> Trajectory:
    actions = stored["actions"][1:] if observed == "after" else stored["actions"][:]
    length = len(actions)  # observation i, of as many, is the one before action i of these
    states = np.concatenate([stored[f"obs/{name}"][:length] for name in ("ee_states", "gripper_states")], axis=1)
    frames = np.stack([stored[f"obs/{camera}"][:length:every] for camera in _CAMERAS], axis=1)
    return Trajectory(
        context=context,
        policy_version=-1,
        success=True,
        actions=_finite(actions, f"{where}/actions"),
        states=_finite(states, f"{where}/obs"),
        frames=np.ascontiguousarray(frames[:, :, rows, ::-1]),
        frame_steps=np.arange(0, length, every, dtype=np.int32),
        tickets={},
        scene={},
        state_hashes=np.zeros(length + 1, dtype=np.uint64),
        instruction=instruction,
    )


def _item(group: Any, name: str, kind: type, where: object) -> Any:
    item = group.get(name)
    if not isinstance(item, kind):
        raise UserError(f"{where} has no {kind.__name__.lower()} {name!r}; {_AGAIN}")
    return item


def _finite(values: np.ndarray, where: str) -> np.ndarray:
    """float32[L, D]"""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row = np.argwhere(~np.isfinite(values))[0][0]
        raise UserError(f"{where}, row {row} is {values[row]}, expected finite numbers; {_AGAIN}")
    return values

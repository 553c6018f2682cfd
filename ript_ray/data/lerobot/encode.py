"""Trajectories as the columns of LeRobot datasets."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from ript_ray.data.lerobot.layout import Keys
from ript_ray.data.windows import HORIZON
from ript_ray.errors import UserError
from ript_ray.types import Trajectory

Column = Literal["success", "policy_version", "executed_actions", "init_hash", "action_is_pad"]
"""Columns beyond openpi's, constant over an episode but for the actions and their padding.

- ``success``: bool.
- ``policy_version``: int64.
- ``executed_actions``: float32[A], where the dataset's actions are what is to be imitated, an expert's labels.
- ``init_hash``: fingerprint of the simulator before the first action, int64: the 64 bits of the unsigned number,
  because LeRobot makes tensors of int64 of all whole numbers. ``column.view(np.uint64)`` gives it back.
- ``action_is_pad``: bool[50], which of the 50 actions from this step on lie behind the episode's end. It is what
  LeRobot makes itself for ``delta_timestamps``, for readers that do not.
"""

BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

Features = dict[str, dict[str, Any]]
"""By name: ``dtype``, ``shape`` and ``names``, as in meta/info.json."""
FramesOf = Callable[[Trajectory], np.ndarray]


def image_columns(t: Trajectory, i: int, keys: Keys, frames_of: FramesOf | None) -> dict[str, np.ndarray]:
    """The frames before all steps, by camera: uint8[L, H, W, 3]."""
    length, cameras = len(t), len(keys.cameras)
    if np.array_equal(t.frame_steps, np.arange(length)):
        frames = t.frames
    elif frames_of is not None:
        frames = frames_of(t)
    else:
        raise UserError(
            f"trajectory {i} has frames at {len(t.frame_steps)} of its {length} steps, and a dataset needs all; pass "
            f"frames_of, which renders them from the trajectory's tickets"
        )
    shape = (*frames.shape[:2], *frames.shape[4:])
    if frames.dtype != np.uint8 or shape != (length, cameras, 3) or not frames.size:
        raise UserError(
            f"frames of trajectory {i} are {frames.dtype}{list(frames.shape)}, expected uint8[{length}, {cameras}, H, "
            f"W, 3] for {length} steps (at least one) and the cameras {', '.join(keys.cameras)}; name others with keys"
        )
    return {camera: frames[:, c] for c, camera in enumerate(keys.cameras)}


def number_columns(t: Trajectory, keys: Keys, columns: Collection[str]) -> dict[str, np.ndarray]:
    """Columns of numbers by name: [L] or [L, D]."""
    length = len(t)
    values = {keys.state: t.states, keys.actions: t.actions if t.labels is None else t.labels}
    if "success" in columns:
        values["success"] = np.full(length, t.success)
    if "policy_version" in columns:
        values["policy_version"] = np.full(length, t.policy_version, dtype=np.int64)
    if "executed_actions" in columns:
        values["executed_actions"] = t.actions
    if "init_hash" in columns:
        values["init_hash"] = np.full(length, t.state_hashes[0], dtype=np.uint64).view(np.int64)
    if "action_is_pad" in columns:
        values["action_is_pad"] = np.arange(length)[:, None] + np.arange(HORIZON) >= length
    return values


def describe_columns(images: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> Features:
    """What meta/info.json says of the columns, and of those that every dataset has."""
    of_images = {
        name: {"dtype": "image", "shape": list(frames.shape[1:]), "names": ["height", "width", "channel"]}
        for name, frames in images.items()
    }
    of_values = {
        name: {"dtype": str(rows.dtype), "shape": list(rows.shape[1:]) or [1], "names": [name]}
        for name, rows in values.items()
    }
    of_steps = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in BOOKKEEPING.items()}
    return of_images | of_values | of_steps


def make_schema(features: Features) -> pa.Schema:
    """Types of the columns, with the description by which Hugging Face's datasets decodes them."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns: dict[str, pa.DataType] = {}
    hints: dict[str, Any] = {}
    for name, feature in features.items():
        size = feature["shape"][0]
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            columns[name], hints[name] = image, {"_type": "Image"}
        elif size == 1:
            columns[name], hints[name] = _arrow(feature), value
        else:
            # Of both names for it, datasets 3 and 4 both know this one.
            columns[name] = pa.list_(_arrow(feature), size)
            hints[name] = {"feature": value, "length": size, "_type": "Sequence"}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": hints}})})


def _arrow(feature: dict[str, Any]) -> pa.DataType:
    return pa.from_numpy_dtype(np.dtype(feature["dtype"]))


def make_table(schema: pa.Schema, images: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> pa.Table:
    """The rows of an episode."""
    columns = {name: _pictures(frames) for name, frames in images.items()}
    columns |= {name: _vectors(rows) for name, rows in values.items()}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _pictures(frames: np.ndarray) -> pa.Array:
    names = [f"frame_{step:06d}.png" for step in range(len(frames))]
    return pa.StructArray.from_arrays([pa.array(map(_png, frames), pa.binary()), pa.array(names)], ["bytes", "path"])


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # A tenth larger than by default, in a quarter of the time.
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _vectors(rows: np.ndarray) -> pa.Array:
    flat = pa.array(rows.ravel())
    return flat if rows.size == len(rows) else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def task_table(tasks: list[str]) -> pa.Table:
    """Instructions as the index of a pandas frame, which is how LeRobot looks them up."""
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    about = {"index_columns": ["task"], "column_indexes": [], "columns": [c | {"metadata": None} for c in columns]}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(about | {"pandas_version": "2.3.3"})})

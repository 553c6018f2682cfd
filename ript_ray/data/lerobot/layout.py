"""What the metadata of a LeRobot dataset says, and the names that reader and writer share."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ript_ray.errors import UserError

Version = Literal["v3.0", "v2.1"]
"""The formats that are written. v2.0, which differs from v2.1 in its statistics alone, is read, too."""

DATA_PATHS = {
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
}
READABLE = ("v2.0", "v2.1", "v3.0")
PICTURES = ("image", "video")
"""Types of features that are frames."""
COPY_AGAIN = "the dataset is damaged or incomplete: copy or download it again"


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the features that a trajectory consists of; by default those of openpi's LIBERO datasets."""

    cameras: tuple[str, ...] = ("image", "wrist_image")
    """In the order of a trajectory's cameras: agentview, wrist."""
    state: str = "state"
    actions: str = "actions"


OPENPI_KEYS = Keys()
LEROBOT_KEYS = Keys(("observation.images.image", "observation.images.image2"), "observation.state", "action")
"""Names in LeRobot's own copy of LIBERO."""


@dataclass(frozen=True, slots=True)
class Feature:
    """Type and size of a column."""

    dtype: str
    """``image``, ``video``, or the name of a number's type, as ``float32``."""
    shape: tuple[int, ...]
    """Of one frame's value: (8,) for a state, (256, 256, 3) for an image."""


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What ``meta/info.json`` says."""

    root: Path
    version: str
    episodes: int
    frames: int
    """Control steps of all episodes."""
    fps: float
    """Control steps per second. A label: openpi's copy of LIBERO says 10, though it was recorded at 20."""
    robot_type: str
    features: dict[str, Feature]
    data_path: str
    """Pattern of the data files' paths."""
    video_path: str | None
    """Pattern of the films' paths."""
    chunks_size: int
    """Files per folder."""

    @property
    def pictures(self) -> tuple[str, ...]:
        """Names of all cameras, in the order of the file."""
        return tuple(name for name, feature in self.features.items() if feature.dtype in PICTURES)

    def frame_size(self, camera: str) -> tuple[int, int]:
        """Height and width of a camera's frames in pixels."""
        shape = self.features[camera].shape
        if len(shape) != 3 or 3 not in (shape[0], shape[2]):
            raise UserError(f"{self.root}: {camera!r} has shape {shape}, expected (height, width, 3)")
        height, width = shape[:2] if shape[2] == 3 else shape[1:]  # old datasets put the colours first
        return height, width


def describe_dataset(root: Path) -> DatasetInfo:
    """What a dataset holds, by its metadata; no data is read.

    Raises:
        UserError: when there is no dataset, its version is unknown or its description is damaged.
    """
    path = root / "meta/info.json"
    if not path.is_file():
        raise UserError(f"no LeRobot dataset at {root}: it has no meta/info.json; give the folder that contains meta/")
    info = load_json(path)
    version = entry(info, "codebase_version", str, path)
    if version not in READABLE:
        known = ", ".join(READABLE)
        raise UserError(f"{path}: codebase_version is {version!r}; {known} can be read; convert it with LeRobot")
    features = entry(info, "features", dict, path)
    fps = entry(info, "fps", (int, float), path)
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"{path}: fps is {fps}, expected a number above 0; {COPY_AGAIN}")
    return DatasetInfo(
        root=root,
        version=version,
        episodes=entry(info, "total_episodes", int, path),
        frames=entry(info, "total_frames", int, path),
        fps=fps,
        robot_type=str(info.get("robot_type")),
        features={name: _feature(name, value, path) for name, value in features.items()},
        data_path=entry(info, "data_path", str, path),
        video_path=entry(info, "video_path", (str, type(None)), path),
        chunks_size=max(1, entry(info, "chunks_size", int, path)),
    )


def _feature(name: str, value: Any, path: Path) -> Feature:
    shape = entry(value, "shape", list, path)
    if not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{path}: feature {name!r} has shape {shape}, expected whole numbers above 0; {COPY_AGAIN}")
    return Feature(entry(value, "dtype", str, path), tuple(shape))


def load_json(path: Path) -> Any:
    """The content of a JSON file, or an error that names it."""
    with readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def load_json_lines(path: Path) -> list[Any]:
    """The content of a file with one JSON value a line, or an error that names it."""
    with readable(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def entry(record: Any, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """``record[key]``, which has to be of a kind; otherwise an error that names file, key and value."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{path}: {key!r} is {str(value)[:80]!r}, expected {kinds}; {COPY_AGAIN}")
    return value


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into an error that names the file."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing; {COPY_AGAIN}")
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}); {COPY_AGAIN}") from error

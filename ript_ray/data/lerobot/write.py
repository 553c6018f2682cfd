"""Trajectories as a LeRobot dataset, v3.0 or v2.1, with images as PNG: one trajectory in memory at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ript_ray.data.lerobot.encode import (
    BOOKKEEPING,
    Column,
    Features,
    FramesOf,
    describe_columns,
    image_columns,
    make_schema,
    make_table,
    number_columns,
    task_table,
)
from ript_ray.data.lerobot.layout import DATA_PATHS, OPENPI_KEYS, Keys, Version
from ript_ray.data.lerobot.stats import Stats, combine, image_stats, vector_stats
from ript_ray.errors import UserError, nearest
from ript_ray.types import Trajectory

FPS = 20
"""Control steps per second, of LIBERO and where nothing is said."""
_CHUNK = 1000
"""Files per folder."""
_EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"


def write_dataset(
    root: Path,
    trajectories: Iterable[Trajectory],
    *,
    version: Version = "v3.0",
    fps: int = FPS,
    robot_type: str = "panda",
    keys: Keys = OPENPI_KEYS,
    columns: Collection[Column] = ("success", "policy_version"),
    advantages: Callable[[int, Trajectory], float] | None = None,
    frames_of: FramesOf | None = None,
    data_files_size_in_mb: float = 100,
) -> None:
    """Write a dataset that LeRobot and openpi read. It appears complete or not at all.

    Its actions are what is to be imitated: a trajectory's labels where it has them.

    Args:
        root: a folder that does not exist yet, or is empty.
        trajectories: are asked for one by one; all with the same cameras and numbers of states and actions.
        version: v3.0 for LeRobot since 0.4, v2.1 for openpi and LeRobot before.
        fps: control steps per second.
        robot_type: a label.
        keys: names of the features; by default those of openpi's LIBERO datasets.
        columns: which further columns to write.
        advantages: of a trajectory and its place among them, from 0 on; it makes a column ``advantages``, float32.
        frames_of: the frames before all steps of a trajectory that has only some of them: uint8[L, C, H, W, 3].
        data_files_size_in_mb: beyond which a new data file is begun in v3.0; in v2.1 every episode has its own.

    Raises:
        UserError: when ``root`` is taken, an argument or a trajectory does not fit, or there are no trajectories.
    """
    _check_arguments(version, fps, keys, columns)
    with _staged(root.absolute()) as staging:
        writer: _Writer | None = None
        for i, trajectory in enumerate(trajectories):
            images = image_columns(trajectory, i, keys, frames_of)
            values = number_columns(trajectory, keys, columns)
            if advantages is not None:
                values["advantages"] = np.full(len(trajectory), advantages(i, trajectory), dtype=np.float32)
            if writer is None:
                features = describe_columns(images, values)
                writer = _Writer(staging, version, fps, features, data_files_size_in_mb)
            writer.add(trajectory.instruction, images, values)
        if writer is None:
            raise UserError(f"nothing to write to {root}: no trajectories were given")
        writer.finish(robot_type)


def _check_arguments(version: str, fps: int, keys: Keys, columns: Collection[str]) -> None:
    if version not in DATA_PATHS:
        raise UserError(f"version is {version!r}, expected one of {', '.join(DATA_PATHS)}")
    if fps < 1:
        raise UserError(f"fps is {fps}, expected 1 or more control steps per second")
    for column in columns:
        if column not in get_args(Column):
            raise UserError(f"columns has {column!r}; {nearest(column, get_args(Column))}")
    names = [*keys.cameras, keys.state, keys.actions]
    taken = {*BOOKKEEPING, *get_args(Column), "advantages"}
    for name in names:
        if names.count(name) > 1 or name in taken or "/" in name or not name:
            raise UserError(f"keys has {name!r}, expected different names without '/' that are none of {sorted(taken)}")


@contextlib.contextmanager
def _staged(root: Path) -> Iterator[Path]:
    """A folder that becomes ``root`` if all goes well and vanishes otherwise."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists and is not empty; choose another folder, or remove it first")
    staging = root.with_name(f".{root.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.replace(root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Writer:
    """Writes episodes as they come, and the metadata at the end."""

    def __init__(
        self, root: Path, version: Version, fps: int, features: Features, data_files_size_in_mb: float
    ) -> None:
        self._root, self._version, self._fps, self._features = root, version, fps, features
        self._size_in_mb = data_files_size_in_mb
        self._schema = make_schema(features)
        self._files = _DataFiles(root, version, self._schema, data_files_size_in_mb * 2**20)
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, Stats]] = []
        self._frames = 0

    def add(self, instruction: str, images: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        """Write one episode: frames by camera, uint8[L, H, W, 3], and numbers by name, [L] or [L, D]."""
        episode, length = len(self._episodes), len(next(iter(images.values())))
        self._check(episode, length, images, values)
        steps = np.arange(length)
        task = self._tasks.setdefault(instruction, len(self._tasks))
        values = values | {
            "timestamp": (steps / self._fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, episode),
            "index": self._frames + steps,
            "task_index": np.full(length, task),
        }
        chunk, file = divmod(self._files.add(make_table(self._schema, images, values)), _CHUNK)
        self._episodes.append(
            {
                "episode_index": episode,
                "tasks": [instruction],
                "length": length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
            }
        )
        stats = {name: image_stats(frames) for name, frames in images.items()}
        self._stats.append(stats | {name: vector_stats(rows) for name, rows in values.items()})
        self._frames += length

    def _check(self, episode: int, length: int, images: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        for name, feature in describe_columns(images, values).items():
            first = self._features[name]
            if feature != first:
                raise UserError(
                    f"{name!r} of trajectory {episode} is {feature['dtype']}{feature['shape']} a step, but "
                    f"{first['dtype']}{first['shape']} in the first; write them to datasets of their own"
                )
        for name, rows in values.items():
            if len(rows) != length:
                raise UserError(
                    f"trajectory {episode} has {len(rows)} rows of {name!r}, expected {length}, as of frames"
                )
            if not np.isfinite(rows).all():
                step = np.argwhere(~np.isfinite(rows))[0][0]
                raise UserError(
                    f"{name!r} of trajectory {episode} at step {step} is {rows[step]}, expected finite numbers; leave "
                    f"the trajectory out"
                )

    def finish(self, robot_type: str) -> None:
        """Write the metadata."""
        self._files.close()
        (self._root / "meta").mkdir()
        if self._version == "v3.0":
            self._describe_v3()
        else:
            self._describe_v2()
        episodes = len(self._episodes)
        of_version: dict[str, dict[str, Any]] = {
            "v3.0": {"data_files_size_in_mb": self._size_in_mb, "video_files_size_in_mb": 200},
            "v2.1": {"total_videos": 0, "total_chunks": -(-episodes // _CHUNK)},
        }
        info = {
            "codebase_version": self._version,
            "robot_type": robot_type,
            "total_episodes": episodes,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK,
            "fps": self._fps,
            "splits": {"train": f"0:{episodes}"},
            "data_path": DATA_PATHS[self._version],
            "video_path": None,
            "features": self._features,
        }
        self._write("info.json", json.dumps(info | of_version[self._version], indent=4))

    def _describe_v3(self) -> None:
        together = {name: combine([stats[name] for stats in self._stats]) for name in self._features}
        self._write("stats.json", json.dumps({name: _plain(stats) for name, stats in together.items()}, indent=4))
        pq.write_table(task_table(list(self._tasks)), self._root / "meta/tasks.parquet", write_page_checksum=True)
        rows = [
            record
            | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            | {f"stats/{name}/{key}": value for name in stats for key, value in _plain(stats[name]).items()}
            for record, stats in zip(self._episodes, self._stats, strict=True)
        ]
        file = self._root / _EPISODES_FILE
        file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), file, write_page_checksum=True)

    def _describe_v2(self) -> None:
        keep = ("episode_index", "tasks", "length")
        stats = [{name: _plain(value) for name, value in stats.items()} for stats in self._stats]
        lines = {
            "tasks": [{"task_index": index, "task": task} for task, index in self._tasks.items()],
            "episodes": [{key: record[key] for key in keep} for record in self._episodes],
            "episodes_stats": [{"episode_index": i, "stats": value} for i, value in enumerate(stats)],
        }
        for name, records in lines.items():
            self._write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def _write(self, name: str, text: str) -> None:
        (self._root / "meta" / name).write_text(text, encoding="utf-8")


class _DataFiles:
    """The data files, one of which is open."""

    def __init__(self, root: Path, version: Version, schema: pa.Schema, limit: float) -> None:
        self._root, self._version, self._schema = root, version, schema
        self._limit = limit if version == "v3.0" else 0
        self._number = -1
        self._bytes = 0
        self._writer: Any = None

    def add(self, table: pa.Table) -> int:
        """Write an episode as a row group. Returns the number of its file."""
        if self._writer is None or self._bytes + table.nbytes > self._limit:
            self.close()
            self._open()
        self._bytes += table.nbytes
        self._writer.write_table(table)
        return self._number

    def _open(self) -> None:
        self._number += 1
        self._bytes = 0
        chunk, file = divmod(self._number, _CHUNK)
        name = DATA_PATHS[self._version].format(
            chunk_index=chunk, file_index=file, episode_chunk=chunk, episode_index=self._number
        )
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(path, self._schema, write_page_checksum=True)

    def close(self) -> None:
        """Complete the open file, if there is one."""
        if self._writer is not None:
            self._writer.close()


def _plain(stats: Stats) -> dict[str, Any]:
    return {name: value.tolist() for name, value in stats.items()}
